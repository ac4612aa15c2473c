//! The model on a backend, as the engine runs it.

use nibble_kernels::backend::Backend;
use nibble_kernels::ops::sample::{self, NoToken, Sampled};
use nibble_model::forward::{BLOCK_SIZE, Batch, KvCache, Model, ModelError};

use crate::runner::{DeviceSampler, RunnerLimits, StepError, StepRunner, StepValues};

/// A model and its KV cache.
pub struct ModelRunner<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    /// Of the step that was started last.
    logit_rows: Vec<usize>,
}

impl<B: Backend> ModelRunner<B> {
    /// Allocates a cache of `blocks` blocks, of [`BLOCK_SIZE`] tokens each, for `model`.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn new(model: Model<B>, blocks: usize) -> Result<Self, ModelError> {
        let cache = model.kv_cache(blocks)?;
        Ok(Self { model, cache, logit_rows: Vec::new() })
    }
}

impl<B: Backend> StepRunner for ModelRunner<B>
where
    Model<B>: Send,
    KvCache<B>: Send,
{
    fn limits(&self) -> RunnerLimits {
        let config = self.model.config();
        RunnerLimits {
            blocks: self.cache.blocks(),
            block_size: BLOCK_SIZE,
            vocabulary_size: config.vocabulary_size,
            maximum_sequence_tokens: self.model.max_positions(),
            eos_token_ids: config.eos_token_ids.clone(),
            hidden_size: Some(config.hidden_size),
        }
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        let logits = self.model.forward(batch, &mut self.cache).map_err(failed)?;
        if batch.hidden_rows.is_empty() {
            return Ok(logits.into());
        }
        let hidden_states = self.model.hidden_states(batch).map_err(failed)?;
        Ok(StepValues { logits, hidden_states })
    }

    fn device_sampler(&mut self) -> Option<&mut dyn DeviceSampler> {
        if self.model.backend().sampler().is_some() { Some(self) } else { None }
    }
}

impl<B: Backend> DeviceSampler for ModelRunner<B> {
    fn start(&mut self, batch: &Batch) -> Result<Vec<f32>, StepError> {
        self.model.run(batch, &mut self.cache).map_err(failed)?;
        self.logit_rows.clone_from(&batch.logit_rows);
        if batch.hidden_rows.is_empty() {
            return Ok(Vec::new());
        }
        self.model.hidden_states(batch).map_err(failed)
    }

    fn sample(&mut self, wanted: &[sample::Row]) -> Result<Vec<Result<Sampled, NoToken>>, StepError> {
        self.model.sample(&self.logit_rows, wanted).map_err(failed)
    }
}

fn failed(error: ModelError) -> StepError {
    StepError::new(error.to_string())
}
