"""Structured output and tools through OpenAI's Python client, with a real model."""

import json

import httpx
import jsonschema
import openai
import pytest

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"enum": ["chess", "music", "running"]}, "maxItems": 2},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a given city",
            "parameters": WEATHER,
        },
    }
]
QUESTION = [{"role": "user", "content": "What is the weather in Paris right now? Use celsius."}]
PROMPTS = ["Will it rain in Tokyo?", "Tell me a joke.", "Écris un poème.", "1 + 1 = ?", "I am in Lima. Umbrella?"]


def person_format() -> dict:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="session")
def tool_server(server):
    """The server, if its model's chat template takes tools."""
    body = {"model": server.model, "messages": QUESTION, "tools": TOOLS, "max_tokens": 1}
    if httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).status_code == 400:
        pytest.skip("the served model was not trained to call tools")
    return server


def check_call(call) -> dict:
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, WEATHER)
    return arguments


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_satisfies_the_schema(client, server, temperature):
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Make up a person."}],
        response_format=person_format(),
        temperature=temperature,
        seed=3,
        n=4,
        max_tokens=400,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_a_streamed_answer_is_the_same_json(client, server):
    arguments = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Make up a person."}],
        "response_format": person_format(),
        "temperature": 0,
    }
    whole = client.chat.completions.create(**arguments)
    chunks = client.chat.completions.create(**arguments, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content


@pytest.mark.parametrize(
    "structured, is_right",
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": r"\d{3}-\d{4}"}, lambda text: len(text) == 8 and text.replace("-", "").isdigit()),
        ({"grammar": 'start: "(" ("a" | "b"){2,4} ")"'}, lambda text: set(text[1:-1]) <= {"a", "b"}),
        ({"json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
    ],
)
def test_a_completion_has_the_form_asked_for(client, server, structured, is_right):
    completion = client.completions.create(
        model=server.model,
        prompt="Is the sky blue? Answer:",
        max_tokens=300,
        temperature=1,
        seed=5,
        extra_body={"structured_outputs": structured},
    )
    assert completion.choices[0].finish_reason == "stop"
    assert is_right(completion.choices[0].text), completion.choices[0].text


def test_a_form_that_cannot_be_followed_is_refused_by_name(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=server.model, prompt="a", extra_body={"structured_outputs": {"regex": "("}})
    assert error.value.param == "structured_outputs.regex"


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_the_model_calls_a_tool_whole_and_streamed(client, tool_server, choice):
    arguments = {
        "model": tool_server.model,
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls
    assert check_call(call)["city"] == "Paris"

    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**arguments, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert deltas[0].function.name == "get_weather" and deltas[0].id.startswith("call_")
    assert all(delta.index == 0 and delta.function.name is None and delta.id is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert len(deltas) > 5, "arguments come as they are written"
    assert chunks[-1].finish_reason == "tool_calls"


def test_arguments_of_a_required_call_satisfy_its_schema_whatever_is_asked(client, tool_server):
    for seed, prompt in enumerate(PROMPTS):
        answer = client.chat.completions.create(
            model=tool_server.model,
            messages=[{"role": "user", "content": prompt}],
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1,
            seed=100 * seed,
            n=4,
            max_tokens=300,
        )
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            check_call(call)


def test_a_conversation_goes_on_after_the_result_of_a_call(client, tool_server):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 31, "sky": "sunny"}'},
    ]
    arguments = {"model": tool_server.model, "tools": TOOLS, "temperature": 0, "max_tokens": 40}
    asked = client.chat.completions.create(messages=messages[:1], **arguments)
    answered = client.chat.completions.create(messages=messages, tool_choice="none", **arguments)
    message = answered.choices[0].message
    assert message.content and not message.tool_calls
    # The model has read the call and its result.
    without_tools = client.chat.completions.create(messages=messages[:1], tool_choice="none", **arguments)
    assert answered.usage.prompt_tokens > without_tools.usage.prompt_tokens + 20
    assert asked.usage.prompt_tokens > without_tools.usage.prompt_tokens + 50, "and the tools, where it may call them"
