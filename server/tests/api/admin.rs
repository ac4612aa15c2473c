//! The admin address, and what it leaves to the API's.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use nibble_server::{ApiKeys, ServeOptions, ServerOptions};
use serde_json::json;
use tower::ServiceExt;

use crate::support::{COMPLETIONS, Options, Server, ask};

fn with(server: ServerOptions) -> Server {
    Server::with(Options { server, ..Options::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_finishes_what_was_accepted_and_ends_the_server() {
    let (server, gate) = Server::gated(Options::default());
    let serving = server.serve(None, ServeOptions::default()).await;
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await }
    });
    gate.step_has_begun();
    assert_eq!(ask(&serving.address, "POST /admin/drain").await.0, 404, "only at the admin address");
    let (status, body) = ask(&serving.admin, "POST /admin/drain").await;
    assert!(status == 202 && body.contains("draining"), "{body}");
    while ask(&serving.admin, "GET /ready").await.0 != 503 {}
    assert_eq!(ask(&serving.admin, "GET /health").await.0, 200, "alive until the end");
    assert!(!serving.end.is_finished());
    drop(gate);
    assert_eq!(running.await.unwrap()["choices"][0]["text"], "yz");
    serving.end.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_prompt_that_was_in_the_prefix_cache_is_not_after_a_reset() {
    let server = Server::new();
    let serving = server.serve(None, ServeOptions::default()).await;
    let hits_of_a_request = async || {
        let before = server.engine.stats().prefix_cache_hits;
        server.ok(COMPLETIONS, json!({"prompt": "x".repeat(40), "max_tokens": 1})).await;
        server.engine.stats().prefix_cache_hits - before
    };
    assert_eq!(hits_of_a_request().await, 0);
    assert_eq!(hits_of_a_request().await, 32);
    let reset = "POST /admin/reset_prefix_cache";
    assert_eq!(ask(&serving.address, reset).await.0, 404, "only at the admin address");
    assert_eq!(hits_of_a_request().await, 32);
    let (status, body) = ask(&serving.admin, reset).await;
    assert!(status == 200 && body.contains("reset"), "{body}");
    assert_eq!(hits_of_a_request().await, 0, "forgotten");
    assert_eq!(hits_of_a_request().await, 32, "and known again");
}

#[tokio::test]
async fn metrics_may_be_at_the_admin_address_alone() {
    let server = with(ServerOptions { metrics_on_admin_only: true, ..ServerOptions::default() });
    let serving = server.serve(None, ServeOptions::default()).await;
    assert_eq!(ask(&serving.address, "GET /metrics").await.0, 404);
    let (status, body) = ask(&serving.admin, "GET /metrics").await;
    assert!(status == 200 && body.contains("nibble:num_requests_running"));
    assert_eq!(ask(&serving.admin, "POST /v1/completions").await.0, 404, "no API there");
    assert_eq!(ask(&serving.admin, "GET /admin/drain").await.0, 405);
}

#[tokio::test]
async fn the_admin_address_demands_a_key_if_told_to_and_refuses_web_pages() {
    let api_keys = Arc::new(ApiKeys::new(&["one".to_owned()], None).unwrap());
    for admin_needs_key in [false, true] {
        let api_keys = Arc::clone(&api_keys);
        let server = with(ServerOptions { api_keys, admin_needs_key, ..ServerOptions::default() });
        let status = async |headers: &[(&'static str, &'static str)]| {
            let request = Request::post("/admin/drain");
            let request =
                headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
            let request = request.body(Body::empty()).unwrap();
            server.service.admin_router().oneshot(request).await.unwrap().status().as_u16()
        };
        assert_eq!(status(&[]).await, if admin_needs_key { 401 } else { 202 });
        assert_eq!(status(&[("authorization", "Bearer one")]).await, 202);
        let page = [("authorization", "Bearer one"), ("origin", "http://evil.example")];
        assert_eq!(status(&page).await, 403);
        let health = Request::get("/health").body(Body::empty()).unwrap();
        assert_eq!(server.service.admin_router().oneshot(health).await.unwrap().status(), 200);
    }
}
