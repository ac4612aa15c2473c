//! A client that goes away: its sequences end with the step that runs.

use std::io::Read;
use std::net::TcpStream;

use http_body_util::BodyExt;
use nibble_engine::{EngineConfig, EngineStats};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::http2::Client;
use crate::support::{CHAT, COMPLETIONS, Options, Server, post, send_over_socket};

fn one_at_a_time() -> Options {
    Options {
        engine: EngineConfig { max_running_sequences: 1, ..EngineConfig::default() },
        ..Options::default()
    }
}

/// How a client asks, and goes away.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Over HTTP/1; it closes the connection.
    Connection,
    /// Over HTTP/2; it resets the stream, and the connection stays.
    Stream,
}

/// A request that was sent, and whatever has come of its answer.
enum Sent {
    Connection(TcpStream),
    Stream { answer: JoinHandle<()>, begun: oneshot::Receiver<()> },
}

impl Way {
    async fn send(self, address: &str, path: &str, body: &Value) -> Sent {
        if let Self::Connection = self {
            return Sent::Connection(send_over_socket(address, path, body));
        }
        let client = Client::connect(address).await;
        let request = post(path, body.to_string());
        let (say_begun, begun) = oneshot::channel();
        let answer = tokio::spawn(async move {
            let mut body = client.send(request).await.into_body();
            body.frame().await.expect("an answer").unwrap();
            say_begun.send(()).unwrap();
            while body.frame().await.is_some() {}
        });
        Sent::Stream { answer, begun }
    }
}

impl Sent {
    /// Waits until something of the answer has arrived.
    async fn begins(&mut self) {
        match self {
            Self::Connection(stream) => assert_ne!(stream.read(&mut [0; 64]).unwrap(), 0),
            Self::Stream { begun, .. } => begun.await.unwrap(),
        }
    }

    fn hang_up(self) {
        if let Self::Stream { answer, .. } = self {
            answer.abort();
        }
    }
}

/// Sends `body`, lets `steps` steps pass, hangs up while another runs, and lets that one pass, too: after it,
/// nothing may be left. Over HTTP/1 and HTTP/2. Returns how many tokens were generated.
async fn frees_its_sequences(options: Options, path: &str, body: &Value, steps: usize) -> u64 {
    let sequences = body["n"].as_u64().unwrap_or(1);
    let mut generated = 0;
    for way in [Way::Connection, Way::Stream] {
        let (server, gate) = Server::gated(options.clone());
        let address = server.listen().await;
        let mut sent = way.send(&address, path, body).await;
        gate.step_has_begun();
        let submitted = |stats: &EngineStats| (stats.running + stats.waiting) as u64 == sequences;
        server.eventually("all sequences are submitted", submitted).await;
        for _ in 0..steps {
            gate.let_go();
            gate.step_has_begun();
        }
        if body["stream"] == true && server.engine.stats().generation_tokens > 0 {
            // The hang-up is in the middle of the answer.
            sent.begins().await;
        }
        assert_eq!(server.engine.stats().running as u64, sequences);
        sent.hang_up();
        server.aborts_are_asked_for(sequences as usize).await;
        gate.let_go();
        server
            .eventually("the sequences are gone", |stats| {
                stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_used == 0
            })
            .await;
        let stats = server.engine.stats();
        assert_eq!((stats.finished.aborted, stats.steps), (sequences, steps as u64 + 1), "{way:?}");
        assert_eq!(stats.last_step_age, None, "idle again");
        generated += stats.generation_tokens;
    }
    generated
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_middle_of_a_stream() {
    let body = json!({"messages": [{"role": "user", "content": "a"}], "stream": true, "temperature": 0});
    assert_eq!(frees_its_sequences(Options::default(), CHAT, &body, 3).await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_whole_answer_is_decoded() {
    let body = json!({"prompt": "a", "temperature": 0});
    assert_eq!(frees_its_sequences(Options::default(), COMPLETIONS, &body, 3).await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_several_choices() {
    let body = json!({"prompt": "a", "n": 3, "temperature": 0});
    assert!(frees_its_sequences(Options::default(), COMPLETIONS, &body, 3).await >= 6);
    let body = json!({"prompt": "a", "n": 3, "temperature": 0, "stream": true});
    assert!(frees_its_sequences(Options::default(), COMPLETIONS, &body, 3).await >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_prefill() {
    for stream in [false, true] {
        let engine = EngineConfig { max_prefill_chunk_tokens: 8, ..EngineConfig::default() };
        let options = Options { engine, ..Options::default() };
        let body = json!({"messages": [{"role": "user", "content": "a".repeat(100)}], "stream": stream});
        assert_eq!(frees_its_sequences(options, CHAT, &body, 2).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_prompt_is_scored_or_embedded() {
    let text = "a".repeat(100);
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": text, "echo": true, "logprobs": 1, "max_tokens": 0})),
        (CHAT, json!({"messages": [{"role": "user", "content": text}], "prompt_logprobs": 2})),
        ("/v1/embeddings", json!({"input": text, "pooling": "mean"})),
    ] {
        let engine = EngineConfig { max_prefill_chunk_tokens: 8, ..EngineConfig::default() };
        let options = Options { engine, ..Options::default() };
        assert_eq!(frees_its_sequences(options, path, &body, 2).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_waiting_in_the_queue() {
    for (stream, way) in [false, true].into_iter().flat_map(|s| [(s, Way::Connection), (s, Way::Stream)]) {
        let (server, gate) = Server::gated(one_at_a_time());
        let address = server.listen().await;
        let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 2});
        let first = tokio::spawn({
            let server = server.clone();
            async move { server.ok(COMPLETIONS, body).await }
        });
        gate.step_has_begun();
        let second = json!({"prompt": "a", "stream": stream, "n": 2});
        let sent = way.send(&address, COMPLETIONS, &second).await;
        server.eventually("the second request waits", |stats| stats.waiting == 2).await;
        sent.hang_up();
        server.aborts_are_asked_for(2).await;
        gate.let_go();
        gate.step_has_begun();
        let stats = server.engine.stats();
        assert_eq!((stats.waiting, stats.running, stats.finished.aborted), (0, 1, 2));
        gate.let_go();
        assert_eq!(first.await.unwrap()["choices"][0]["text"], "bc");
        assert_eq!(server.engine.stats().steps, 2);
    }
}
