//! What a streamed token costs the server: HTTP clients over loopback, an engine, and a device that does nothing.
//!
//! `cargo run --release -p nibble-server --example sse_throughput` starts, for each line, a server process that may
//! use core 0 alone, engine thread included, and loads it from core 1 over real sockets. It prints tokens a second
//! and the server's CPU time for each token: tokens per second of CPU time are what one core can stream.
//!
//! A device that takes no time lets the engine run ahead of the streams, so that several tokens leave in one write.
//! The lines with a step time are the other end: each token waits for the next step, and leaves in a write of its
//! own. Both end with the same check: every token has come as an event of its own, and the usage says so.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nibble_engine::{Engine, EngineConfig, Pooling, RunnerLimits, StepError, StepRunner, StepValues};
use nibble_model::chat_template::ChatTemplate;
use nibble_model::config::ModelConfig;
use nibble_model::forward::{Batch, Logits};
use nibble_model::generation_config::GenerationConfig;
use nibble_model::tokenizer::Tokenizer;
use nibble_server::{ServeOptions, ServedModel, ServerOptions, Service, Socket, Sockets};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const SERVER_CORE: usize = 0;
const CLIENT_CORE: usize = 1;
const VOCABULARY: usize = 64;
const BLOCK_SIZE: usize = 16;
const MAXIMUM_TOKENS: usize = 4096;
const STREAMS: usize = 256;

/// Says each token after the one before it, in a circle, and takes `step_time` for a step.
struct NullRunner {
    step_time: Duration,
}

impl StepRunner for NullRunner {
    fn limits(&self) -> RunnerLimits {
        RunnerLimits {
            blocks: 2 * STREAMS * MAXIMUM_TOKENS / BLOCK_SIZE,
            block_size: BLOCK_SIZE,
            vocabulary_size: VOCABULARY,
            maximum_sequence_tokens: MAXIMUM_TOKENS,
            hidden_size: None,
            eos_token_ids: vec![],
        }
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time);
        }
        let rows = batch.logit_rows.len();
        let mut values = vec![0.0; rows * VOCABULARY];
        for (row, &position) in values.chunks_exact_mut(VOCABULARY).zip(&batch.logit_rows) {
            row[(batch.token_ids[position] as usize + 1) % VOCABULARY] = 1.0;
        }
        Ok(Logits { rows, vocabulary: VOCABULARY, values }.into())
    }
}

fn pin_to(core: usize) -> rustix::io::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores)
}

/// The server process: prints its address and serves until it is killed.
fn serve(step_time: Duration) -> Result<(), AnyError> {
    // Before any thread exists: all of them inherit it.
    pin_to(SERVER_CORE)?;
    let (tokenizer, chat_template) = model_files()?;
    let engine = Engine::start(Box::new(NullRunner { step_time }), EngineConfig::default())?;
    let model = ServedModel {
        name: "null".to_owned(),
        tokenizer: Arc::new(tokenizer),
        chat_template: chat_template.map(Arc::new),
        generation_config: GenerationConfig::default(),
        pooling: Pooling::Last,
        engine: engine.handle(),
    };
    let service = Service::new(model, ServerOptions::default())?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let sockets = Sockets { api: Socket { listener, tls: None }, admin: None };
        service.serve(sockets, ServeOptions { drain_timeout: Duration::ZERO, ..Default::default() }).await?;
        Ok(())
    })
}

/// A tokenizer of short words, and a chat template.
fn model_files() -> Result<(Tokenizer, Option<ChatTemplate>), AnyError> {
    let directory = tempfile::tempdir()?;
    let words = (0..VOCABULARY).map(|id| format!("Ġw{id}"));
    let vocabulary: serde_json::Map<_, _> =
        words.zip(0..VOCABULARY).map(|(word, id)| (word, id.into())).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": true},
    });
    let config = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": MAXIMUM_TOKENS,
        "torch_dtype": "float32",
    });
    let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text);
    write("tokenizer.json", tokenizer.to_string())?;
    write("config.json", config.to_string())?;
    write("chat_template.jinja", "{{ messages[0].content }}".to_owned())?;
    let config = ModelConfig::from_file(&directory.path().join("config.json"))?;
    Ok((Tokenizer::open(directory.path(), &config)?, ChatTemplate::open(directory.path())?))
}

/// A server process, killed in the end.
struct ServerProcess {
    process: Child,
    address: String,
}

impl ServerProcess {
    fn start(step_time: Duration) -> Result<Self, AnyError> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["serve", &step_time.as_micros().to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut address = String::new();
        let output = process.stdout.take().ok_or("the server has no output")?;
        BufReader::new(output).read_line(&mut address)?;
        Ok(Self { process, address: address.trim().to_owned() })
    }

    /// User and system time so far, of all its threads.
    fn cpu_time(&self) -> Result<Duration, AnyError> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // The name, in parentheses, may hold anything: fields are counted behind it.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks: u64 = [11, 12].iter().filter_map(|&field| fields.get(field)?.parse::<u64>().ok()).sum();
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Sends `body` and reads the answer to its end.
async fn request(address: String, path: &'static str, body: String) -> Result<Vec<u8>, AnyError> {
    let mut connection = TcpStream::connect(address).await?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).await?;
    let mut answer = Vec::with_capacity(1 << 20);
    connection.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Refuses an answer that is not `tokens` events of one token each, the usage, and the end.
fn check(answer: &[u8], tokens: usize) -> Result<(), AnyError> {
    let text = std::str::from_utf8(answer)?;
    // The text of a token of model_files.
    let tokens_seen = text.matches("\":\" w").count();
    let usage = format!("\"completion_tokens\":{tokens},");
    let [tokens_seen, usages, ends] =
        [tokens_seen, text.matches(&usage).count(), text.matches("[DONE]").count()];
    if [tokens_seen, usages, ends] == [tokens, 1, 1] {
        return Ok(());
    }
    let beginning: String = text.chars().take(600).collect();
    Err(format!("{tokens_seen} events of {tokens} tokens, {usages} usages, {ends} ends: {beginning}").into())
}

struct Measurement {
    seconds: f64,
    cpu_seconds: f64,
    bytes: usize,
}

/// Streams `tokens` tokens to each of `streams` clients at once.
async fn load(
    server: &ServerProcess,
    path: &'static str,
    streams: usize,
    tokens: usize,
) -> Result<Measurement, AnyError> {
    let mut body = json!({
        "stream": true, "stream_options": {"include_usage": true}, "temperature": 0, "max_tokens": tokens,
    });
    match path {
        "/v1/completions" => body["prompt"] = " w1".into(),
        _ => body["messages"] = json!([{"role": "user", "content": " w1"}]),
    }
    let (cpu_before, started) = (server.cpu_time()?, Instant::now());
    let mut requests = JoinSet::new();
    for _ in 0..streams {
        requests.spawn(request(server.address.clone(), path, body.to_string()));
    }
    let answers = requests.join_all().await;
    let (seconds, cpu_after) = (started.elapsed().as_secs_f64(), server.cpu_time()?);
    let mut bytes = 0;
    for answer in answers {
        let answer = answer?;
        check(&answer, tokens)?;
        bytes += answer.len();
    }
    Ok(Measurement { seconds, cpu_seconds: (cpu_after - cpu_before).as_secs_f64(), bytes })
}

fn main() -> Result<(), AnyError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, step_microseconds] = &arguments[..]
        && role == "serve"
    {
        return serve(Duration::from_micros(step_microseconds.parse()?));
    }
    pin_to(CLIENT_CORE)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("endpoint              streams  step us  tokens/s  CPU us/token  tokens/CPU s  bytes/token");
    for (path, streams, step_microseconds, tokens) in [
        ("/v1/completions", STREAMS, 0, 2048),
        ("/v1/chat/completions", STREAMS, 0, 2048),
        ("/v1/chat/completions", 64, 0, 4000),
        ("/v1/chat/completions", STREAMS, 5000, 1024),
        ("/v1/chat/completions", 64, 5000, 1024),
        ("/v1/chat/completions", 1, 500, 4000),
    ] {
        let server = ServerProcess::start(Duration::from_micros(step_microseconds))?;
        // Warms code and memory, and the chat template.
        runtime.block_on(load(&server, path, streams, 16))?;
        let measured = runtime.block_on(load(&server, path, streams, tokens))?;
        let count = (streams * tokens) as f64;
        println!(
            "{path:20}  {streams:7}  {step_microseconds:7}  {:8.0}  {:12.2}  {:12.0}  {:11.0}",
            count / measured.seconds,
            measured.cpu_seconds * 1e6 / count,
            count / measured.cpu_seconds,
            measured.bytes as f64 / count
        );
        std::io::stdout().flush()?;
    }
    Ok(())
}
