//! The binary with a small random model: `nibble generate` and `nibble serve`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const VOCABULARY: usize = 96;
const HIDDEN: usize = 32;
const HEAD_DIM: usize = 16;

/// A Llama of one layer with reproducible weights and a tokenizer of printable characters.
fn write_model(directory: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": HEAD_DIM, "max_position_embeddings": 128,
        "tie_word_embeddings": true, "torch_dtype": "float32", "eos_token_id": 95,
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let ids: serde_json::Map<String, Value> =
        (b' '..=b'~').enumerate().map(|(id, byte)| (char::from(byte).to_string(), id.into())).collect();
    let end = json!({
        "id": 95, "content": "<end>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    });
    let tokenizer = json!({
        "added_tokens": [end], "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    });
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        (layer("self_attn.q_proj"), vec![2 * HEAD_DIM, HIDDEN]),
        (layer("self_attn.k_proj"), vec![HEAD_DIM, HIDDEN]),
        (layer("self_attn.v_proj"), vec![HEAD_DIM, HIDDEN]),
        (layer("self_attn.o_proj"), vec![HIDDEN, 2 * HEAD_DIM]),
        (layer("mlp.gate_proj"), vec![HIDDEN, HIDDEN]),
        (layer("mlp.up_proj"), vec![HIDDEN, HIDDEN]),
        (layer("mlp.down_proj"), vec![HIDDEN, HIDDEN]),
    ];
    let mut state = 1_u64;
    let tensors = shapes.map(|(name, shape)| {
        let mut value = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| value().to_le_bytes()).collect();
        (name, shape, bytes)
    });
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

fn nibble(command: &str, model: &Path) -> Command {
    let mut nibble = Command::new(env!("CARGO_BIN_EXE_nibble"));
    nibble.arg(command).arg(model).args(["--threads", "1"]).env("RUST_LOG", "warn");
    nibble
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

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

/// A server that was started and said that it is ready.
struct Server {
    process: Child,
    output: BufReader<ChildStdout>,
    address: String,
}

impl Server {
    fn start(model: &Path) -> Self {
        let mut process = nibble("serve", model)
            .args(["--port", "0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let name = model.file_name().unwrap().to_str().unwrap();
        let address = line.trim().strip_prefix(&format!("serving {name} at http://")).unwrap().to_owned();
        Self { process, output, address }
    }

    fn post(&self, path: &str, body: &Value) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn serve_says_when_it_is_ready_answers_and_ends_in_order_when_told_to() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let mut server = Server::start(directory.path());
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
        (["--kv-cache-memory", "1KiB"], "raise --kv-cache-memory"),
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
