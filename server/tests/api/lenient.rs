//! A server that ignores the fields it does not know.

use axum::http::StatusCode;
use nibble_server::ServerOptions;
use serde_json::json;

use crate::support::{CHAT, COMPLETIONS, Options, Server, post};

#[tokio::test]
async fn unknown_fields_are_ignored_and_named_in_the_answer() {
    let server = ServerOptions { ignore_unknown_fields: true, ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    for stream in [false, true] {
        let body = json!({
            "prompt": "x", "temperature": 0, "stream": stream, "frobnicate": 1, "best_of": 3, "user": "me",
        });
        let (status, headers, body) = server.send(post(COMPLETIONS, body.to_string())).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        assert_eq!(headers["x-nibble-ignored-fields"], "frobnicate, best_of");
    }
    let body = json!({"prompt": "x", "temperature": 0});
    let (_, headers, _) = server.send(post(COMPLETIONS, body.to_string())).await;
    assert!(!headers.contains_key("x-nibble-ignored-fields"), "nothing was ignored");
}

#[tokio::test]
async fn known_fields_with_wrong_values_are_refused_all_the_same() {
    let server = ServerOptions { ignore_unknown_fields: true, ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    let messages = json!([{"role": "user", "content": "x"}]);
    let (status, body) = server.post(CHAT, json!({"messages": messages, "temperature": "hot", "a": 1})).await;
    assert_eq!((status, &body["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("temperature")));
}
