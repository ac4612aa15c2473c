//! `nibble serve`: a model over the OpenAI API.

mod engine;
mod service;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use nibble_engine::{Engine, EngineConfig, ModelRunner, Pooling};
use nibble_kernels::Backend;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::self_test::SelfTest;
use nibble_quantizer::quality_gate::recorded_outcome;
use nibble_server::{ReasoningFormat, ServedModel, ServerOptions, Service, ToolCallFormat};

use crate::device::{ModelArguments, Work, load, open_checkpoint};
use crate::memory::{MemoryPlan, MemoryWishes, parse_bytes};
use crate::output::start_logging;
use engine::{EngineArguments, SchedulingPolicy};
use service::ServiceArguments;

/// Time that the runtime gives work that blocks when the server has stopped.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(1);

/// Arguments of `nibble serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble serve ./SmolLM2-135M-int4 --port 8000\n\
                        Logs: RUST_LOG=warn, or RUST_LOG=debug for more.")]
pub(crate) struct ServeArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// Name of the model in the API; the directory's name or the Hugging Face id when not given.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Longest sequence, prompt and completion together, in tokens.
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<usize>,
    /// Memory of the KV cache, such as 2GiB; when not given, enough for all sequences within a quarter of the
    /// free memory and 4 GiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    kv_cache_memory: Option<u64>,
    /// How the model writes calls of tools; auto looks at its chat template.
    #[arg(long, value_enum, default_value_t = ToolCallParser::Auto)]
    tool_call_parser: ToolCallParser,
    /// How the model marks what it thinks before it answers; auto looks at its chat template.
    #[arg(long, value_enum, default_value_t = ReasoningParser::Auto)]
    reasoning_parser: ReasoningParser,
    /// Let requests bring a chat_template of their own: a program that runs in the server, within limits.
    #[arg(long)]
    trust_request_chat_template: bool,
    /// Before serving, check the weights and some logits against the nibble_self_test.json that `nibble quantize`
    /// wrote; refuse to serve when they differ.
    #[arg(long)]
    self_test: bool,
    #[command(flatten)]
    run: ModelArguments,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    service: ServiceArguments,
}

/// The formats of tool calls, under vLLM's names.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ToolCallParser {
    Auto,
    Hermes,
    #[value(name = "llama3_json")]
    Llama3Json,
}

/// The formats of thoughts, under vLLM's names; both are `<think>...</think>`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ReasoningParser {
    Auto,
    #[value(name = "deepseek_r1", alias = "qwen3")]
    DeepseekR1,
}

impl ReasoningParser {
    /// The format, if it is not the template's to say.
    fn format(self) -> Option<ReasoningFormat> {
        match self {
            Self::Auto => None,
            Self::DeepseekR1 => Some(ReasoningFormat::ThinkTags),
        }
    }
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
    let bound = arguments.service.bind()?;
    let checkpoint = open_checkpoint(&arguments.model)?;
    warn_of_quality_gate(checkpoint.path());
    let self_test = match arguments.self_test {
        true => Some(SelfTest::open(checkpoint.path())?),
        false => None,
    };
    let tokenizer = checkpoint.tokenizer()?;
    let chat_template = checkpoint.chat_template()?;
    let generation_config = checkpoint.generation_config()?;
    let device = arguments.run.device(checkpoint.config())?;
    let weight_bytes = checkpoint.weight_bytes();
    let wishes = MemoryWishes {
        kv_cache_bytes: arguments.kv_cache_memory,
        default_kv_cache_bytes: device.kv_cache_bytes(weight_bytes)?,
        cache_element_bytes: device.cache_element_bytes(),
        max_model_len: arguments.max_model_len,
        max_num_seqs: arguments.engine.max_num_seqs as usize,
    };
    let plan = MemoryPlan::new(checkpoint.config(), wishes)?;
    eprintln!("{}", plan.table(&checkpoint, device.head_copy_bytes(&checkpoint)));
    if chat_template.is_none() {
        eprintln!("the model has no chat template: /v1/chat/completions will be refused");
    }
    if let Some(test) = &self_test {
        test.check_weights(&checkpoint)?;
    }
    let name = arguments.served_model_name.clone().unwrap_or_else(|| model_name(&arguments.model));
    let engine = device.run(StartEngine {
        checkpoint: &checkpoint,
        self_test: self_test.as_ref(),
        plan,
        config: arguments.engine.config(),
    })?;
    let served = ServedModel {
        name: name.clone(),
        tokenizer: Arc::new(tokenizer),
        chat_template: chat_template.map(Arc::new),
        generation_config,
        pooling: Pooling::of_checkpoint(checkpoint.path())?.unwrap_or(Pooling::Last),
        engine: engine.handle(),
    };
    drop(checkpoint);
    let options = ServerOptions {
        tool_call_format: arguments.tool_call_parser.format(),
        reasoning_parser: arguments.reasoning_parser.format(),
        trust_request_chat_template: arguments.trust_request_chat_template,
        priorities: arguments.engine.scheduling_policy == SchedulingPolicy::Priority,
        ..arguments.service.server_options(&bound)
    };
    let service = Service::new(served, options)?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the threads of the server")?;
    let result = runtime.block_on(async {
        let (url, admin_address) = (bound.url()?, bound.admin_address()?);
        let sockets = bound.sockets()?;
        tracing::info!(seconds = started.elapsed().as_secs_f32(), "loaded");
        if let Some(address) = admin_address {
            tracing::info!(%address, "the admin address is open");
        }
        // The one line on standard output: scripts wait for it.
        writeln!(std::io::stdout(), "serving {name} at {url}")?;
        service.serve(sockets, arguments.service.serve_options()).await?;
        anyhow::Ok(())
    });
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    result?;
    engine.join()?;
    Ok(())
}

/// Loads a checkpoint, checks it if asked to, and starts an engine on it.
struct StartEngine<'a> {
    checkpoint: &'a Checkpoint,
    self_test: Option<&'a SelfTest>,
    plan: MemoryPlan,
    config: EngineConfig,
}

impl Work for StartEngine<'_> {
    type Output = Engine;

    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Engine> {
        let mut model = load(self.checkpoint, open()?, self.plan.max_model_len)?;
        if let Some(test) = self.self_test {
            let difference = test.check_model(&mut model, self.checkpoint.path())?;
            let (weights, tolerance) = (test.weights.len(), test.tolerance);
            tracing::info!(weights, largest_logit_difference = difference, tolerance, "the self-test passed");
        }
        Ok(Engine::start(Box::new(ModelRunner::new(model, self.plan.kv_blocks)?), self.config)?)
    }
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

/// The last part of the path of a directory, or the Hugging Face id as it is.
fn model_name(model: &str) -> String {
    let directory = Path::new(model).canonicalize().ok();
    let name = directory.as_deref().and_then(Path::file_name);
    name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}
