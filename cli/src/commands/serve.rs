//! `nibble serve`: a model over the OpenAI API.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use nibble_engine::{Engine, EngineConfig, ModelRunner, Pooling};
use nibble_model::chat_template::ChatTemplate;
use nibble_model::generation_config::GenerationConfig;
use nibble_model::self_test::SelfTest;
use nibble_model::tokenizer::Tokenizer;
use nibble_quantizer::quality_gate::recorded_outcome;
use nibble_server::{ServedModel, ServerOptions, ToolCallFormat};

use crate::device::{DeviceArguments, load, open_checkpoint};
use crate::memory::{MemoryPlan, MemoryWishes, free_bytes, parse_bytes};
use crate::output::start_logging;

/// Time that the runtime gives work that blocks when the server has stopped.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(1);

/// Arguments of `nibble serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble serve ./SmolLM2-135M-int4 --port 8000\n\
                        Logs: RUST_LOG=warn, or RUST_LOG=debug for more.")]
pub(crate) struct ServeArguments {
    /// A model directory or a Hugging Face id.
    model: String,
    /// Address to listen on; 0.0.0.0 for all of this machine's.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name of the model in the API; the directory's name or the Hugging Face id when not given.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Longest sequence, prompt and completion together, in tokens.
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<usize>,
    /// Most sequences that run at once.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_num_seqs: u32,
    /// Most tokens in a step: larger steps compute prompts faster, smaller ones hold up running answers less.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    max_num_batched_tokens: u32,
    /// Most requests that wait; more are answered with 429.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_waiting_requests: u32,
    /// Memory of the KV cache, such as 2GiB; when not given, enough for all sequences within a quarter of the
    /// free memory and 4 GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    kv_cache_memory: Option<u64>,
    /// Compute every prompt from its beginning; answers are the same.
    #[arg(long)]
    no_prefix_caching: bool,
    /// On SIGTERM: seconds to finish what was accepted.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// Demand this key of every request but health checks; may be given several times.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// How the model writes calls of tools; auto looks at its chat template.
    #[arg(long, value_enum, default_value_t = ToolCallParser::Auto)]
    tool_call_parser: ToolCallParser,
    /// Before serving, check the weights and some logits against the nibble_self_test.json that `nibble quantize`
    /// wrote; refuse to serve when they differ.
    #[arg(long)]
    self_test: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

/// The formats of tool calls, under vLLM's names.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ToolCallParser {
    Auto,
    Hermes,
    #[value(name = "llama3_json")]
    Llama3Json,
}

impl ToolCallParser {
    /// The format, if it is not the template's to say.
    fn format(self) -> Option<ToolCallFormat> {
        match self {
            Self::Auto => None,
            Self::Hermes => Some(ToolCallFormat::Hermes),
            Self::Llama3Json => Some(ToolCallFormat::Llama3Json),
        }
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &ServeArguments) -> anyhow::Result<()> {
    let started = Instant::now();
    start_logging("info");
    // Bound first: a port that is taken is known before the model is loaded.
    let address = (arguments.host.as_str(), arguments.port);
    let listener = std::net::TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {}:{}", arguments.host, arguments.port))?;
    let checkpoint = open_checkpoint(&arguments.model)?;
    warn_of_quality_gate(checkpoint.directory());
    let self_test = match arguments.self_test {
        true => Some(SelfTest::open(checkpoint.directory())?),
        false => None,
    };
    let tokenizer = Tokenizer::open(checkpoint.directory(), checkpoint.config())?;
    let chat_template = ChatTemplate::open(checkpoint.directory())?;
    let generation_config = GenerationConfig::open(checkpoint.directory())?;
    let wishes = MemoryWishes {
        kv_cache_bytes: arguments.kv_cache_memory,
        max_model_len: arguments.max_model_len,
        max_num_seqs: arguments.max_num_seqs as usize,
        free_bytes: free_bytes(),
    };
    let plan = MemoryPlan::new(checkpoint.config(), wishes)?;
    eprintln!("{}", plan.table(&checkpoint));
    if chat_template.is_none() {
        eprintln!("the model has no chat template: /v1/chat/completions will be refused");
    }
    if let Some(test) = &self_test {
        test.check_weights(&checkpoint)?;
    }
    let mut model = load(&checkpoint, &arguments.device, plan.max_model_len)?;
    if let Some(test) = &self_test {
        let difference = test.check_model(&mut model, checkpoint.directory())?;
        let (weights, tolerance) = (test.weights.len(), test.tolerance);
        tracing::info!(weights, largest_logit_difference = difference, tolerance, "the self-test passed");
    }
    let name = arguments.served_model_name.clone().unwrap_or_else(|| model_name(&arguments.model));
    let engine = Engine::start(Box::new(ModelRunner::new(model, plan.kv_blocks)), engine_config(arguments))?;
    let served = ServedModel {
        name: name.clone(),
        tokenizer: Arc::new(tokenizer),
        chat_template: chat_template.map(Arc::new),
        generation_config,
        pooling: Pooling::of_checkpoint(checkpoint.directory())?.unwrap_or(Pooling::Last),
        engine: engine.handle(),
    };
    drop(checkpoint);
    let options = ServerOptions {
        api_keys: arguments.api_key.clone(),
        tool_call_format: arguments.tool_call_parser.format(),
        ..ServerOptions::default()
    };
    let router = nibble_server::router(served, options)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the threads of the server")?;
    let result = runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tracing::info!(seconds = started.elapsed().as_secs_f32(), "loaded");
        // The one line on standard output: scripts wait for it.
        writeln!(std::io::stdout(), "serving {name} at http://{address}")?;
        let drain_timeout = Duration::from_secs(arguments.drain_timeout);
        nibble_server::serve(listener, router, engine.handle(), drain_timeout).await?;
        anyhow::Ok(())
    });
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    result?;
    engine.join()?;
    Ok(())
}

/// A checkpoint whose quality was found wanting is served all the same, but not silently.
fn warn_of_quality_gate(directory: &Path) {
    match recorded_outcome(directory) {
        Ok(outcome) => {
            if let Some(warning) = outcome.and_then(|outcome| outcome.warning()) {
                tracing::warn!("{warning}");
            }
        }
        Err(error) => tracing::warn!("{error}"),
    }
}

fn engine_config(arguments: &ServeArguments) -> EngineConfig {
    let default = EngineConfig::default();
    let max_step_tokens = arguments.max_num_batched_tokens as usize;
    EngineConfig {
        max_running_sequences: arguments.max_num_seqs as usize,
        max_step_tokens,
        max_prefill_chunk_tokens: default.max_prefill_chunk_tokens.min(max_step_tokens),
        max_waiting_requests: arguments.max_waiting_requests as usize,
        prefix_caching: !arguments.no_prefix_caching,
        ..default
    }
}

/// The last part of the path of a directory, or the Hugging Face id as it is.
fn model_name(model: &str) -> String {
    let directory = Path::new(model).canonicalize().ok();
    let name = directory.as_deref().and_then(Path::file_name);
    name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}
