//! The evaluation of models larger than memory.
//!
//! ```text
//! for each model:  hidden = embedding of every window
//!                  for each decoder layer: load it; for each window: hidden = layer(hidden)
//! for each window: logits of some rows from both models' hidden states -> sums
//! ```
//!
//! In memory are one decoder layer or the output heads, never a model. Where both models have the same output head,
//! as a quantized model has that of its original, it is loaded once.

use std::ops::Range;

use nibble_kernels::backend::Backend;

use super::score::Sums;
use super::{CHUNK_ROWS, Evaluation, EvaluationError, WindowOptions, check_vocabularies};
use crate::checkpoint::Checkpoint;
use crate::forward::{
    EMBEDDING, HiddenStates, LayerRunner, Linear, Logits, ModelError, OutputStage, Spill, load_output_head,
    through_layers,
};

/// How far a streamed evaluation has come.
#[derive(Clone, Copy, Debug)]
pub struct StreamedProgress {
    /// Windows brought through a layer or the output head, in all layers of all models.
    pub steps_done: usize,
    /// Their number in all.
    pub steps: usize,
}

/// Scores `tokens` with `checkpoint` one decoder layer at a time, and compares with `reference` where there is
/// one: the same bits as [`evaluate`](super::evaluate) on the loaded models.
///
/// # Errors
/// When the text is shorter than a window, the vocabularies differ, a tensor is missing or malformed, or the hidden
/// states cannot be spilled.
pub fn evaluate_streamed<B: Backend>(
    mut backend: B,
    checkpoint: &Checkpoint,
    reference: Option<&Checkpoint>,
    tokens: &[u32],
    options: WindowOptions,
    spill: &Spill,
    progress: &mut dyn FnMut(StreamedProgress),
) -> Result<Evaluation, EvaluationError> {
    let windows = options.cut(tokens)?;
    if let Some(reference) = reference {
        check_vocabularies(checkpoint.config(), reference.config())?;
    }
    // The last token of a window is only predicted.
    let inputs: Vec<&[u32]> = windows.iter().map(|window| &window[..window.len() - 1]).collect();
    let models: Vec<&Checkpoint> = [checkpoint].into_iter().chain(reference).collect();
    let layers: usize = models.iter().map(|model| model.config().layers).sum();
    let steps = (layers + 1) * windows.len();
    let mut steps_done = 0;
    let mut step = || {
        steps_done += 1;
        progress(StreamedProgress { steps_done, steps });
    };

    let mut states = Vec::with_capacity(models.len());
    for model in &models {
        let mut runner = LayerRunner::new(backend, model.config(), options.window)?;
        states.push(through_layers(&mut runner, model, &inputs, spill, &mut step)?);
        backend = runner.into_backend();
    }

    let head = load_output_head(&backend, checkpoint)?;
    let reference_head = match reference {
        Some(reference) if !same_output_head(checkpoint, reference)? => {
            Some(load_output_head(&backend, reference)?)
        }
        _ => None,
    };
    let mut ends = Vec::with_capacity(models.len());
    for (model, states) in models.iter().zip(states) {
        let (stage, hidden_size) = (OutputStage::new(&backend, model)?, model.config().hidden_size);
        ends.push(ModelEnd { states, stage, hidden_size, hidden: Vec::new() });
    }
    let mut sums = Sums::default();
    for (index, window) in windows.iter().enumerate() {
        for end in &mut ends {
            end.states.read(index, &mut end.hidden).map_err(ModelError::from)?;
        }
        for first in (0..window.len() - 1).step_by(CHUNK_ROWS) {
            let rows = first..(first + CHUNK_ROWS).min(window.len() - 1);
            let mut logits = Vec::with_capacity(ends.len());
            for (end, head) in ends.iter_mut().zip([&head, reference_head.as_ref().unwrap_or(&head)]) {
                logits.push(end.logits(&backend, head, rows.clone())?);
            }
            let skipped = options.context.saturating_sub(rows.start);
            for (row, &target) in window[rows.start + 1..=rows.end].iter().enumerate().skip(skipped) {
                sums.add(logits[0].row(row), logits.get(1).map(|logits| logits.row(row)), target);
            }
        }
        step();
    }
    Ok(sums.evaluation(reference.is_some()))
}

/// A model's hidden states behind its last layer, and its final norm.
struct ModelEnd<B: Backend> {
    states: HiddenStates,
    stage: OutputStage<B>,
    hidden_size: usize,
    /// Those of the window that is scored.
    hidden: Vec<f32>,
}

impl<B: Backend> ModelEnd<B> {
    fn logits(&mut self, backend: &B, head: &Linear<B>, rows: Range<usize>) -> Result<Logits, ModelError> {
        let hidden = &self.hidden[rows.start * self.hidden_size..rows.end * self.hidden_size];
        Ok(self.stage.logits_of_hidden(backend, head, hidden)?)
    }
}

/// Whether both models multiply the same matrix last: then one copy of it serves both.
fn same_output_head(model: &Checkpoint, reference: &Checkpoint) -> Result<bool, ModelError> {
    let name = |checkpoint: &Checkpoint| match checkpoint.config().tie_word_embeddings {
        true => EMBEDDING,
        false => "lm_head.weight",
    };
    let (name, reference_name) = (name(model), name(reference));
    let dense = |checkpoint: &Checkpoint, name| !checkpoint.is_gguf() && checkpoint.has(name);
    if !dense(model, name) || !dense(reference, reference_name) {
        return Ok(false); // A quantized head has other tensors.
    }
    let (tensor, other) = (model.raw(name)?, reference.raw(reference_name)?);
    Ok((tensor.dtype, tensor.shape, tensor.data) == (other.dtype, other.shape, other.data))
}
