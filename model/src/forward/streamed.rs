//! A model that is larger than memory: every sequence goes through layer 0, then every sequence through layer 1.
//!
//! In memory are one decoder layer, the activations of one sequence, and the residual streams of all sequences,
//! which move to a file when there are more of them than memory is allowed for.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use nibble_kernels::backend::Backend;

use super::batch::Logits;
use super::decoder_layer::DecoderLayer;
use super::layer_runner::LayerRunner;
use super::output_stage::{OutputStage, load_output_head};
use super::{BatchError, ModelError};
use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;

/// The tensor of the embedding table.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Where residual streams go that are too large for memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spill {
    /// Bytes of residual streams that are held in memory; when all of them take more, they go to a file.
    pub memory_bytes: u64,
    /// Where the file lies. It has no name and goes with the process.
    pub directory: PathBuf,
}

/// The residual streams of several sequences, each `[tokens, hidden_size]`.
pub(crate) struct HiddenStates {
    /// First element of each sequence, and the end of the last.
    starts: Vec<usize>,
    storage: Storage,
    directory: PathBuf,
}

enum Storage {
    Memory(Vec<f32>),
    Spilled {
        file: File,
        /// The sequence being worked on.
        values: Vec<f32>,
    },
}

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
    let mut states = HiddenStates::zeroed(checkpoint.config().hidden_size, sequences, spill)?;
    for (index, tokens) in sequences.iter().enumerate() {
        states.update(index, |hidden| embed(checkpoint, tokens, hidden))?;
    }
    for index in 0..checkpoint.config().layers {
        let layer = DecoderLayer::load(runner.backend(), checkpoint, index)?;
        for sequence in 0..sequences.len() {
            states.update(sequence, |hidden| runner.forward(&layer, hidden))?;
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
    let in_memory = Spill { memory_bytes: u64::MAX, directory: checkpoint.directory().to_owned() };
    let mut states = through_layers(&mut runner, checkpoint, &[tokens], &in_memory, &mut || ())?;
    let backend = runner.into_backend();
    let head = load_output_head(&backend, checkpoint)?;
    Ok(OutputStage::new(&backend, checkpoint)?.logits_of_hidden(&backend, &head, &states.read(0)?)?)
}

/// The rows of the embedding table for `tokens` into `hidden`, `[tokens, hidden_size]`.
fn embed(checkpoint: &Checkpoint, tokens: &[u32], hidden: &mut [f32]) -> Result<(), ModelError> {
    let config = checkpoint.config();
    let (vocabulary, width) = (config.vocabulary_size, config.hidden_size);
    let table = checkpoint.dense(EMBEDDING, vocabulary, width)?;
    for (&token, hidden) in tokens.iter().zip(hidden.chunks_exact_mut(width)) {
        let row = token as usize;
        if row >= vocabulary {
            return Err(BatchError { problem: format!("token {token} is not below {vocabulary}") }.into());
        }
        for (column, value) in hidden.iter_mut().enumerate() {
            *value = table.values().get(row * width + column);
        }
    }
    Ok(())
}

impl HiddenStates {
    fn zeroed(hidden_size: usize, sequences: &[&[u32]], spill: &Spill) -> Result<Self, ModelError> {
        let mut starts = vec![0];
        let mut elements = 0;
        for tokens in sequences {
            elements += tokens.len() * hidden_size;
            starts.push(elements);
        }
        let directory = spill.directory.clone();
        let storage = if (elements * size_of::<f32>()) as u64 <= spill.memory_bytes {
            Storage::Memory(vec![0.0; elements])
        } else {
            let file = tempfile::tempfile_in(&directory)
                .and_then(|file| file.set_len((elements * size_of::<f32>()) as u64).map(|()| file))
                .map_err(CheckpointError::io("create a file for hidden states in", &directory))?;
            Storage::Spilled { file, values: Vec::new() }
        };
        Ok(Self { starts, storage, directory })
    }

    /// The residual stream of `sequence`.
    pub(crate) fn read(&mut self, sequence: usize) -> Result<Cow<'_, [f32]>, CheckpointError> {
        let (start, end) = (self.starts[sequence], self.starts[sequence + 1]);
        match &mut self.storage {
            Storage::Memory(values) => Ok(Cow::Borrowed(&values[start..end])),
            Storage::Spilled { file, values } => {
                values.resize(end - start, 0.0);
                file.seek(SeekFrom::Start((start * size_of::<f32>()) as u64))
                    .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(values)))
                    .map_err(CheckpointError::io("read back hidden states from", &self.directory))?;
                Ok(Cow::Borrowed(values))
            }
        }
    }

    /// Changes the residual stream of `sequence`.
    fn update(
        &mut self,
        sequence: usize,
        change: impl FnOnce(&mut [f32]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.read(sequence)?;
        let (start, end) = (self.starts[sequence], self.starts[sequence + 1]);
        match &mut self.storage {
            Storage::Memory(values) => change(&mut values[start..end]),
            Storage::Spilled { file, values } => {
                change(values)?;
                Ok(file
                    .seek(SeekFrom::Start((start * size_of::<f32>()) as u64))
                    .and_then(|_| file.write_all(bytemuck::cast_slice(values)))
                    .map_err(CheckpointError::io("write hidden states to", &self.directory))?)
            }
        }
    }
}
