"""LiteLLM, which many gateways and agents speak through."""

import json
import math

import litellm
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER_QUESTION = [{"role": "user", "content": "What is the weather in Paris right now? Use celsius."}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Get the weather", "parameters": WEATHER},
    }
]


@pytest.fixture
def connection(server):
    return {"model": f"openai/{server.model}", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}


def test_a_question_is_answered_whole_and_streamed(connection):
    whole = litellm.completion(messages=QUESTION, **connection)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 3
    stream = litellm.completion(messages=QUESTION, stream=True, stream_options={"include_usage": True}, **connection)
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_text_is_completed(connection):
    connection["model"] = connection["model"].replace("openai/", "text-completion-openai/")
    completion = litellm.text_completion(prompt="The capital of France is", max_tokens=8, **connection)
    assert "Paris" in completion.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(connection, stream):
    answer = litellm.completion(messages=WEATHER_QUESTION, tools=TOOLS, stream=stream, **connection)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] == "Paris"


def test_an_answer_follows_the_schema(connection):
    schema = {"name": "weather", "schema": WEATHER, "strict": True}
    answer = litellm.completion(
        messages=WEATHER_QUESTION, response_format={"type": "json_schema", "json_schema": schema}, **connection
    )
    assert json.loads(answer.choices[0].message.content).keys() == {"city", "unit"}


def test_texts_are_embedded(connection):
    del connection["temperature"]
    texts = ["The cat sat on the mat.", "A kitten is on the rug."]
    answer = litellm.embedding(input=texts, **connection)
    vectors = [entry["embedding"] for entry in answer.data]
    assert [math.isclose(math.hypot(*vector), 1, rel_tol=1e-5) for vector in vectors] == [True, True]
    assert answer.usage.prompt_tokens > 8
    (other,) = litellm.embedding(input=texts[:1], encoding_format="float", **connection).data
    assert other["embedding"] == pytest.approx(vectors[0], abs=1e-7)


def test_errors_are_those_of_litellm(connection):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **{**connection, "model": "openai/gpt-4"})
