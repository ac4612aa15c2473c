//! `nibble eval`: perplexity, and distance from a reference model.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use nibble_kernels::Backend;
use nibble_kernels::backend::Activations;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::evaluation::{Evaluation, StreamedProgress, WindowOptions, evaluate, evaluate_streamed};
use serde_json::json;

use crate::device::{ModelArguments, Work, load, open_checkpoint};
use crate::memory::spill;
use crate::output::{Progress, print_json};

/// Arguments of `nibble eval`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble eval ./SmolLM2-135M-int4 --text test.txt --window 512 --windows 40")]
pub(crate) struct EvalArguments {
    /// A model directory, a GGUF file or a Hugging Face id.
    model: String,
    /// The text to score, UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window; windows do not overlap and are scored alone.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Score the first N windows only.
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Do not score the predictions of the first N tokens of a window: half of the window is what llama.cpp's perplexity
    /// tool does.
    #[arg(long, value_name = "N", default_value_t = 0)]
    context: usize,
    /// A model to compare with: KL divergence, top-1 agreement, probability difference.
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    /// Hold one decoder layer in memory at a time, for models larger than memory; the figures are the same.
    #[arg(long)]
    low_memory: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: ModelArguments,
}

/// Runs the command.
pub(crate) fn run(arguments: &EvalArguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let text = std::fs::read_to_string(&arguments.text)
        .with_context(|| format!("cannot read the text {}", arguments.text.display()))?;
    let checkpoint = open_checkpoint(&arguments.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let tokens = tokenizer.encode(&text, false)?;
    let reference = arguments.reference.as_deref().map(open_checkpoint).transpose()?;
    // What is measured is the weights, as other programs measure them.
    let device = arguments.run.device_or(checkpoint.config().float_type, Activations::Float)?;
    let reference = reference.as_ref();
    let result = device.run(Score { arguments, checkpoint: &checkpoint, reference, tokens: &tokens })?;
    let seconds = started.elapsed().as_secs_f64();
    if arguments.json {
        let mut report = json!({
            "perplexity": result.perplexity,
            "predicted_tokens": result.predicted_tokens,
            "window": arguments.window,
            "seconds": seconds,
        });
        if let Some(comparison) = result.reference {
            report["reference_perplexity"] = comparison.reference_perplexity.into();
            report["mean_kl_divergence"] = comparison.mean_kl_divergence.into();
            report["top1_agreement"] = comparison.top1_agreement.into();
            report["rms_probability_difference"] = comparison.rms_probability_difference.into();
        }
        return print_json(&report);
    }
    println!("perplexity {:.4} over {} predictions", result.perplexity, result.predicted_tokens);
    if let Some(comparison) = result.reference {
        println!("reference perplexity {:.4}", comparison.reference_perplexity);
        println!("mean KL divergence {:.5} nats", comparison.mean_kl_divergence);
        println!("top-1 agreement {:.2} %", 100.0 * comparison.top1_agreement);
        println!("RMS probability difference {:.3} %", 100.0 * comparison.rms_probability_difference);
    }
    println!("{seconds:.1} s");
    Ok(())
}

/// The evaluation itself.
struct Score<'a> {
    arguments: &'a EvalArguments,
    checkpoint: &'a Checkpoint,
    reference: Option<&'a Checkpoint>,
    tokens: &'a [u32],
}

impl Work for Score<'_> {
    type Output = Evaluation;

    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Evaluation> {
        let Self { arguments, checkpoint, reference, tokens } = self;
        let EvalArguments { window, windows, context, .. } = *arguments;
        let options = WindowOptions { window, windows, context };
        let mut bar = Progress::new(format!("scoring {}", arguments.text.display()));
        if arguments.low_memory {
            let spill = spill(&std::env::temp_dir());
            let mut progress = |progress: StreamedProgress| {
                bar.update(progress.steps_done as u64, progress.steps as u64, "windows x layers");
            };
            return Ok(evaluate_streamed(
                open()?,
                checkpoint,
                reference,
                tokens,
                options,
                &spill,
                &mut progress,
            )?);
        }
        let load = |checkpoint| load(checkpoint, open()?, arguments.window);
        let mut model = load(checkpoint)?;
        let mut reference = reference.map(load).transpose()?;
        Ok(evaluate(&mut model, reference.as_mut(), tokens, options, &mut |progress| {
            let message = format!("perplexity {:.3}", progress.perplexity);
            bar.update(progress.windows_done as u64, progress.windows as u64, &message);
        })?)
    }
}
