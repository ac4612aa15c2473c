//! HTTP/2: by prior knowledge and over TLS, with the limits of HTTP/1.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use http::{Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nibble_engine::EngineConfig;
use nibble_server::{ConnectionLimits, ServeOptions};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::files::{client_config, open, write_certificate};
use crate::support::{CHAT, COMPLETIONS, Options, PATIENCE, Server, Serving, ask, post};

/// Well above what a machine under load needs, well below what a test may take.
const SHORT: Duration = Duration::from_millis(300);

/// One connection; clones share it.
#[derive(Clone)]
pub(crate) struct Client {
    sender: SendRequest<Body>,
}

impl Client {
    /// Connects without a word about HTTP/1.
    pub(crate) async fn connect(address: &str) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap()).await
    }

    async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("a connection");
        tokio::spawn(connection);
        Self { sender }
    }

    /// The answer to a request, as soon as it begins. Dropping the future resets the request's stream.
    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        let mut sender = self.sender.clone();
        sender.ready().await.expect("the connection is there");
        let (mut head, body) = request.into_parts();
        head.uri = format!("http://localhost{}", head.uri.path()).parse().unwrap();
        let answer = sender.send_request(Request::from_parts(head, body)).await.expect("an answer");
        assert_eq!(answer.version(), Version::HTTP_2);
        answer
    }

    async fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.send(post(path, body.to_string())).await;
        assert_eq!(answer.status(), StatusCode::OK);
        serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    /// Waits until the server has ended the connection.
    async fn ended(&self) -> Duration {
        let started = Instant::now();
        while !self.sender.is_closed() {
            assert!(started.elapsed() < PATIENCE, "the server keeps the connection");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        started.elapsed()
    }
}

async fn serving(limits: ConnectionLimits) -> (Server, Serving) {
    let server = Server::new();
    let serving = server.serve(None, ServeOptions { connections: limits, ..ServeOptions::default() }).await;
    (server, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_versions_are_answered_at_one_address_whole_and_streamed() {
    let server = Server::new();
    let address = server.listen().await;
    let client = Client::connect(&address).await;
    let body = json!({"prompt": "u", "temperature": 0});
    assert_eq!(client.ok(COMPLETIONS, body).await["choices"][0]["text"], "vwxyz");
    let streamed = json!({"prompt": "u", "temperature": 0, "stream": true});
    let answer = client.send(post(COMPLETIONS, streamed.to_string())).await;
    let text = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(text.ends_with(b"data: [DONE]\n\n"), "{text:?}");
    assert_eq!(ask(&address, "GET /health").await.0, 200);
    // Far larger than a piece of an answer, and than the first window.
    let large = json!({"prompt": "a".repeat(200), "n": 200, "echo": true, "max_tokens": 40, "logprobs": 1,
                       "ignore_eos": true, "temperature": 0});
    let answer = client.ok(COMPLETIONS, large.clone()).await;
    assert_eq!(answer["choices"], server.ok(COMPLETIONS, large).await["choices"]);
    assert!(answer.to_string().len() > 1 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_share_a_connection() {
    let (_server, serving) = serving(ConnectionLimits { connections: 1, ..Default::default() }).await;
    let client = Client::connect(&serving.address).await;
    let asks = (0..40_u8).map(|at| {
        let client = client.clone();
        let letter = char::from(b'a' + at % 20);
        tokio::spawn(async move {
            let body = json!({"prompt": letter.to_string(), "temperature": 0, "max_tokens": 1});
            (letter, client.ok(COMPLETIONS, body).await)
        })
    });
    for asked in asks.collect::<Vec<_>>() {
        let (letter, answer) = asked.await.unwrap();
        assert_eq!(answer["choices"][0]["text"], char::from(letter as u8 + 1).to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_agrees_on_it() {
    let directory = tempfile::tempdir().unwrap();
    write_certificate(directory.path(), "localhost");
    let server = Server::new();
    let serving =
        server.serve(Some(Arc::new(open(directory.path()).unwrap())), ServeOptions::default()).await;
    let mut config = client_config(directory.path());
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(&serving.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let client = Client::over(stream).await;
    let body = json!({"prompt": "x", "temperature": 0});
    assert_eq!(client.ok(COMPLETIONS, body).await["choices"][0]["text"], "yz");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_of_a_connection_wait_for_a_place() {
    let (server, gate) = Server::gated(Options::default());
    let limits = ConnectionLimits { streams: 2, ..Default::default() };
    let serving = server.serve(None, ServeOptions { connections: limits, ..Default::default() }).await;
    let client = Client::connect(&serving.address).await;
    // The first answer brings the server's settings.
    assert_eq!(client.send(Request::get("/health").body(Body::empty()).unwrap()).await.status(), 200);
    let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 2});
    let ask = || {
        tokio::spawn({
            let (client, body) = (client.clone(), body.clone());
            async move { client.ok(COMPLETIONS, body).await }
        })
    };
    let first = [ask(), ask()];
    server.eventually("two run", |stats| stats.running + stats.waiting == 2).await;
    gate.step_has_begun();
    let third = ask();
    tokio::time::sleep(SHORT).await;
    let stats = server.engine.stats();
    assert_eq!(stats.running + stats.waiting, 2, "no place is free");
    drop(gate);
    for asked in first.into_iter().chain([third]) {
        assert_eq!(asked.await.unwrap()["choices"][0]["text"], "bc");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_stops_one_answer_and_leaves_the_others_of_its_connection_alone() {
    let (server, gate) = Server::gated(Options::default());
    let address = server.listen().await;
    let client = Client::connect(&address).await;
    let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 4});
    let kept = tokio::spawn({
        let (client, body) = (client.clone(), body.clone());
        async move { client.ok(COMPLETIONS, body).await }
    });
    gate.step_has_begun();
    let reset = tokio::spawn(async move { client.ok(COMPLETIONS, body).await });
    server.eventually("both are there", |stats| stats.running + stats.waiting == 2).await;
    gate.let_go();
    gate.step_has_begun();
    reset.abort();
    server.aborts_are_asked_for(1).await;
    gate.let_go();
    gate.step_has_begun();
    let stats = server.engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.finished.aborted), (1, 0, 1));
    drop(gate);
    assert_eq!(kept.await.unwrap()["choices"][0]["text"], "bcde");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let (_server, serving) = serving(ConnectionLimits { head_bytes: 8 << 10, ..Default::default() }).await;
    let client = Client::connect(&serving.address).await;
    for (bytes, status) in [(4 << 10, 200), (9 << 10, 431), (4 << 10, 200)] {
        let request = Request::get("/health").header("x-large", "a".repeat(bytes));
        assert_eq!(client.send(request.body(Body::empty()).unwrap()).await.status(), status, "{bytes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_begin_nothing_or_rest_are_closed() {
    let limits = ConnectionLimits { head_timeout: SHORT, write_timeout: SHORT, ..Default::default() };
    let (_server, serving) = serving(limits).await;
    for beginning in ["PRI * HTTP", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut stream = TcpStream::connect(&serving.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        // A reset says the same as an end.
        let _ = end.expect("the server closes the connection");
    }
    let client = Client::connect(&serving.address).await;
    client.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await;
    let rested = client.ended().await;
    assert!(rested >= SHORT / 2, "after {rested:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_with_an_answer_under_way_does_not_rest() {
    let (server, gate) = Server::gated(Options::default());
    let limits = ConnectionLimits { head_timeout: SHORT, write_timeout: SHORT, ..Default::default() };
    let serving = server.serve(None, ServeOptions { connections: limits, ..Default::default() }).await;
    for stream in [false, true] {
        let client = Client::connect(&serving.address).await;
        let body = json!({"prompt": "x", "temperature": 0, "max_tokens": 2, "stream": stream});
        let asked = tokio::spawn(async move {
            let answer = client.send(post(COMPLETIONS, body.to_string())).await;
            answer.into_body().collect().await.unwrap().to_bytes()
        });
        gate.step_has_begun();
        tokio::time::sleep(4 * SHORT).await;
        gate.let_go();
        gate.step_has_begun();
        tokio::time::sleep(4 * SHORT).await;
        gate.let_go();
        let text = String::from_utf8(asked.await.unwrap().to_vec()).unwrap();
        assert!(text.contains("\"y\"") || text.contains("\"yz\""), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_nobody_takes_is_given_up_and_the_others_of_its_connection_go_on() {
    let limits = ConnectionLimits { write_timeout: SHORT, ..Default::default() };
    let (server, serving) = serving(limits).await;
    let client = Client::connect(&serving.address).await;
    let body = json!({"prompt": "a".repeat(200), "n": 256, "stream": true, "max_tokens": 50, "ignore_eos": true,
                      "logprobs": 20});
    let untaken = client.send(post(COMPLETIONS, body.to_string())).await;
    let started = Instant::now();
    while server.metric("nibble:request_success_total{finished_reason=\"abort\"").await == Some(0.0) {
        assert!(started.elapsed() < PATIENCE, "the server waits for its client");
        let body = json!({"prompt": "x", "temperature": 0});
        assert_eq!(client.ok(COMPLETIONS, body).await["choices"][0]["text"], "yz");
    }
    server.eventually("nothing is left", |stats| stats.running == 0 && stats.waiting == 0).await;
    // What was sent can be read, then the stream breaks off.
    assert!(untaken.into_body().collect().await.is_err());
    client.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_told_to_stop_finishes_the_answers_of_its_connections() {
    let (server, gate) = Server::gated(Options {
        engine: EngineConfig { max_running_sequences: 1, ..EngineConfig::default() },
        ..Options::default()
    });
    let serving = server.serve(None, ServeOptions::default()).await;
    let client = Client::connect(&serving.address).await;
    let asks: Vec<_> = (0..2)
        .map(|_| {
            let client = client.clone();
            let body = json!({"messages": [{"role": "user", "content": "x"}], "temperature": 0});
            tokio::spawn(async move { client.ok(CHAT, body).await })
        })
        .collect();
    gate.step_has_begun();
    server.eventually("both are there", |stats| stats.running + stats.waiting == 2).await;
    assert_eq!(ask(&serving.admin, "POST /admin/drain").await.0, 202);
    drop(gate);
    for asked in asks {
        assert_eq!(asked.await.unwrap()["choices"][0]["message"]["content"], "yz");
    }
    serving.end.await.unwrap().unwrap();
    client.ended().await;
}
