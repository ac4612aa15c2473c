//! The forward pass, written once over the `Backend` trait.
//!
//! A [`Batch`] names rows of several sequences; [`Model::forward`] runs them through every decoder layer
//! over a paged [`KvCache`] and returns the logits that were asked for. A row's logits have the same bits
//! whatever else is in the batch and however its sequence was cut into chunks.

mod batch;
mod completeness;
mod decoder_layer;
mod hidden_states;
mod layer_runner;
mod linear;
mod model;
mod output_stage;
mod random;
mod rotary;
mod step;
mod streamed;

pub use batch::{BLOCK_SIZE, Batch, Logits, SequenceRows};
pub use completeness::check_dense;
pub use decoder_layer::{DecoderLayer, LinearRole, NormRole};
pub use hidden_states::{HiddenStates, Spill};
pub use layer_runner::LayerRunner;
pub use linear::{Linear, LinearSpec};
pub use model::{KvCache, Model, kv_block_bytes};
use nibble_kernels::KernelError;
pub use output_stage::{FinalNorm, OutputHead, rounded_copy_bytes};
pub(crate) use output_stage::{OutputStage, load_output_head};
pub(crate) use streamed::{EMBEDDING, through_layers};
pub use streamed::{embed, streamed_logits};

use crate::error::CheckpointError;

/// A model could not be loaded or a step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The files of the model are wrong.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An operation refused its arguments.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A batch breaks a rule.
    #[error(transparent)]
    Batch(#[from] BatchError),
}

/// A [`Batch`] that does not describe rows of sequences, or does not fit the model or its cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the batch is not valid: {problem}")]
pub struct BatchError {
    problem: String,
}
