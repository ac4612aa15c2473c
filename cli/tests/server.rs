//! The binary with a small random model: `nibble generate` and `nibble serve`.

mod common;

use std::io::Read;
use std::path::Path;
use std::process::Output;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use common::{Server, nibble, text, write_model};

fn generate(model: &Path, options: &[&str]) -> Output {
    nibble("generate", model).args(["--prompt", "Hello", "--max-tokens", "8"]).args(options).output().unwrap()
}

#[test]
fn generate_prints_text_or_json_and_both_say_the_same() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let plain = generate(directory.path(), &[]);
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    let json: Value = serde_json::from_slice(&generate(directory.path(), &["--json"]).stdout).unwrap();
    assert_eq!(text(&plain.stdout).strip_suffix('\n'), json["text"].as_str());
    assert_eq!(json["prompt_tokens"], 5);
    let tokens = json["token_ids"].as_array().unwrap().len();
    let stopped = usize::from(json["finish_reason"] == "stop");
    assert_eq!(json["completion_tokens"], tokens + stopped);
    assert!(tokens > 0, "{json}");
}

#[test]
fn generate_uses_the_chat_template_when_there_is_one_unless_told_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let refused = generate(directory.path(), &["--chat"]);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("has no chat template"), "{}", text(&refused.stderr));
    let template = "{{ messages[0].role }}: {{ messages[0].content }}";
    std::fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
    let prompt_tokens = |options: &[&str]| {
        let output = generate(directory.path(), &[&["--json"], options].concat());
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["prompt_tokens"].clone()
    };
    assert_eq!(prompt_tokens(&[]), "user: Hello".len());
    assert_eq!(prompt_tokens(&["--raw"]), "Hello".len());
}

#[test]
fn serve_says_when_it_is_ready_answers_and_ends_in_order_when_told_to() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let mut server = Server::start(directory.path(), &[]);
    let expected: Value = serde_json::from_slice(&generate(directory.path(), &["--json"]).stdout).unwrap();
    let answer = server.post(
        "/v1/completions",
        &json!({"prompt": "Hello", "temperature": 0, "max_tokens": 8, "stream": true}),
    );
    let said: String = answer
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(said, expected["text"], "{answer}");
    let answer =
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Hi"}]}));
    assert!(answer.contains("no_chat_template"), "{answer}");
    let process = Pid::from_child(&server.process);
    kill_process(process, Signal::TERM).unwrap();
    assert!(server.process.wait().unwrap().success());
    let mut rest = String::new();
    server.output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "standard output holds the one line only");
}

#[test]
fn serve_refuses_what_cannot_work_before_it_loads_the_model() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (options, problem) in [
        (["--port", port.as_str()], "cannot listen on 127.0.0.1"),
        (["--max-model-len", "129"], "expected from 2 to 128"),
        (["--kv-cache-memory", "500"], "raise --kv-cache-memory"),
        (["--kv-cache-memory", "many"], "is not known"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
    ] {
        let port_unless_given = if options[0] == "--port" { vec![] } else { vec!["--port", "0"] };
        let output =
            nibble("serve", directory.path()).args(port_unless_given).args(options).output().unwrap();
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(problem), "{options:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn serve_refuses_keys_certificates_and_addresses_that_cannot_work() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "# no key\n").unwrap();
    let empty = empty.to_str().unwrap();
    for (options, problem) in [
        (&["--api-key-file", "/nonexistent"][..], "/nonexistent: the API keys cannot be read"),
        (&["--api-key-file", empty], "the file holds no API key"),
        (&["--api-key", ""], "an API key is empty"),
        (&["--tls-certificate", empty], "--tls-key"),
        (&["--tls-certificate", empty, "--tls-key", empty], "expected certificates in PEM form"),
        (&["--admin-address", "0.0.0.0:0"], "give --api-key-file or --api-key"),
        (&["--admin-address", "nowhere"], "cannot listen on nowhere"),
        (&["--metrics-on-admin-only"], "--admin-address"),
        (&["--otlp-endpoint", "localhost:4317"], "expected a URL such as http://localhost:4318"),
        (&["--max-connections", "0"], "--max-connections"),
        (&["--stuck-timeout", "0"], "--stuck-timeout"),
    ] {
        let output = nibble("serve", directory.path()).args(["--port", "0"]).args(options).output().unwrap();
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(problem), "{options:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn serve_takes_keys_from_a_file_reads_them_again_and_ends_when_the_admin_says_so() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let keys = directory.path().join("keys");
    std::fs::write(&keys, "old\n").unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let keys_file = keys.to_str().unwrap();
    let mut server =
        Server::start(directory.path(), &["--api-key-file", keys_file, "--admin-address", &free]);
    assert!(server.request("GET /v1/models", "authorization: Bearer old\r\n").starts_with("HTTP/1.1 200"));
    std::fs::write(&keys, "team:new\n").unwrap();
    kill_process(Pid::from_child(&server.process), Signal::HUP).unwrap();
    let started = std::time::Instant::now();
    while !server.request("GET /v1/models", "authorization: Bearer new\r\n").starts_with("HTTP/1.1 200") {
        assert!(started.elapsed().as_secs() < 60, "the keys are not read again");
    }
    assert!(server.request("GET /v1/models", "authorization: Bearer old\r\n").starts_with("HTTP/1.1 401"));
    assert!(common::request(&free, "POST /admin/drain", "").starts_with("HTTP/1.1 202"));
    assert!(server.process.wait().unwrap().success());
}
