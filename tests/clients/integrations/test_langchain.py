"""LangChain's OpenAI chat model and embeddings."""

import math

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"
WEATHER_QUESTION = "What is the weather in Paris right now? Use celsius."


@tool
def get_weather(city: str, unit: str) -> str:
    """Get the current weather in a given city."""
    return f"It is sunny in {city}, 31 degrees {unit}."


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@pytest.fixture
def model(server):
    return ChatOpenAI(model=server.model, base_url=f"{server.url}/v1", api_key="none", temperature=0, max_retries=0)


def test_a_question_is_answered_whole_and_streamed(model):
    whole = model.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_tokens"] > 3
    pieces = list(model.stream(QUESTION, stream_usage=True))
    together = sum(pieces[1:], pieces[0])
    assert together.content == whole.content
    assert len(pieces) > 3
    assert together.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_a_batch_is_answered_in_order(model):
    answers = model.batch([QUESTION, "Say hello."], config={"max_concurrency": 2})
    assert "Paris" in answers[0].content
    assert "Paris" not in answers[1].content


def test_a_tool_is_called_and_its_result_is_read(model):
    with_tools = model.bind_tools([get_weather])
    messages = [HumanMessage(WEATHER_QUESTION)]
    answer = with_tools.invoke(messages)
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] == "Paris"
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([*messages, answer, result]).content


def test_a_tool_call_is_streamed(model):
    pieces = list(model.bind_tools([get_weather], tool_choice="required").stream(WEATHER_QUESTION))
    together = sum(pieces[1:], pieces[0])
    assert isinstance(together, AIMessageChunk)
    (call,) = together.tool_calls
    assert (call["name"], call["args"]["city"]) == ("get_weather", "Paris")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object(model, method):
    person = model.with_structured_output(Person, method=method).invoke("Make up a person.")
    assert isinstance(person, Person)


def test_documents_and_queries_are_embedded(server):
    embeddings = OpenAIEmbeddings(
        model=server.model,
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        # It would send the tokens of OpenAI's tokenizer.
        check_embedding_ctx_length=False,
    )
    texts = ["The cat sat on the mat.", "A kitten is on the rug."]
    documents = embeddings.embed_documents(texts)
    assert [math.isclose(math.hypot(*vector), 1, rel_tol=1e-5) for vector in documents] == [True, True]
    assert embeddings.embed_query(texts[1]) == documents[1] != documents[0]
