//! A small random model on disk, and the binary run with it.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

pub(crate) const VOCABULARY: usize = 96;
pub(crate) const HIDDEN: usize = 32;
pub(crate) const HEAD_DIM: usize = 16;

/// A Llama of one layer with reproducible weights and a tokenizer of printable characters.
pub(crate) fn write_model(directory: &Path) {
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

pub(crate) fn nibble(command: &str, model: &Path) -> Command {
    let mut nibble = Command::new(env!("CARGO_BIN_EXE_nibble"));
    nibble.arg(command).arg(model).args(["--threads", "1"]).env("RUST_LOG", "warn");
    nibble
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The whole answer of `address` to a request without a body; `headers` end with line breaks.
pub(crate) fn request(address: &str, line: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A server that was started and said that it is ready.
pub(crate) struct Server {
    pub(crate) process: Child,
    pub(crate) output: BufReader<ChildStdout>,
    pub(crate) address: String,
}

impl Server {
    pub(crate) fn start(model: &Path, options: &[&str]) -> Self {
        let mut process = nibble("serve", model)
            .args(["--port", "0"])
            .args(options)
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

    /// The whole answer to a request without a body; `headers` end with line breaks.
    pub(crate) fn request(&self, line: &str, headers: &str) -> String {
        request(&self.address, line, headers)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> String {
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
