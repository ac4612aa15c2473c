//! `nibble bench latency`: one sequence, without a server.

use std::time::Instant;

use clap::Args;
use nibble_kernels::Backend;
use nibble_model::forward::{BLOCK_SIZE, Batch, KvCache, Model, ModelError};
use serde_json::json;

use super::model::{BenchModel, BenchModelArguments};
use crate::device::Work;
use crate::output::print_json;

/// Arguments of `nibble bench latency`.
#[derive(Debug, Args)]
pub(crate) struct LatencyArguments {
    #[command(flatten)]
    model: BenchModelArguments,
    /// Tokens of the prompt, run as one step.
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens decoded after it, one a step.
    #[arg(long, default_value_t = 64)]
    output_tokens: usize,
    /// Measurements; the median is reported.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(arguments: &LatencyArguments) -> anyhow::Result<()> {
    anyhow::ensure!(arguments.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    let model = arguments.model.open()?;
    let device = arguments.model.run.device(model.config())?;
    let (prompt, output) = device.run(Latency { model: &model, arguments })?;
    let (prompt, output, description) = (median(prompt), median(output), device.description());
    if arguments.json {
        return print_json(&json!({
            "prompt_tokens_per_second": prompt,
            "output_tokens_per_second": output,
            "prompt_tokens": arguments.prompt_tokens,
            "output_tokens": arguments.output_tokens,
            "streams": 1,
            "device": description,
        }));
    }
    println!("prompt of {}: {prompt:.1} tokens/s", arguments.prompt_tokens);
    println!("decode: {output:.1} tokens/s");
    println!("{description}, median of {}", arguments.repeats);
    Ok(())
}

/// The measurement.
struct Latency<'a> {
    model: &'a BenchModel,
    arguments: &'a LatencyArguments,
}

impl Work for Latency<'_> {
    /// Tokens a second of the prompt and of decoding, for each repeat.
    type Output = (Vec<f64>, Vec<f64>);

    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Self::Output> {
        let Self { model, arguments } = self;
        let tokens = arguments.prompt_tokens + arguments.output_tokens;
        let mut model = model.load(open()?, tokens)?;
        let mut cache = model.kv_cache(tokens.div_ceil(BLOCK_SIZE))?;
        let (mut prompt, mut output) = (Vec::new(), Vec::new());
        for repeat in 0..=arguments.repeats {
            let (prompt_seconds, output_seconds) = measure(&mut model, &mut cache, arguments)?;
            // The first run warms caches and buffers.
            if repeat > 0 {
                prompt.push(arguments.prompt_tokens as f64 / prompt_seconds);
                output.push(arguments.output_tokens as f64 / output_seconds);
            }
        }
        Ok((prompt, output))
    }
}

/// Seconds of the prompt step and of all decode steps.
fn measure<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache<B>,
    arguments: &LatencyArguments,
) -> Result<(f64, f64), ModelError> {
    let vocabulary = model.config().vocabulary_size as u32;
    let block_table: Vec<u32> = (0..cache.blocks() as u32).collect();
    let prompt: Vec<u32> =
        (0..arguments.prompt_tokens as u32).map(|index| index * 7919 % vocabulary).collect();
    let mut batch = Batch::single(&prompt, 0, block_table.clone());
    batch.logit_rows = vec![prompt.len() - 1];
    let started = Instant::now();
    model.forward(&batch, cache)?;
    let prompt_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for step in 0..arguments.output_tokens {
        let token = (step as u32 * 104_729 + 13) % vocabulary;
        model.forward(&Batch::single(&[token], prompt.len() + step, block_table.clone()), cache)?;
    }
    Ok((prompt_seconds, started.elapsed().as_secs_f64()))
}

/// The middle one.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
