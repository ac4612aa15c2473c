//! Health, metrics, keys, limits, the end of a server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use nibble_engine::{EngineConfig, Health};
use nibble_server::{ApiKeys, ServeOptions, ServerOptions};
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Options, Server, post};

#[tokio::test]
async fn an_idle_server_is_healthy_and_ready_and_names_its_model() {
    let server = Server::new();
    assert_eq!(server.get("/health").await, (200.try_into().unwrap(), json!({"status": "ok"}).to_string()));
    assert_eq!(server.get("/ready").await.0, 200);
    let models: Value = serde_json::from_str(&server.get("/v1/models").await.1).unwrap();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("alphabet")));
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/alphabet").await.0, 200);
    assert!(server.get("/version").await.1.contains(env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn a_dead_engine_is_not_healthy_and_refuses_requests() {
    let server = Server::with(Options { failing_step: Some(0), ..Options::default() });
    for _ in 0..2 {
        let (status, body) = server.post(COMPLETIONS, json!({"prompt": "a"})).await;
        assert_eq!((status.as_u16(), &body["error"]["code"]), (503, &json!("service_unavailable")));
        assert!(body["error"]["message"].as_str().unwrap().contains("the device is gone"), "{body}");
    }
    for path in ["/health", "/ready"] {
        let (status, body) = server.get(path).await;
        assert!(status == 503 && body.contains("failed") && body.contains("the device is gone"), "{body}");
    }
    assert_eq!(server.metric("nibble:request_success_total{finished_reason=\"error\"").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_server_is_alive_but_not_ready_and_finishes_what_it_accepted() {
    let (server, gate) = Server::gated(Options::default());
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await }
    });
    gate.step_has_begun();
    server.engine.drain(Instant::now() + Duration::from_secs(60));
    assert_eq!(server.get("/health").await.0, 200);
    assert_eq!(server.get("/ready").await.0, 503);
    let (status, body) = server.post(COMPLETIONS, json!({"prompt": "a"})).await;
    assert_eq!(status, 503, "{body}");
    drop(gate);
    assert_eq!(running.await.unwrap()["choices"][0]["text"], "yz");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_finished_at_the_drain_deadline_gets_an_error() {
    let (server, gate) = Server::gated(Options::default());
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.post(COMPLETIONS, json!({"prompt": "a", "temperature": 0})).await }
    });
    gate.step_has_begun();
    server.engine.drain(Instant::now());
    drop(gate);
    let (status, body) = running.await.unwrap();
    assert_eq!(status, 503);
    assert!(body["error"]["message"].as_str().unwrap().contains("stopped before"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_whose_step_does_not_end_is_not_healthy_until_it_does() {
    let server = ServerOptions { stuck_after: Duration::from_millis(20), ..ServerOptions::default() };
    let (server, gate) = Server::gated(Options { server, ..Options::default() });
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await }
    });
    gate.step_has_begun();
    tokio::time::sleep(Duration::from_millis(30)).await;
    for path in ["/health", "/ready"] {
        let (status, body) = server.get(path).await;
        assert!(status == 503 && body.contains("stuck"), "{body}");
    }
    drop(gate);
    running.await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(server.get("/health").await.0, 200, "idle is healthy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    let engine =
        EngineConfig { max_running_sequences: 1, max_waiting_requests: 1, ..EngineConfig::default() };
    let (server, gate) = Server::gated(Options { engine, ..Options::default() });
    let body = json!({"prompt": "x", "temperature": 0});
    let mut accepted = Vec::new();
    for waiting in [0, 1] {
        accepted.push(tokio::spawn({
            let server = server.clone();
            let body = body.clone();
            async move { server.ok(COMPLETIONS, body).await }
        }));
        if waiting == 0 {
            gate.step_has_begun();
        }
        server
            .eventually("one runs, one waits", |stats| (stats.running, stats.waiting) == (1, waiting))
            .await;
    }
    let (status, headers, body) = server.send(post(COMPLETIONS, body.to_string())).await;
    assert_eq!((status.as_u16(), headers["retry-after"].to_str().unwrap()), (429, "1"));
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    drop(gate);
    for accepted in accepted {
        assert_eq!(accepted.await.unwrap()["choices"][0]["text"], "yz");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_request_that_does_not_fit_into_the_queue_nothing_runs() {
    let engine =
        EngineConfig { max_running_sequences: 1, max_waiting_requests: 2, ..EngineConfig::default() };
    let (server, gate) = Server::gated(Options { engine, ..Options::default() });
    let (status, body) = server.post(COMPLETIONS, json!({"prompt": "a", "n": 5})).await;
    assert_eq!(status, 429, "{body}");
    drop(gate);
    server.eventually("nothing is left", |stats| stats.running == 0 && stats.waiting == 0).await;
}

#[tokio::test]
async fn buckets_count_everything_below_them() {
    let server = Server::new();
    server.ok(COMPLETIONS, json!({"prompt": "abcdefghijx", "temperature": 0})).await;
    // One step of 11 tokens, two of 1.
    for (bound, count) in [("1", 2.0), ("8", 2.0), ("16", 3.0), ("16384", 3.0), ("+Inf", 3.0)] {
        let (_, body) = server.get("/metrics").await;
        let bound = format!("le=\"{bound}\"");
        let line = body
            .lines()
            .find(|l| l.starts_with("nibble:iteration_tokens_total_bucket") && l.contains(&bound));
        assert!(line.unwrap().ends_with(&format!(" {count}")), "{bound}: {line:?}");
    }
}

#[tokio::test]
async fn every_address_but_health_needs_a_key_when_there_are_keys() {
    let api_keys = ApiKeys::new(&["one".to_owned(), "two".to_owned()], None).unwrap();
    let server = ServerOptions { api_keys: Arc::new(api_keys), ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    let get = |path: &str, key: Option<&str>| {
        let request = Request::get(path);
        let request = key.into_iter().fold(request, |request, key| request.header("authorization", key));
        request.body(Body::empty()).unwrap()
    };
    for path in ["/v1/models", "/metrics", "/version", "/nothing"] {
        for key in [None, Some("Bearer three"), Some("Bearer "), Some("one"), Some("Bearer onetwo")] {
            let (status, headers, body) = server.send(get(path, key)).await;
            assert!(status == 401 && headers.contains_key("www-authenticate"), "{path} {key:?}: {body}");
            assert!(body.contains("invalid_api_key"));
        }
    }
    let (status, ..) = server.send(post(CHAT, "{}")).await;
    assert_eq!(status, 401);
    for key in ["Bearer one", "bearer two"] {
        assert_eq!(server.send(get("/v1/models", Some(key))).await.0, 200);
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).await.0, 200);
    }
}

#[tokio::test]
async fn a_request_keeps_the_id_that_it_brings_if_it_is_a_plain_word() {
    let server = Server::new();
    for (given, kept) in [("abc-1", true), ("two words", false), (&"x".repeat(200), false)] {
        let request = Request::get("/version").header("x-request-id", given).body(Body::empty()).unwrap();
        let (_, headers, _) = server.send(request).await;
        assert_eq!(headers["x-request-id"] == given, kept, "{given}");
    }
    let mut request = post(COMPLETIONS, json!({"prompt": "x"}).to_string());
    request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
    assert!(server.send(request).await.2.contains("\"cmpl-mine\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_engine_dies_ends_with_an_error() {
    let server = Server::with(Options { failing_step: Some(0), ..Options::default() });
    let serving = server.serve(None, ServeOptions::default()).await.end;
    server.post(COMPLETIONS, json!({"prompt": "a"})).await;
    let error = serving.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("the device is gone"), "{error}");
    assert!(matches!(server.engine.health(), Health::Failed { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_hangs_fails_open_requests_and_ends_the_server_with_an_error() {
    let (server, gate) = Server::gated(Options::default());
    let stuck_timeout = Duration::from_millis(500);
    let serving = server.serve(None, ServeOptions { stuck_timeout, ..ServeOptions::default() }).await;
    let body = json!({"prompt": "a", "temperature": 0});
    let whole = tokio::spawn({
        let (server, body) = (server.clone(), body.clone());
        async move { server.post(COMPLETIONS, body).await }
    });
    gate.step_has_begun();
    gate.let_go();
    gate.step_has_begun();
    let streamed = tokio::spawn({
        let (server, body) = (server.clone(), body.clone());
        async move { server.stream(COMPLETIONS, body).await }
    });
    let error = serving.end.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("has not finished a step"), "{error}");
    let (status, body) = whole.await.unwrap();
    assert_eq!((status.as_u16(), &body["error"]["code"]), (503, &json!("service_unavailable")));
    let last = streamed.await.unwrap().pop().unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("has not finished a step"), "{last}");
    let (status, _) = server.post(COMPLETIONS, json!({"prompt": "b"})).await;
    assert_eq!(status, 503, "later ones do not wait for ever");
    drop(gate);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_does_not_hang_and_a_slow_step_below_the_timeout_is_none() {
    let (server, gate) = Server::gated(Options::default());
    let stuck_timeout = Duration::from_millis(600);
    let serving = server.serve(None, ServeOptions { stuck_timeout, ..ServeOptions::default() }).await;
    tokio::time::sleep(Duration::from_millis(900)).await;
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "max_tokens": 4})).await }
    });
    for _ in 0..4 {
        gate.step_has_begun();
        tokio::time::sleep(Duration::from_millis(250)).await;
        gate.let_go();
    }
    running.await.unwrap();
    assert!(!serving.end.is_finished(), "four steps took more than the timeout together, none alone");
}
