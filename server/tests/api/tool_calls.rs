//! Tools, by a model that only calls them when it must.

use nibble_server::{ServerOptions, ToolCallFormat};
use serde_json::{Value, json};

use crate::support::{CHAT, Options, Server};

/// The contents of the messages; with tools, their names first, and the format of calls.
const TEMPLATE: &str = "{% for tool in tools or [] %}{{ tool.function.name }}<tool_call>{% endfor %}\
    {% for message in messages %}{{ message.content }}\
    {% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}";

fn server() -> Server {
    Server::with(Options { chat_template: Some(TEMPLATE), ..Options::default() })
}

fn tool(name: &str, value: &str) -> Value {
    let parameters = json!({
        "type": "object", "properties": {"v": {"$ref": "#/$defs/v"}}, "required": ["v"],
        "additionalProperties": false, "$defs": {"v": {"enum": [value]}},
    });
    json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}})
}

fn body(choice: Value) -> Value {
    json!({
        "messages": [{"role": "user", "content": "w"}], "temperature": 0, "max_tokens": 200,
        "tools": [tool("f", "q"), tool("g", "r")], "tool_choice": choice,
    })
}

/// Name and arguments of the calls of a message.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let calls = message["tool_calls"].as_array().map_or(&[][..], Vec::as_slice);
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        let arguments = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        (call["function"]["name"].as_str().unwrap().to_owned(), arguments)
    };
    calls.iter().map(call).collect()
}

/// The message that a stream adds up to, as OpenAI's clients add it up, and how it ended.
fn message(events: &[Value]) -> (Value, Value) {
    let mut message = json!({"content": "", "tool_calls": []});
    let mut finish_reason = Value::Null;
    for choice in events.iter().map(|event| &event["choices"][0]) {
        if let Some(content) = choice["delta"]["content"].as_str() {
            message["content"] = (message["content"].as_str().unwrap().to_owned() + content).into();
        }
        for delta in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let calls = message["tool_calls"].as_array_mut().unwrap();
            let index = delta["index"].as_u64().unwrap() as usize;
            if delta.get("id").is_some() {
                assert_eq!(index, calls.len());
                calls.push(delta.clone());
            } else {
                assert!(delta["function"].get("name").is_none() && delta.get("type").is_none());
                let arguments = &mut calls[index]["function"]["arguments"];
                let more = delta["function"]["arguments"].as_str().unwrap();
                *arguments = (arguments.as_str().unwrap().to_owned() + more).into();
            }
        }
        finish_reason = choice["finish_reason"].clone();
    }
    (message, finish_reason)
}

#[tokio::test]
async fn a_tool_that_must_be_called_is_called_with_arguments_of_its_schema() {
    let server = server();
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    for (choice, name, value) in
        [(json!("required"), "f", "q"), (named("g"), "g", "r"), (named("f"), "f", "q")]
    {
        let mut body = body(choice);
        body["parallel_tool_calls"] = json!(false);
        let answer = server.ok(CHAT, body.clone()).await;
        let choice = &answer["choices"][0];
        assert_eq!(calls(&choice["message"]), [(name.to_owned(), json!({"v": value}))]);
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&Value::Null, &json!("tool_calls"))
        );
        let (message, finish_reason) = message(&server.stream(CHAT, body).await);
        assert_eq!(calls(&message), calls(&choice["message"]));
        assert_eq!((&message["content"], finish_reason), (&json!(""), json!("tool_calls")));
    }
}

#[tokio::test]
async fn the_llama_format_is_written_and_read_when_the_server_is_told_to() {
    let options = ServerOptions { tool_call_format: Some(ToolCallFormat::Llama3Json), ..Default::default() };
    let server = Server::with(Options { server: options, ..Options::default() });
    let mut body = body(json!("required"));
    body["parallel_tool_calls"] = json!(false);
    let message = &server.ok(CHAT, body).await["choices"][0]["message"];
    assert_eq!(calls(message), [("f".to_owned(), json!({"v": "q"}))]);
}

#[tokio::test]
async fn a_model_that_may_call_tools_need_not_and_one_that_shall_not_sees_none() {
    let server = server();
    for (choice, prompt) in [(json!("auto"), "f<tool_call>g<tool_call>w"), (json!("none"), "w")] {
        let answer = server.ok(CHAT, body(choice)).await;
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!("xyz"), &json!("stop"))
        );
        assert!(choice["message"].get("tool_calls").is_none());
        assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
    }
}

#[tokio::test]
async fn with_tools_a_schema_holds_for_the_answers_that_are_no_call() {
    let mut body = body(json!("auto"));
    body["response_format"] =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["xyz"]}}});
    let answer = server().ok(CHAT, body.clone()).await;
    let message = &answer["choices"][0]["message"];
    assert!(message["content"] == "\"xyz\"" || calls(message)[0].0 == "f", "{message}");
    body.as_object_mut().unwrap().remove("response_format");
    body["structured_outputs"] = json!({"choice": ["a"]});
    let (status, answer) = server().post(CHAT, body).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("structured_outputs.choice")));
}

#[tokio::test]
async fn a_conversation_with_calls_reaches_the_template_with_arguments_as_objects() {
    let call = |arguments: &str| json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}});
    let body = json!({
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call("{\"v\":  1}"), call("")]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        "temperature": 0,
    });
    let answer = server().ok(CHAT, body).await;
    assert_eq!(answer["usage"]["prompt_tokens"], "a{\"v\": 1}{}x".len());
    assert_eq!(answer["choices"][0]["message"]["content"], "yz");
}
