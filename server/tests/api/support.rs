//! A server over an engine whose model knows the alphabet, and clients for it.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use nibble_engine::{
    Engine, EngineConfig, EngineHandle, EngineStats, Pooling, RunnerLimits, StepError, StepRunner, StepValues,
};
use nibble_model::chat_template::ChatTemplate;
use nibble_model::config::ModelConfig;
use nibble_model::forward::{Batch, Logits};
use nibble_model::generation_config::GenerationConfig;
use nibble_model::tokenizer::Tokenizer;
use nibble_server::{ServeOptions, ServedModel, ServerError, ServerOptions, Service, Socket, Sockets, Tls};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tower::ServiceExt;

/// Long enough for any machine; only a hang reaches it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The token after the 256 bytes: end of sequence, and special.
pub(crate) const END: u32 = 256;
const VOCABULARY: usize = 257;
const BLOCK_SIZE: usize = 16;
pub(crate) const BLOCKS: usize = 64;
/// The longest sequence.
pub(crate) const MAXIMUM_TOKENS: usize = 256;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// What the model says after `token`: the alphabet to its end; after "!" the bytes of a crab; after anything
/// else "a".
fn next(token: u32) -> u32 {
    match token {
        0x61..=0x79 => token + 1,
        0x7A | 0x80 => END,
        0x21 => 0xF0,
        0xF0 => 0x9F,
        0x9F => 0xA6,
        0xA6 => 0x80,
        _ => 0x61,
    }
}

/// Logits that depend on the last token alone: 10 for the one that follows, 5 for "?", 0 for the rest.
struct AlphabetRunner {
    options: Options,
    steps: usize,
    gate: Option<(Sender<()>, Receiver<()>)>,
}

/// How a test server differs from the usual one.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) engine: EngineConfig,
    /// The step, counted from 0, that fails.
    pub(crate) failing_step: Option<usize>,
    /// The least time that a step takes.
    pub(crate) step_time: Duration,
    pub(crate) chat_template: Option<&'static str>,
    pub(crate) server: ServerOptions,
    pub(crate) generation_config: GenerationConfig,
    pub(crate) hidden_size: Option<usize>,
    /// Counts rows whose logits were wanted.
    pub(crate) logit_rows: Arc<AtomicUsize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engine: EngineConfig::default(),
            failing_step: None,
            step_time: Duration::ZERO,
            chat_template: Some(TEMPLATE),
            server: ServerOptions::default(),
            generation_config: GenerationConfig::default(),
            hidden_size: Some(4),
            logit_rows: Arc::default(),
        }
    }
}

/// The contents one after the other; raises an error for a role it does not know.
const TEMPLATE: &str = "{% for message in messages %}\
    {% if message.role == 'stranger' %}{{ raise_exception('I do not talk to strangers') }}{% endif %}\
    {{ message.content }}{% endfor %}{{ suffix }}";

impl StepRunner for AlphabetRunner {
    fn limits(&self) -> RunnerLimits {
        RunnerLimits {
            blocks: BLOCKS,
            block_size: BLOCK_SIZE,
            vocabulary_size: VOCABULARY,
            maximum_sequence_tokens: MAXIMUM_TOKENS,
            eos_token_ids: vec![END],
            hidden_size: self.options.hidden_size,
        }
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        if let Some((say_waits, permits)) = &self.gate
            && say_waits.send(()).is_ok()
        {
            let _ = permits.recv();
        }
        let step = self.steps;
        self.steps += 1;
        if self.options.failing_step == Some(step) {
            return Err(StepError::new("the device is gone"));
        }
        if !self.options.step_time.is_zero() {
            std::thread::sleep(self.options.step_time);
        }
        let mut values = Vec::new();
        self.options.logit_rows.fetch_add(batch.logit_rows.len(), Ordering::Relaxed);
        for &row in &batch.logit_rows {
            let mut logits = vec![0.0; VOCABULARY];
            logits[b'?' as usize] = 5.0;
            logits[next(batch.token_ids[row]) as usize] = 10.0;
            values.extend(logits);
        }
        let logits = Logits { rows: batch.logit_rows.len(), vocabulary: VOCABULARY, values };
        // The token, its position, 3 and 4.
        let hidden = |&row: &usize| [batch.token_ids[row] as f32, batch.positions[row] as f32, 3.0, 4.0];
        Ok(StepValues { logits, hidden_states: batch.hidden_rows.iter().flat_map(hidden).collect() })
    }
}

/// Lets the steps of a gated server through, one by one; when it is dropped they run freely.
pub(crate) struct Gate {
    waits: Receiver<()>,
    permits: Sender<()>,
}

impl Gate {
    /// Returns when a step has begun and waits.
    pub(crate) fn step_has_begun(&self) {
        self.waits.recv_timeout(PATIENCE).expect("a step begins");
    }

    /// Lets the waiting step go.
    pub(crate) fn let_go(&self) {
        self.permits.send(()).expect("the runner is there");
    }
}

/// A server without a socket; clones are the same server.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) service: Service,
    pub(crate) router: Router,
    pub(crate) engine: EngineHandle,
}

impl Server {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        Self::start(options, None)
    }

    /// A server whose steps wait for the gate.
    pub(crate) fn gated(options: Options) -> (Self, Gate) {
        let (say_waits, waits) = channel();
        let (permits, take_permit) = channel();
        (Self::start(options, Some((say_waits, take_permit))), Gate { waits, permits })
    }

    fn start(options: Options, gate: Option<(Sender<()>, Receiver<()>)>) -> Self {
        let (tokenizer, chat_template) = model_files(options.chat_template);
        let (server, generation_config) = (options.server.clone(), options.generation_config.clone());
        let config = options.engine.clone();
        let runner = AlphabetRunner { options, steps: 0, gate };
        let engine = Engine::start(Box::new(runner), config).unwrap().handle();
        let model = ServedModel {
            name: "alphabet".to_owned(),
            tokenizer: Arc::new(tokenizer),
            chat_template: chat_template.map(Arc::new),
            generation_config,
            pooling: Pooling::Last,
            engine: engine.clone(),
        };
        let service = Service::new(model, server).unwrap();
        Self { router: service.router(), service, engine }
    }

    /// Status, headers and body of the answer to any request.
    pub(crate) async fn send(&self, request: Request<Body>) -> (StatusCode, HeaderMap, String) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (parts.status, parts.headers, String::from_utf8(bytes.to_vec()).unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let (status, _, body) = self.send(request).await;
        (status, body)
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let (status, _, body) = self.send(post(path, body.to_string())).await;
        (status, serde_json::from_str(&body).unwrap())
    }

    /// The body of an answer that must be a success.
    pub(crate) async fn ok(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    /// The events of a stream, without `[DONE]`, which must be the last.
    pub(crate) async fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let (status, headers, body) = self.send(post(path, body.to_string())).await;
        assert_eq!(
            (status, &headers["content-type"]),
            (StatusCode::OK, &"text/event-stream".parse().unwrap())
        );
        let mut events: Vec<&str> =
            body.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// The value of the metric whose line begins with `name`.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let (_, body) = self.get("/metrics").await;
        let line = body.lines().find(|line| line.starts_with(name))?.to_owned();
        line.rsplit(' ').next()?.parse().ok()
    }

    /// A socket that serves this server.
    pub(crate) async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let sockets = Sockets { api: Socket { listener, tls: None }, admin: None };
        tokio::spawn(self.service.clone().serve(sockets, ServeOptions::default()));
        address
    }

    /// A whole server with its addresses, that of the API and that of the admin, until it ends.
    pub(crate) async fn serve(&self, tls: Option<Arc<Tls>>, options: ServeOptions) -> Serving {
        let (api, admin) = (
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        );
        let (address, admin_address) = (api.local_addr().unwrap(), admin.local_addr().unwrap());
        let admin = Some(Socket { listener: admin, tls: None });
        let sockets = Sockets { api: Socket { listener: api, tls }, admin };
        let end = tokio::spawn(self.service.clone().serve(sockets, options));
        Serving { address: address.to_string(), admin: admin_address.to_string(), end }
    }

    /// Waits until the engine's statistics are as wanted.
    pub(crate) async fn eventually(&self, what: &str, condition: impl Fn(&EngineStats) -> bool) {
        let started = Instant::now();
        while !condition(&self.engine.stats()) {
            assert!(started.elapsed() < PATIENCE, "{what}, but it is {:?}", self.engine.stats());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the server has noticed that `count` sequences are not wanted any more.
    pub(crate) async fn aborts_are_asked_for(&self, count: usize) {
        let started = Instant::now();
        while self.metric("nibble:request_success_total{finished_reason=\"abort\"").await
            != Some(count as f64)
        {
            assert!(started.elapsed() < PATIENCE, "the server does not notice a hang-up");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A server with sockets.
pub(crate) struct Serving {
    pub(crate) address: String,
    pub(crate) admin: String,
    pub(crate) end: JoinHandle<Result<(), ServerError>>,
}

/// Status and everything else of the answer to a request without a body, over a socket of its own.
pub(crate) async fn ask(address: &str, head: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("{head} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

/// A POST of a JSON text.
pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

/// Sends a POST over a socket and leaves the connection open.
pub(crate) fn send_over_socket(address: &str, path: &str, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    stream
}

/// A tokenizer of bytes, and the chat template.
fn model_files(chat_template: Option<&str>) -> (Tokenizer, Option<ChatTemplate>) {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
    let mut moved = 0x100;
    let vocabulary: serde_json::Map<String, Value> = (0..=u8::MAX)
        .map(|byte| {
            let character = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                _ => {
                    moved += 1;
                    char::from_u32(moved - 1).unwrap()
                }
            };
            (character.to_string(), byte.into())
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "added_tokens": [{
            "id": END, "content": "<|end|>", "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    write("tokenizer.json", tokenizer.to_string());
    let config = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": MAXIMUM_TOKENS,
        "torch_dtype": "float32",
    });
    write("config.json", config.to_string());
    if let Some(template) = chat_template {
        write("chat_template.jinja", template.to_owned());
    }
    let config = ModelConfig::from_file(&directory.path().join("config.json")).unwrap();
    let tokenizer = Tokenizer::open(directory.path(), &config).unwrap();
    (tokenizer, ChatTemplate::open(directory.path()).unwrap())
}
