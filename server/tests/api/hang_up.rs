//! A client that goes away: its sequences end with the step that runs.

use std::io::Read;

use nibble_engine::{EngineConfig, EngineStats};
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Gate, Options, Server, send_over_socket};

fn one_at_a_time() -> Options {
    Options {
        engine: EngineConfig { max_running_sequences: 1, ..EngineConfig::default() },
        ..Options::default()
    }
}

/// Sends `body`, lets `steps` steps pass, hangs up while another runs, and lets that one pass, too: after it,
/// nothing may be left.
async fn frees_its_sequences(server: &Server, gate: &Gate, path: &str, body: &Value, steps: usize) {
    let sequences = body["n"].as_u64().unwrap_or(1);
    let address = server.listen().await;
    let mut connection = send_over_socket(&address, path, body);
    gate.step_has_begun();
    let submitted = |stats: &EngineStats| (stats.running + stats.waiting) as u64 == sequences;
    server.eventually("all sequences are submitted", submitted).await;
    for _ in 0..steps {
        gate.let_go();
        gate.step_has_begun();
    }
    if body["stream"] == true {
        // Something has arrived: the hang-up is in the middle of the answer.
        assert_ne!(connection.read(&mut [0; 64]).unwrap(), 0);
    }
    assert_eq!(server.engine.stats().running as u64, sequences);
    drop(connection);
    server.aborts_are_asked_for(sequences as usize).await;
    gate.let_go();
    server
        .eventually("the sequences are gone", |stats| {
            stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_used == 0
        })
        .await;
    let stats = server.engine.stats();
    assert_eq!((stats.finished.aborted, stats.steps), (sequences, steps as u64 + 1));
    assert_eq!(stats.last_step_age, None, "idle again");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_middle_of_a_stream() {
    let (server, gate) = Server::gated(Options::default());
    let body = json!({"messages": [{"role": "user", "content": "a"}], "stream": true, "temperature": 0});
    frees_its_sequences(&server, &gate, CHAT, &body, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_whole_answer_is_decoded() {
    let (server, gate) = Server::gated(Options::default());
    frees_its_sequences(&server, &gate, COMPLETIONS, &json!({"prompt": "a", "temperature": 0}), 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_several_choices() {
    let (server, gate) = Server::gated(Options::default());
    let body = json!({"prompt": "a", "n": 3, "temperature": 0});
    frees_its_sequences(&server, &gate, COMPLETIONS, &body, 3).await;
    let (server, gate) = Server::gated(Options::default());
    let body = json!({"prompt": "a", "n": 3, "temperature": 0, "stream": true});
    frees_its_sequences(&server, &gate, COMPLETIONS, &body, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_prefill() {
    for stream in [false, true] {
        let engine = EngineConfig { max_prefill_chunk_tokens: 8, ..EngineConfig::default() };
        let (server, gate) = Server::gated(Options { engine, ..Options::default() });
        let body = json!({"messages": [{"role": "user", "content": "a".repeat(100)}], "stream": stream});
        frees_its_sequences(&server, &gate, CHAT, &body, 2).await;
        assert_eq!(server.engine.stats().generation_tokens, 0);
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
        let (server, gate) = Server::gated(Options { engine, ..Options::default() });
        frees_its_sequences(&server, &gate, path, &body, 2).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_waiting_in_the_queue() {
    for stream in [false, true] {
        let (server, gate) = Server::gated(one_at_a_time());
        let address = server.listen().await;
        let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 2});
        let first = tokio::spawn({
            let server = server.clone();
            async move { server.ok(COMPLETIONS, body).await }
        });
        gate.step_has_begun();
        let second = json!({"prompt": "a", "stream": stream, "n": 2});
        let connection = send_over_socket(&address, COMPLETIONS, &second);
        server.eventually("the second request waits", |stats| stats.waiting == 2).await;
        drop(connection);
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
