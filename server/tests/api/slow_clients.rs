//! Clients that send or read too slowly, too much, or too often.

use std::time::{Duration, Instant};

use nibble_server::{ConnectionLimits, ServeOptions, ServerOptions};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{COMPLETIONS, Options, Server, Serving, ask, send_over_socket};

/// Well above what a machine under load needs, well below what a test may take.
const SHORT: Duration = Duration::from_millis(300);

async fn serving(limits: ConnectionLimits) -> (Server, Serving) {
    let server = ServerOptions { body_timeout: SHORT, ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    let serving = server.serve(None, ServeOptions { connections: limits, ..ServeOptions::default() }).await;
    (server, serving)
}

/// What comes until the server closes the connection, and how long that took.
async fn rest(stream: &mut TcpStream) -> (String, Duration) {
    let started = Instant::now();
    let mut answer = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    // A reset says the same as an end.
    let _ = end.expect("the server closes the connection");
    (String::from_utf8(answer).unwrap(), started.elapsed())
}

#[tokio::test]
async fn a_head_that_does_not_end_and_an_idle_connection_are_closed() {
    let (_server, serving) = serving(ConnectionLimits { head_timeout: SHORT, ..Default::default() }).await;
    for beginning in ["", "GET /health HTTP/1.1\r\nhost: x\r\n"] {
        let mut stream = TcpStream::connect(&serving.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let (answer, elapsed) = rest(&mut stream).await;
        assert!(!answer.contains("200 OK") && elapsed >= SHORT / 2, "{answer} after {elapsed:?}");
    }
    let mut stream = TcpStream::connect(&serving.address).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (answer, elapsed) = rest(&mut stream).await;
    assert!(answer.contains("200 OK") && elapsed >= SHORT / 2, "{answer} after {elapsed:?}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_answered_with_408() {
    let (_server, serving) = serving(ConnectionLimits::default()).await;
    let mut stream = TcpStream::connect(&serving.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 100\r\n\r\n{\"prompt\":";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (answer, _) = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    let body: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["error"]["code"], "request_timeout");
    assert!(body["error"]["message"].as_str().unwrap().contains("0.3 seconds"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_takes_longer_than_the_body_may_is_none_of_its_business() {
    let server = ServerOptions { body_timeout: SHORT, ..ServerOptions::default() };
    let (server, gate) = Server::gated(Options { server, ..Options::default() });
    let address = server.listen().await;
    let request = tokio::task::spawn_blocking(move || {
        let body = json!({"prompt": "x", "temperature": 0, "max_tokens": 1});
        let mut stream = send_over_socket(&address, COMPLETIONS, &body);
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
        answer
    });
    gate.step_has_begun();
    tokio::time::sleep(2 * SHORT).await;
    gate.let_go();
    assert_eq!(&request.await.unwrap(), b"HTTP/1.1 200");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let (_server, serving) = serving(ConnectionLimits { head_bytes: 8 << 10, ..Default::default() }).await;
    let small = format!("GET /health?{}", "a".repeat(4 << 10));
    assert_eq!(ask(&serving.address, &small).await.0, 200);
    let large = format!("GET /health?{}", "a".repeat(9 << 10));
    assert_eq!(ask(&serving.address, &large).await.0, 431);
    let many: String = (0..200).map(|at| format!("\r\nx-{at}: 1")).collect();
    let mut stream = TcpStream::connect(&serving.address).await.unwrap();
    stream.write_all(format!("GET /health HTTP/1.1\r\nhost: x{many}\r\n\r\n").as_bytes()).await.unwrap();
    assert!(rest(&mut stream).await.0.starts_with("HTTP/1.1 431 "));
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let limits = ConnectionLimits { connections: 2, ..Default::default() };
    let (_server, serving) = serving(limits).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(&serving.address).await.unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert_ne!(stream.read(&mut [0; 16]).await.unwrap(), 0);
        held.push(stream);
    }
    let address = serving.address.clone();
    let waiting = tokio::spawn(async move { ask(&address, "GET /health").await.0 });
    tokio::time::sleep(SHORT).await;
    assert!(!waiting.is_finished(), "no place is free");
    assert_eq!(ask(&serving.admin, "GET /health").await.0, 200, "the admin address has places of its own");
    held.pop();
    assert_eq!(waiting.await.unwrap(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_given_up_and_its_sequences_end() {
    let limits = ConnectionLimits { write_timeout: SHORT, ..Default::default() };
    let (server, serving) = serving(limits).await;
    // Far more than the buffers of both sockets hold: 1024 choices, each with the echo of its prompt.
    let body = json!({"prompt": "a".repeat(200), "n": 1024, "stream": true, "max_tokens": 50, "ignore_eos": true, "logprobs": 20});
    let address = serving.address.clone();
    let stream =
        tokio::task::spawn_blocking(move || send_over_socket(&address, COMPLETIONS, &body)).await.unwrap();
    // What the client has not been sent when its connection is given up counts as aborted.
    let started = Instant::now();
    let aborted = "nibble:request_success_total{finished_reason=\"abort\"";
    while server.metric(aborted).await.expect("a counter") == 0.0 {
        assert!(started.elapsed() < Duration::from_secs(60), "the server waits for its client");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.eventually("nothing is left", |stats| stats.running == 0 && stats.waiting == 0).await;
    drop(stream);
}
