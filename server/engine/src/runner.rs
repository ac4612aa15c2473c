//! The one dynamic seam of the engine: something that computes a step.

use nibble_kernels::ops::sample::{self, NoToken, Sampled};
use nibble_model::forward::{Batch, Logits};

/// What a runner can hold; fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerLimits {
    /// KV blocks in the cache.
    pub blocks: usize,
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// Logits in a row; token ids are below it.
    pub vocabulary_size: usize,
    /// The longest sequence the model may see, prompt and completion together, in tokens.
    pub maximum_sequence_tokens: usize,
    /// Tokens that end a sequence unless the request ignores them.
    pub eos_token_ids: Vec<u32>,
    /// Numbers in a hidden state, if the runner gives any: without, there are no embeddings.
    pub hidden_size: Option<usize>,
}

/// What a step computed.
#[derive(Clone, Debug, PartialEq)]
pub struct StepValues {
    /// One row for each of [`Batch::logit_rows`], in that order.
    pub logits: Logits,
    /// One hidden state, behind the final norm, for each of [`Batch::hidden_rows`], row after row in that order.
    pub hidden_states: Vec<f32>,
}

impl From<Logits> for StepValues {
    fn from(logits: Logits) -> Self {
        Self { logits, hidden_states: Vec::new() }
    }
}

impl RunnerLimits {
    /// The longest sequence that fits the model and the whole KV cache, prompt and completion together. The last
    /// token generated is never fed back, so it needs no place in the cache.
    pub fn maximum_tokens(&self) -> usize {
        self.maximum_sequence_tokens.min(self.blocks * self.block_size + 1)
    }
}

/// A step could not be computed. The runner's state is unknown after it: the engine stops.
#[derive(Debug, thiserror::Error)]
#[error("the step failed: {message}")]
pub struct StepError {
    message: String,
}

impl StepError {
    /// An error that says what happened.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

/// Computes the logits and hidden states of a step. Its KV cache persists from step to step under the block numbers that
/// the batches name.
pub trait StepRunner: Send {
    /// What the runner can hold.
    fn limits(&self) -> RunnerLimits;

    /// Writes keys and values of every row of `batch` into the cache and returns what the batch wants to know.
    ///
    /// # Errors
    /// When the device or the model failed; no later step is tried.
    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError>;

    /// The same runner as one that samples where the logits are, if it can.
    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        None
    }
}

/// Computes a step in two parts: the tokens that may come need only be known for the second.
pub trait DeviceSampler {
    /// Starts what [`StepRunner::execute`] does, but for the logits, and returns the hidden states that `batch` wants.
    ///
    /// # Errors
    /// When the device or the model failed; no later step is tried.
    fn start(&mut self, batch: &Batch) -> Result<Vec<f32>, StepError>;

    /// Waits for the step and does what is wanted of each of its [`Batch::logit_rows`].
    ///
    /// # Errors
    /// When the device or the model failed; no later step is tried.
    fn sample(&mut self, wanted: &[sample::Row]) -> Result<Vec<Result<Sampled, NoToken>>, StepError>;
}
