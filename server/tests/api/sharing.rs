//! What requests of several tenants, and of several priorities, do to each other.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use nibble_engine::EngineConfig;
use nibble_server::{ApiKeys, ServerOptions};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::support::{COMPLETIONS, Options, Server};

fn options(server: ServerOptions, max_waiting_requests: usize) -> Options {
    let engine = EngineConfig { max_running_sequences: 1, max_waiting_requests, ..Default::default() };
    Options { engine, server, ..Options::default() }
}

/// Sends a request and waits until it waits in the engine as the `waiting`th.
async fn queue(server: &Server, key: &str, mut body: Value, waiting: usize) -> JoinHandle<String> {
    body["temperature"] = json!(0);
    let request = Request::post(COMPLETIONS)
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"))
        .body(Body::from(body.to_string()))
        .unwrap();
    let sent = tokio::spawn({
        let server = server.clone();
        async move {
            let (status, _, body) = server.send(request).await;
            format!("{status} {body}")
        }
    });
    server.eventually("it waits", |stats| stats.waiting == waiting).await;
    sent
}

#[tokio::test(flavor = "multi_thread")]
async fn the_full_queue_of_one_tenant_refuses_no_other() {
    let api_keys = Arc::new(ApiKeys::new(&["one".to_owned(), "two".to_owned()], None).unwrap());
    let (server, gate) = Server::gated(options(ServerOptions { api_keys, ..ServerOptions::default() }, 1));
    let body = json!({"prompt": "x"});
    let running = queue(&server, "one", body.clone(), 0).await;
    gate.step_has_begun();
    let waiting = queue(&server, "one", body.clone(), 1).await;
    let refused = queue(&server, "one", body.clone(), 1).await.await.unwrap();
    assert!(refused.starts_with("429"), "{refused}");
    let other = queue(&server, "two", body, 2).await;
    drop(gate);
    for accepted in [running, waiting, other] {
        let answer = accepted.await.unwrap();
        assert!(answer.starts_with("200"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_priority_takes_the_place_of_one_without_where_that_is_allowed() {
    let server = Server::new();
    let body = json!({"prompt": "x", "priority": -1});
    let (status, refused) = server.post(COMPLETIONS, body).await;
    assert_eq!((status.as_u16(), &refused["error"]["param"]), (400, &json!("priority")));
    assert!(refused["error"]["message"].as_str().unwrap().contains("--scheduling-policy"), "{refused}");

    let allowed = ServerOptions { priorities: true, ..ServerOptions::default() };
    let (server, gate) = Server::gated(options(allowed, 10));
    let plain = queue(&server, "", json!({"prompt": "a", "max_tokens": 8}), 0).await;
    gate.step_has_begun();
    let urgent = queue(&server, "", json!({"prompt": "b", "max_tokens": 8, "priority": -1}), 1).await;
    drop(gate);
    for (sent, expected) in [(plain, "bcdefghi"), (urgent, "cdefghij")] {
        let answer = sent.await.unwrap();
        assert!(answer.contains(expected), "{answer}");
    }
    server.eventually("one made way", |stats| stats.preemptions == 1).await;
}
