//! Spans of requests, as a collector gets them.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post as route_post;
use nibble_server::{ServerOptions, Traces};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::support::{COMPLETIONS, Options, Server, post, send_over_socket};

/// A collector: its URL, and the spans that it gets.
async fn collector() -> (String, UnboundedReceiver<Span>) {
    let (sender, spans) = unbounded_channel();
    let take = async move |headers: HeaderMap, body: Bytes| {
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        for resource in request.resource_spans {
            let name = &resource.resource.unwrap().attributes;
            assert!(name.iter().any(|attribute| attribute.key == "service.name"));
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                sender.send(span).unwrap();
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/v1/traces", route_post(take));
    tokio::spawn(axum::serve(listener, router).into_future());
    (url, spans)
}

/// The next span that the collector gets.
async fn next(spans: &mut UnboundedReceiver<Span>) -> Span {
    tokio::time::timeout(Duration::from_secs(5), spans.recv()).await.expect("a span in time").unwrap()
}

fn attribute(span: &Span, name: &str) -> Option<AnyValue> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    attribute.value.clone()?.value
}

fn integer(span: &Span, name: &str) -> i64 {
    match attribute(span, name) {
        Some(AnyValue::IntValue(value)) => value,
        other => panic!("{name} is {other:?}"),
    }
}

fn seconds(span: &Span, name: &str) -> f64 {
    match attribute(span, name) {
        Some(AnyValue::DoubleValue(value)) => value,
        other => panic!("{name} is {other:?}"),
    }
}

async fn flush(traces: &Arc<Traces>) {
    let traces = Arc::clone(traces);
    tokio::task::spawn_blocking(move || traces.shut_down()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_is_a_span_within_the_clients_trace() {
    let (url, mut spans) = collector().await;
    let traces = Arc::new(Traces::export_to(&url).unwrap());
    let server = ServerOptions { traces: Some(Arc::clone(&traces)), ..ServerOptions::default() };
    let (server, gate) = Server::gated(Options { server, ..Options::default() });
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "max_tokens": 1})).await }
    });
    gate.step_has_begun();
    let queued = tokio::spawn({
        let server = server.clone();
        async move {
            let body = json!({"prompt": "abw", "temperature": 0, "n": 2, "max_tokens": 7});
            let mut request = post(COMPLETIONS, body.to_string());
            let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            request.headers_mut().insert("traceparent", parent.parse().unwrap());
            request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
            server.send(request).await
        }
    });
    server.eventually("both choices wait", |stats| stats.waiting == 2).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(gate);
    assert_eq!(queued.await.unwrap().0, 200);
    running.await.unwrap();
    flush(&traces).await;
    let mut found = [next(&mut spans).await, next(&mut spans).await];
    found.sort_by_key(|span| integer(span, "gen_ai.usage.prompt_tokens"));
    let [alone, span] = &found[..] else { panic!("{} spans", found.len()) };
    assert_eq!(alone.parent_span_id, Vec::<u8>::new(), "a trace of its own");
    assert_eq!(span.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(span.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert_eq!(span.name, "llm_request");
    assert_eq!(attribute(span, "gen_ai.request.id"), Some(AnyValue::StringValue("mine".to_owned())));
    assert_eq!(attribute(span, "gen_ai.response.model"), Some(AnyValue::StringValue("alphabet".to_owned())));
    for (name, expected) in [
        ("gen_ai.request.max_tokens", 7),
        ("gen_ai.request.n", 2),
        ("gen_ai.usage.num_sequences", 2),
        ("gen_ai.usage.prompt_tokens", 3),
        // "xyz" and the end, twice.
        ("gen_ai.usage.completion_tokens", 8),
    ] {
        assert_eq!(integer(span, name), expected, "{name}");
    }
    let queue = seconds(span, "gen_ai.latency.time_in_queue");
    let first_token = seconds(span, "gen_ai.latency.time_to_first_token");
    let whole = seconds(span, "gen_ai.latency.e2e");
    assert!(0.05 <= queue && queue <= first_token && first_token <= whole, "{queue} {first_token} {whole}");
    let duration = (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e9;
    assert!((duration - whole).abs() < 1e-3, "{duration} {whole}");
    assert!(seconds(alone, "gen_ai.latency.time_in_queue") < 0.05);
    assert_eq!(span.status.as_ref().map_or(0, |status| status.code), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_client_left_has_a_span_with_an_error() {
    let (url, mut spans) = collector().await;
    let traces = Arc::new(Traces::export_to(&url).unwrap());
    let server = ServerOptions { traces: Some(Arc::clone(&traces)), ..ServerOptions::default() };
    let (server, gate) = Server::gated(Options { server, ..Options::default() });
    let address = server.listen().await;
    let connection = send_over_socket(&address, COMPLETIONS, &json!({"prompt": "a"}));
    gate.step_has_begun();
    drop(connection);
    server.aborts_are_asked_for(1).await;
    drop(gate);
    // The metric is counted just before the span is made.
    tokio::time::sleep(Duration::from_millis(20)).await;
    flush(&traces).await;
    let span = next(&mut spans).await;
    assert_eq!(span.status.as_ref().unwrap().message, "the client went away");
    assert_eq!(attribute(&span, "gen_ai.latency.time_to_first_token"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_requests_are_answered_all_the_same() {
    let traces = Arc::new(Traces::export_to("http://127.0.0.1:9").unwrap());
    let server = ServerOptions { traces: Some(Arc::clone(&traces)), ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    let answer = server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await;
    assert_eq!(answer["choices"][0]["text"], "yz");
    flush(&traces).await;
}
