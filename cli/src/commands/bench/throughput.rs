//! `nibble bench throughput`: many sequences through the engine, without a server.

use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;
use nibble_engine::{
    Engine, EngineConfig, EventSink, Failure, ModelRunner, Request, RequestEvent, SamplingParameters,
    SinkState,
};
use nibble_kernels::Backend;
use nibble_model::forward::BLOCK_SIZE;
use serde::Serialize;

use super::model::{BenchModel, BenchModelArguments};
use crate::device::Work;
use crate::output::print_json;

/// Arguments of `nibble bench throughput`.
#[derive(Debug, Args)]
pub(crate) struct ThroughputArguments {
    #[command(flatten)]
    model: BenchModelArguments,
    /// Sequences that run at once, all submitted at the beginning.
    #[arg(long, value_name = "N", default_value_t = 64)]
    streams: usize,
    /// Tokens of each prompt; no two prompts begin alike.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens generated for each, the most likely one each time.
    #[arg(long, value_name = "N", default_value_t = 128)]
    output_tokens: usize,
    /// Most tokens in a step.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    max_num_batched_tokens: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Throughput {
    /// Prompt tokens over the time until the last stream had its first token.
    prompt_tokens_per_second: f64,
    /// Tokens a second of all streams while every one of them decodes.
    decode_tokens_per_second: f64,
    /// All output tokens over the time from the first submission to the last token.
    output_tokens_per_second: f64,
    seconds: f64,
    streams: usize,
    prompt_tokens: usize,
    output_tokens: usize,
    device: String,
}

/// Runs the command.
pub(super) fn run(arguments: &ThroughputArguments) -> anyhow::Result<()> {
    ensure!(arguments.streams > 0, "--streams must be at least 1");
    ensure!(arguments.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(arguments.output_tokens > 1, "--output-tokens must be at least 2");
    let model = arguments.model.open()?;
    let device = arguments.model.run.device(model.config())?;
    let vocabulary = model.config().vocabulary_size;
    let engine = device.run(StartEngine { model: &model, arguments })?;
    // The first run warms caches and buffers.
    measure(&engine, vocabulary, 1, arguments)?;
    let events = measure(&engine, vocabulary, 2, arguments)?;
    engine.join()?;
    let result = summarize(&events, arguments, device.description());
    if arguments.json {
        return print_json(&result);
    }
    println!("prompts: {:.1} tokens/s", result.prompt_tokens_per_second);
    println!("decode: {:.1} tokens/s over {} streams", result.decode_tokens_per_second, result.streams);
    println!("output in all: {:.1} tokens/s in {:.2} s", result.output_tokens_per_second, result.seconds);
    println!("{}", result.device);
    Ok(())
}

/// Loads the model with a cache for all streams and starts an engine on it.
struct StartEngine<'a> {
    model: &'a BenchModel,
    arguments: &'a ThroughputArguments,
}

impl Work for StartEngine<'_> {
    type Output = Engine;

    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Engine> {
        let Self { model, arguments } = self;
        let tokens = arguments.prompt_tokens + arguments.output_tokens;
        let model = model.load(open()?, tokens)?;
        let blocks = arguments.streams * tokens.div_ceil(BLOCK_SIZE);
        let config = EngineConfig {
            max_running_sequences: arguments.streams,
            max_step_tokens: arguments.max_num_batched_tokens,
            max_prefill_chunk_tokens: arguments.max_num_batched_tokens,
            max_waiting_requests: arguments.streams,
            prefix_caching: false,
            ..EngineConfig::default()
        };
        Ok(Engine::start(Box::new(ModelRunner::new(model, blocks)?), config)?)
    }
}

/// When each token of each stream came, in seconds after the first submission.
type Events = Vec<Vec<f64>>;

fn measure(
    engine: &Engine,
    vocabulary: usize,
    round: usize,
    arguments: &ThroughputArguments,
) -> anyhow::Result<Events> {
    let sampling = SamplingParameters {
        max_tokens: arguments.output_tokens,
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParameters::default()
    };
    let (sender, receiver) = channel();
    let started = Instant::now();
    for stream in 0..arguments.streams {
        let first = round * 7 + stream * 31;
        let prompt = (0..arguments.prompt_tokens).map(|index| ((first + index * 7919) % vocabulary) as u32);
        let sink = TimeSink { stream, sender: sender.clone() };
        engine.handle().submit(Request::new(prompt.collect(), sampling.clone()), Box::new(sink))?;
    }
    drop(sender);
    let mut events = vec![Vec::with_capacity(arguments.output_tokens); arguments.streams];
    let mut finished = 0;
    while finished < arguments.streams {
        let (stream, at, event) = receiver.recv().context("the engine stopped before all streams ended")?;
        match event {
            RequestEvent::Token { .. } => events[stream].push((at - started).as_secs_f64()),
            RequestEvent::Finished { .. } => finished += 1,
            RequestEvent::Failed(Failure { message, .. }) => bail!("the engine has failed: {message}"),
            RequestEvent::PromptLogprobs { .. } | RequestEvent::Embedding { .. } => {}
        }
    }
    Ok(events)
}

fn summarize(events: &Events, arguments: &ThroughputArguments, device: String) -> Throughput {
    let times = |of: fn(&[f64]) -> Option<&f64>| events.iter().filter_map(move |times| of(times)).copied();
    let all_began = times(<[f64]>::first).fold(0.0, f64::max);
    let first_ended = times(<[f64]>::last).fold(f64::INFINITY, f64::min);
    let seconds = times(<[f64]>::last).fold(0.0, f64::max);
    let between = events.iter().flatten().filter(|&&at| at > all_began && at <= first_ended).count();
    let tokens: usize = events.iter().map(Vec::len).sum();
    Throughput {
        prompt_tokens_per_second: (arguments.streams * arguments.prompt_tokens) as f64 / all_began,
        decode_tokens_per_second: between as f64 / (first_ended - all_began),
        output_tokens_per_second: tokens as f64 / seconds,
        seconds,
        streams: arguments.streams,
        prompt_tokens: arguments.prompt_tokens,
        output_tokens: arguments.output_tokens,
        device,
    }
}

/// Notes when events of a stream come.
struct TimeSink {
    stream: usize,
    sender: Sender<(usize, Instant, RequestEvent)>,
}

impl EventSink for TimeSink {
    fn send(&mut self, event: RequestEvent) -> SinkState {
        match self.sender.send((self.stream, Instant::now(), event)) {
            Ok(()) => SinkState::Open,
            Err(_) => SinkState::Closed,
        }
    }
}
