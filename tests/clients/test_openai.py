"""OpenAI's Python client, httpx and curl against a running server with a real model."""

import json
import math
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = ["The sky is", "Once upon a time", "def add(a, b):", "1, 2, 3, 4,", "The 你好 sign says", "Paris is"]


def text_of(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_models_are_listed(client, server):
    models = client.models.list().data
    assert [model.id for model in models] == [server.model]
    assert client.models.retrieve(server.model).object == "model"


def test_a_question_is_answered(client, server):
    answer = client.chat.completions.create(model=server.model, messages=QUESTION, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens > 5 and usage.completion_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_streamed_chat_is_the_same_answer_in_pieces(client, server):
    whole = client.chat.completions.create(model=server.model, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=server.model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_completions_honour_their_limits(client, server):
    completion = client.completions.create(
        model=server.model, prompt=PROMPTS[:2], max_tokens=5, temperature=0, n=2, logprobs=2, echo=False
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text == completion.choices[1].text != completion.choices[2].text
    assert completion.usage.completion_tokens == 20
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)


def test_a_stop_string_ends_the_text(client, server):
    arguments = {"model": server.model, "prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0].text
    stop = whole[9:13]
    assert len(stop) == 4
    for stream in (False, True):
        answer = client.completions.create(**arguments, stop=[stop], stream=stream)
        text = text_of(answer) if stream else answer.choices[0].text
        assert text == whole[: whole.index(stop)]


def test_a_seed_reproduces_a_sample(client, server):
    def sample(seed):
        arguments = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 20, "temperature": 1.0}
        return client.completions.create(**arguments, seed=seed).choices[0].text

    assert sample(1) == sample(1) != sample(2)


def test_texts_are_embedded(client, server):
    texts = ["The cat sat on the mat.", "A kitten is on the rug.", "The cat sat on the mat."]
    # The client asks for base64 unless told otherwise, and decodes it.
    answer = client.embeddings.create(model=server.model, input=texts)
    vectors = [entry.embedding for entry in answer.data]
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1]
    assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-5) for vector in vectors)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 12
    as_numbers = client.embeddings.create(model=server.model, input=texts[1], encoding_format="float").data[0]
    assert as_numbers.embedding == pytest.approx(vectors[1], abs=1e-7)
    short = client.embeddings.create(model=server.model, input=texts[1], dimensions=16).data[0].embedding
    assert len(short) == 16 and math.isclose(math.hypot(*short), 1, rel_tol=1e-5)
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": texts[0]}).json()["tokens"]
    of_tokens = client.embeddings.create(model=server.model, input=[tokens, tokens[:2]]).data
    assert of_tokens[0].embedding == vectors[0] != of_tokens[1].embedding


def test_an_embedding_with_a_bad_field_is_refused_by_name(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=server.model, input="a", dimensions=1_000_000)
    assert error.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model=server.model, input=[])
    assert error.value.param == "input"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", -1, "temperature"),
        ("max_tokens", 10_000_000, "messages"),
        ("messages", [], "messages"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
    ],
)
def test_a_bad_field_is_refused_by_name(client, server, field, value, param):
    arguments = {"model": server.model, "messages": QUESTION, field: value}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**arguments)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


def test_an_unknown_field_is_refused_by_name(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=server.model, prompt="a", extra_body={"temprature": 1})
    assert error.value.param == "temprature"


def test_streams_at_once_say_what_they_say_alone(client, server):
    def run(prompt):
        stream = client.completions.create(
            model=server.model, prompt=prompt, max_tokens=32, temperature=0, stream=True
        )
        return text_of(stream)

    alone = [run(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        together = list(pool.map(run, 2 * PROMPTS))
    assert together == 2 * alone


def test_one_connection_of_http_2_carries_all(server):
    with httpx.Client(http1=False, http2=True, limits=httpx.Limits(max_connections=1)) as http:
        assert http.get(f"{server.url}/health").http_version == "HTTP/2"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)

        def run(prompt):
            stream = client.completions.create(
                model=server.model, prompt=prompt, max_tokens=24, temperature=0, stream=True
            )
            return text_of(stream)

        assert run(PROMPTS[0]) == run(PROMPTS[0]) != run(PROMPTS[1])
        # httpx does not reset a stream that it leaves (Node does, see its tests): the connection ends with it.
        aborted = server.metric("nibble:request_success_total", 'finished_reason="abort"')
        body = endless(server)
        extra = {"ignore_eos": body.pop("ignore_eos")}
        next(iter(client.completions.create(**body, stream=True, n=2, extra_body=extra)))
    server.eventually("the sequences of a connection that ended still run", server.is_idle)
    assert server.metric("nibble:request_success_total", 'finished_reason="abort"') == aborted + 2


def endless(server, **options):
    """A request that only its length would end, far from now."""
    return {
        "model": server.model,
        "prompt": "Once upon a time",
        "max_tokens": 4000,
        "ignore_eos": True,
        "temperature": 0,
        **options,
    }


def test_a_client_that_leaves_a_stream_frees_its_sequence(server):
    aborted = server.metric("nibble:request_success_total", 'finished_reason="abort"')
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=endless(server, stream=True, n=2), timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.metric("nibble:num_requests_running") == 2
    server.eventually("the sequences of a client that left still run", server.is_idle)
    assert server.metric("nibble:request_success_total", 'finished_reason="abort"') == aborted + 2


def test_a_client_that_does_not_wait_for_its_answer_frees_its_sequence(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=endless(server), timeout=0.5)
    server.eventually("the sequence of a client that left still runs", server.is_idle)


def test_curl_shows_text_as_it_comes(server):
    curl = shutil.which("curl")
    assert curl, "curl is needed"
    body = endless(server, stream=True, max_tokens=48)
    command = [curl, "-sN", f"{server.url}/v1/completions", "-H", "content-type: application/json", "-d", "@-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(body))
    process.stdin.close()
    first = process.stdout.readline()
    assert first.startswith("data: {")
    # The answer is not finished: what was read came before its end.
    assert server.metric("nibble:num_requests_running") == 1
    lines = [line.strip() for line in process.stdout if line.strip()]
    assert process.wait(60) == 0
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in [first, *lines[:-1]]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_server_told_to_stop_finishes_its_answers(start_server):
    server = start_server("--drain-timeout", "60")
    url = f"{server.url}/v1/completions"
    body = endless(server, stream=True, max_tokens=64, stream_options={"include_usage": True})
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 64
    assert server.process.wait(10) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_server_without_time_to_drain_says_that_it_stopped(start_server):
    server = start_server("--drain-timeout", "0")
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=endless(server, stream=True), timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert "stopped" in json.loads(events[-2])["error"]["message"]
    assert server.process.wait(10) == 0


def test_requests_beyond_the_queue_are_told_to_come_back(start_server):
    server = start_server("--max-num-seqs", "1", "--max-waiting-requests", "1")
    with server.client() as client, pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model=server.model, prompt="a", n=4)
    assert error.value.response.headers["retry-after"] == "1"
    server.eventually("a refused request still runs", server.is_idle)
