// OpenAI's Node client against a running server with a real model: NIBBLE_BASE_URL says where, NIBBLE_MODEL what.

import assert from "node:assert/strict";
import http2 from "node:http2";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI from "openai";

const url = process.env.NIBBLE_BASE_URL;
const model = process.env.NIBBLE_MODEL;
assert.ok(url && model, "set NIBBLE_BASE_URL and NIBBLE_MODEL");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });

const QUESTION = [{ role: "user", content: "What is the capital of France?" }];
const WEATHER_QUESTION = [{ role: "user", content: "What is the weather in Paris right now? Use celsius." }];
const WEATHER = {
  type: "object",
  properties: {
    city: { type: "string", maxLength: 40 },
    unit: { type: "string", enum: ["celsius", "fahrenheit"] },
  },
  required: ["city", "unit"],
  additionalProperties: false,
};
const TOOLS = [{ type: "function", function: { name: "get_weather", description: "Get the weather of a city", parameters: WEATHER } }];

/** The value of a metric, summed over its labels that contain `label`; 0 when it was not counted yet. */
async function metric(name, label = "") {
  const text = await (await fetch(`${url}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(`${name}{`) && line.includes(label));
  return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0);
}

async function eventually(what, condition) {
  const deadline = Date.now() + 30_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, what);
    await sleep(20);
  }
}

async function list(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

/** Whether the model's chat template takes tools. */
async function takesTools() {
  try {
    await client.chat.completions.create({ model, messages: WEATHER_QUESTION, tools: TOOLS, max_tokens: 1 });
    return true;
  } catch (error) {
    assert.ok(error instanceof OpenAI.BadRequestError, error);
    return false;
  }
}

const withTools = { skip: !(await takesTools()) && "the served model was not trained to call tools" };

test("the model is listed and found", async () => {
  const models = await list(client.models.list());
  assert.deepEqual(models.map((entry) => entry.id), [model]);
  assert.equal((await client.models.retrieve(model)).object, "model");
});

test("a completion has the tokens asked for", async () => {
  const completion = await client.completions.create({ model, prompt: "The sky is", max_tokens: 5, temperature: 0, ignore_eos: true });
  assert.ok(completion.choices[0].text.length > 0);
  assert.equal(completion.choices[0].finish_reason, "length");
  assert.equal(completion.usage.completion_tokens, 5);
});

test("a streamed completion is the whole one in pieces", async () => {
  const body = { model, prompt: "Once upon a time", max_tokens: 24, temperature: 0, ignore_eos: true };
  const whole = await client.completions.create(body);
  const chunks = await list(await client.completions.create({ ...body, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
  assert.ok(chunks.length >= 20, `${chunks.length} chunks: tokens come as they are made`);
});

test("a question is answered, and streamed with its usage it is the same answer", async () => {
  const body = { model, messages: QUESTION, temperature: 0 };
  const whole = await client.chat.completions.create(body);
  assert.match(whole.choices[0].message.content, /Paris/);
  assert.equal(whole.choices[0].finish_reason, "stop");
  const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
  const chunks = await list(stream);
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), whole.choices[0].message.content);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  assert.deepEqual(chunks.at(-1).choices, []);
});

test("the client's own stream helper puts the message together", async () => {
  const stream = client.chat.completions.stream({ model, messages: QUESTION, temperature: 0 });
  let text = "";
  stream.on("content", (piece) => (text += piece));
  const message = await stream.finalMessage();
  assert.match(message.content, /Paris/);
  assert.equal(text, message.content);
});

test("texts are embedded", async () => {
  const input = ["The cat sat on the mat.", "A kitten is on the rug.", "The cat sat on the mat."];
  // The client asks for base64 unless told otherwise, and decodes it.
  const answer = await client.embeddings.create({ model, input });
  const vectors = answer.data.map((entry) => entry.embedding);
  assert.deepEqual(vectors[0], vectors[2]);
  assert.notDeepEqual(vectors[0], vectors[1]);
  for (const vector of vectors) assert.ok(Math.abs(Math.hypot(...vector) - 1) < 1e-5);
  const numbers = await client.embeddings.create({ model, input: input[1], encoding_format: "float" });
  assert.equal(numbers.data[0].embedding.length, vectors[1].length);
  for (const [at, value] of numbers.data[0].embedding.entries()) assert.ok(Math.abs(value - vectors[1][at]) < 1e-7);
  assert.equal(answer.usage.prompt_tokens, answer.usage.total_tokens);
});

test("a stream of HTTP/2 that is cancelled ends its sequence, and the connection goes on", async () => {
  const aborts = () => metric("nibble:request_success_total", 'finished_reason="abort"');
  const before = await aborts();
  const session = http2.connect(url);
  const post = (body) => {
    const request = session.request({ ":method": "POST", ":path": "/v1/completions", "content-type": "application/json" });
    request.setEncoding("utf8");
    request.end(JSON.stringify({ model, prompt: "Once upon a time", ignore_eos: true, temperature: 0, ...body }));
    return request;
  };
  const left = post({ max_tokens: 4000, stream: true });
  for await (const piece of left) {
    assert.match(piece, /^data: /);
    break;
  }
  left.close(http2.constants.NGHTTP2_CANCEL);
  await eventually("the abort is counted", async () => (await aborts()) === before + 1);
  await eventually("nothing runs", async () => (await metric("nibble:num_requests_running")) === 0);
  let text = "";
  for await (const piece of post({ max_tokens: 4 })) text += piece;
  assert.equal(JSON.parse(text).usage.completion_tokens, 4);
  session.close();
});

test("an answer follows the JSON schema", async () => {
  const schema = {
    type: "object",
    properties: { name: { type: "string", minLength: 1, maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 120 } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const answer = await client.chat.completions.create({
    model,
    messages: [{ role: "user", content: "Make up a person." }],
    response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
    temperature: 1,
    seed: 3,
    n: 3,
  });
  for (const choice of answer.choices) {
    const person = JSON.parse(choice.message.content);
    assert.deepEqual(Object.keys(person).sort(), ["age", "name"]);
    assert.ok(Number.isInteger(person.age) && person.age >= 0 && person.age <= 120);
    assert.ok(person.name.length >= 1);
  }
});

for (const tool_choice of ["auto", "required"]) {
  test(`a tool is called, whole and streamed, when the choice is ${tool_choice}`, withTools, async () => {
    const body = { model, messages: WEATHER_QUESTION, tools: TOOLS, tool_choice, parallel_tool_calls: false, temperature: 0 };
    const whole = (await client.chat.completions.create(body)).choices[0];
    assert.equal(whole.finish_reason, "tool_calls");
    const [call] = whole.message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.equal(JSON.parse(call.function.arguments).city, "Paris");

    const stream = client.chat.completions.stream(body);
    const streamed = (await stream.finalChatCompletion()).choices[0];
    assert.equal(streamed.finish_reason, "tool_calls");
    assert.equal(streamed.message.tool_calls.length, 1);
    assert.equal(streamed.message.tool_calls[0].function.name, "get_weather");
    assert.equal(streamed.message.tool_calls[0].function.arguments, call.function.arguments);
  });
}

test("the client's own loop calls the function and hands its result back", withTools, async () => {
  const asked = [];
  const get_weather = {
    ...TOOLS[0].function,
    parse: JSON.parse,
    function: (place) => {
      asked.push(place);
      return JSON.stringify({ temperature: 31, sky: "sunny" });
    },
  };
  const runner = client.chat.completions.runTools(
    { model, messages: WEATHER_QUESTION, tools: [{ type: "function", function: get_weather }], temperature: 0, max_tokens: 100 },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  assert.ok(asked.length >= 1 && asked[0].city === "Paris", JSON.stringify(asked));
  assert.ok(runner.messages.some((message) => message.role === "tool"));
});

test("a stream that is aborted ends its sequence", async () => {
  const aborts = () => metric("nibble:request_success_total", 'finished_reason="abort"');
  const before = await aborts();
  const controller = new AbortController();
  const stream = await client.completions.create(
    { model, prompt: "Once upon a time", max_tokens: 4000, ignore_eos: true, stream: true },
    { signal: controller.signal },
  );
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 3) controller.abort();
  assert.ok(chunks < 4000, "the stream ended before its time");
  await eventually("the abort is counted", async () => (await aborts()) === before + 1);
  await eventually("nothing runs", async () => (await metric("nibble:num_requests_running")) === 0);
  assert.equal(await metric("nibble:kv_cache_usage_perc"), 0);
});

test("errors are those of the client's own classes", async () => {
  await assert.rejects(client.chat.completions.create({ model: "gpt-4", messages: QUESTION }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError, error);
    assert.deepEqual([error.status, error.code, error.param], [404, "model_not_found", "model"]);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ model, messages: QUESTION, temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError, error);
    assert.equal(error.param, "temperature");
    return true;
  });
});
