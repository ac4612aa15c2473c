//! A model that is larger than memory: every sequence goes through layer 0, then every sequence through layer 1.
//!
//! In memory are one decoder layer, the activations of one sequence, and the residual streams of all sequences,
//! which move to a file when there are more of them than memory is allowed for.

use nibble_kernels::backend::Backend;

use super::batch::Logits;
use super::decoder_layer::DecoderLayer;
use super::hidden_states::{HiddenStates, Spill};
use super::layer_runner::LayerRunner;
use super::output_stage::OutputHead;
use super::{BatchError, ModelError};
use crate::checkpoint::Checkpoint;

/// The tensor of the embedding table.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Embeds `sequences` and brings them through every decoder layer of `checkpoint`; `runner` must be made for its
/// config and the longest sequence. Calls `step` after each sequence in each layer.
///
/// # Errors
/// When a token is not in the vocabulary, a tensor is missing or malformed, or the spill file cannot be written.
pub(crate) fn through_layers<B: Backend>(
    runner: &mut LayerRunner<B>,
    checkpoint: &Checkpoint,
    sequences: &[&[u32]],
    spill: &Spill,
    step: &mut dyn FnMut(),
) -> Result<HiddenStates, ModelError> {
    let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
    let mut states = HiddenStates::new(&lengths, checkpoint.config().hidden_size, spill)?;
    for (index, tokens) in sequences.iter().enumerate() {
        states.write(index, &embed(checkpoint, tokens)?)?;
    }
    let mut hidden = Vec::new();
    for index in 0..checkpoint.config().layers {
        let layer = DecoderLayer::load(runner.backend(), checkpoint, index)?;
        for sequence in 0..sequences.len() {
            states.read(sequence, &mut hidden)?;
            runner.forward(&layer, &mut hidden)?;
            states.write(sequence, &hidden)?;
            step();
        }
    }
    Ok(states)
}

/// The logits of every token of one short sequence, with one layer of `checkpoint` in memory at a time.
///
/// # Errors
/// When a token is not in the vocabulary, or a tensor is missing or malformed.
pub fn streamed_logits<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    tokens: &[u32],
) -> Result<Logits, ModelError> {
    let mut runner = LayerRunner::new(backend, checkpoint.config(), tokens.len())?;
    let in_memory = Spill { memory_bytes: u64::MAX, directory: checkpoint.path().to_owned() };
    let states = through_layers(&mut runner, checkpoint, &[tokens], &in_memory, &mut || ())?;
    let mut hidden = Vec::new();
    states.read(0, &mut hidden)?;
    OutputHead::load(runner.into_backend(), checkpoint)?.logits(&hidden)
}

/// The rows of the embedding table for `tokens`, `[tokens, hidden_size]`.
///
/// # Errors
/// When a token is not in the vocabulary, or the table is missing or malformed.
pub fn embed(checkpoint: &Checkpoint, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
    let config = checkpoint.config();
    let (vocabulary, width) = (config.vocabulary_size, config.hidden_size);
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(BatchError { problem: format!("token {token} is not below {vocabulary}") }.into());
    }
    if let Some(rows) = checkpoint.embedding_rows(EMBEDDING) {
        let mut hidden = vec![0.0; tokens.len() * width];
        rows.read(config, tokens, &mut hidden)?;
        return Ok(hidden);
    }
    let table = checkpoint.dense(EMBEDDING, vocabulary, width)?;
    let mut hidden = Vec::with_capacity(tokens.len() * width);
    for &token in tokens {
        let row = token as usize;
        hidden.extend((row * width..(row + 1) * width).map(|element| table.values().get(element)));
    }
    Ok(hidden)
}
