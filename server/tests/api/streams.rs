//! Answers as events.

use std::time::Duration;

use nibble_server::ServerOptions;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Options, Server, post};

fn texts(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
}

fn contents(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect()
}

#[tokio::test]
async fn a_chat_streams_role_then_text_then_the_end() {
    let body = json!({"messages": [{"role": "user", "content": "w"}], "temperature": 0});
    let events = Server::new().stream(CHAT, body).await;
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(contents(&events), ["", "x", "y", "z"]);
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    assert!(events.iter().all(|event| event["id"] == events[0]["id"] && event.get("usage").is_none()));
    assert!(events[..events.len() - 1].iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
}

#[tokio::test]
async fn usage_comes_last_on_demand() {
    let body = json!({"prompt": "w", "temperature": 0, "stream_options": {"include_usage": true}});
    let events = Server::new().stream(COMPLETIONS, body).await;
    assert_eq!(texts(&events).concat(), "xyz");
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], json!({"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}));
}

#[tokio::test]
async fn usage_comes_with_each_chunk_on_demand() {
    let body = json!({"prompt": "w", "temperature": 0, "stream_options": {"continuous_usage_stats": true}});
    let events = Server::new().stream(COMPLETIONS, body).await;
    let tokens: Vec<&Value> = events.iter().map(|event| &event["usage"]["completion_tokens"]).collect();
    assert_eq!(tokens, [1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_waits_shows_that_it_is_alive() {
    let server = ServerOptions { keep_alive: Duration::from_millis(5), ..ServerOptions::default() };
    let (server, gate) = Server::gated(Options { server, ..Options::default() });
    let body = json!({"prompt": "y", "temperature": 0, "stream": true}).to_string();
    let answer = tokio::spawn({
        let server = server.clone();
        async move { server.send(post(COMPLETIONS, body)).await.2 }
    });
    gate.step_has_begun();
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(gate);
    let answer = answer.await.unwrap();
    assert!(answer.starts_with(": still working\n\n") && answer.ends_with("data: [DONE]\n\n"), "{answer}");
}

#[tokio::test]
async fn a_character_comes_whole() {
    let events = Server::new().stream(COMPLETIONS, json!({"prompt": "!", "temperature": 0})).await;
    assert_eq!(texts(&events), ["🦀", ""]);
}

#[tokio::test]
async fn the_beginning_of_a_stop_string_is_held_back() {
    let server = Server::new();
    let events = server.stream(COMPLETIONS, json!({"prompt": "a", "stop": "defg", "temperature": 0})).await;
    assert_eq!(texts(&events), ["b", "c", ""]);
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], "defg");
    let body = json!({"prompt": "a", "stop": "dex", "max_tokens": 6, "temperature": 0});
    assert_eq!(texts(&server.stream(COMPLETIONS, body).await), ["b", "c", "def", "g", ""]);
    let body = json!({"prompt": "a", "stop": "dex", "max_tokens": 4, "temperature": 0});
    assert_eq!(texts(&server.stream(COMPLETIONS, body).await), ["b", "c", "de"]);
}

#[tokio::test]
async fn a_stream_is_the_whole_answer_in_pieces() {
    let server = Server::new();
    for options in [json!({}), json!({"n": 3, "logprobs": 2}), json!({"stop": ["j?"], "echo": true})] {
        let mut body = json!({"prompt": ["a", "!"], "temperature": 3, "seed": 5, "max_tokens": 40});
        body.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let whole = server.ok(COMPLETIONS, body.clone()).await;
        let events = server.stream(COMPLETIONS, body).await;
        for choice in whole["choices"].as_array().unwrap() {
            let parts: Vec<&Value> = events
                .iter()
                .map(|event| &event["choices"][0])
                .filter(|part| part["index"] == choice["index"])
                .collect();
            let text: String = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"]);
            assert_eq!(parts.last().unwrap()["finish_reason"], choice["finish_reason"]);
            let column = |name: &str| -> Vec<Value> {
                let columns = parts.iter().filter_map(|part| part["logprobs"][name].as_array());
                columns.flatten().cloned().collect()
            };
            if let Some(logprobs) = choice["logprobs"].as_object() {
                for (name, values) in logprobs {
                    assert_eq!(&json!(column(name)), values, "{name}");
                }
            }
        }
    }
}

#[tokio::test]
async fn an_error_inside_a_stream_is_an_event() {
    let server = Server::with(Options { failing_step: Some(2), ..Options::default() });
    let events = server.stream(COMPLETIONS, json!({"prompt": "a", "temperature": 0})).await;
    assert_eq!(texts(&events), ["b", "c"]);
    let error = &events.last().unwrap()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("service_unavailable")));
    assert!(error["message"].as_str().unwrap().contains("the device is gone"), "{error}");
}
