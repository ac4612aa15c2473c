//! `nibble eval`: perplexity, and distance from a reference model.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use nibble_model::evaluation::{WindowOptions, evaluate};
use nibble_model::tokenizer::Tokenizer;
use serde_json::json;

use crate::device::{DeviceArguments, load, open_checkpoint};
use crate::output::{Progress, print_json};

/// Arguments of `nibble eval`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble eval ./SmolLM2-135M-int4 --text test.txt --window 512 --windows 40")]
pub(crate) struct EvalArguments {
    /// A model directory or a Hugging Face id.
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
    /// A model to compare with: KL divergence, top-1 agreement, probability difference.
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

/// Runs the command.
pub(crate) fn run(arguments: &EvalArguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let text = std::fs::read_to_string(&arguments.text)
        .with_context(|| format!("cannot read the text {}", arguments.text.display()))?;
    let checkpoint = open_checkpoint(&arguments.model)?;
    let tokenizer = Tokenizer::open(checkpoint.directory(), checkpoint.config())?;
    let tokens = tokenizer.encode(&text, false)?;
    let mut model = load(&checkpoint, &arguments.device, arguments.window)?;
    let mut reference = match &arguments.reference {
        Some(reference) => Some(load(&open_checkpoint(reference)?, &arguments.device, arguments.window)?),
        None => None,
    };
    let options = WindowOptions { window: arguments.window, windows: arguments.windows };
    let mut bar = Progress::new(format!("scoring {}", arguments.text.display()));
    let result = evaluate(&mut model, reference.as_mut(), &tokens, options, &mut |progress| {
        let message = format!("perplexity {:.3}", progress.perplexity);
        bar.update(progress.windows_done as u64, progress.windows as u64, &message);
    })?;
    drop(bar);
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
