//! Perplexity before and after.

use std::path::Path;

use anyhow::{Context, ensure};
use nibble_model::checkpoint::Checkpoint;
use nibble_model::evaluation::{Evaluation, WindowOptions, evaluate_streamed};

use super::arguments::QuantizeArguments;
use crate::memory::spill;
use crate::output::Progress;

/// The tokens of `text`, at least one window of them.
pub(super) fn read_tokens(checkpoint: &Checkpoint, text: &Path, window: usize) -> anyhow::Result<Vec<u32>> {
    let contents =
        std::fs::read_to_string(text).with_context(|| format!("cannot read the text {}", text.display()))?;
    let tokenizer = checkpoint.tokenizer()?;
    let tokens = tokenizer.encode(&contents, false)?;
    ensure!(
        (2..=tokens.len()).contains(&window),
        "{} has {} tokens and --eval-window is {window}; it must be from 2 to the number of tokens",
        text.display(),
        tokens.len()
    );
    Ok(tokens)
}

/// Scores the quantized model against its original, both one decoder layer at a time.
pub(super) fn evaluate_both(
    arguments: &QuantizeArguments,
    original: &Checkpoint,
    quantized: &Checkpoint,
    tokens: &[u32],
) -> anyhow::Result<Evaluation> {
    let options =
        WindowOptions { window: arguments.eval_window, windows: arguments.eval_windows, context: 0 };
    let (cpu, spill) = (arguments.device.cpu(), spill(quantized.path()));
    let mut bar = Progress::new("perplexity before and after");
    Ok(evaluate_streamed(cpu, quantized, Some(original), tokens, options, &spill, &mut |progress| {
        bar.update(progress.steps_done as u64, progress.steps as u64, "windows x layers");
    })?)
}
