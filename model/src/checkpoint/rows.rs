//! Rows of an embedding table that is quantized in its file, decoded one by one.

use std::sync::Arc;

use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::gguf_model::GgufModel;

/// The embedding table of a GGUF file: the file stays mapped, and nothing else of the table is in memory.
pub(crate) struct EmbeddingRows {
    model: Arc<GgufModel>,
    name: &'static str,
}

impl EmbeddingRows {
    pub(super) fn new(model: Arc<GgufModel>, name: &'static str) -> Self {
        Self { model, name }
    }

    /// Decodes the rows of `tokens`, each below the vocabulary of `config`, to `values`, `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// When the table is not of the shape that `config` says.
    pub(crate) fn read(
        &self,
        config: &ModelConfig,
        tokens: &[u32],
        values: &mut [f32],
    ) -> Result<(), CheckpointError> {
        for (&token, values) in tokens.iter().zip(values.chunks_exact_mut(config.hidden_size)) {
            self.model.row(self.name, config.vocabulary_size, token as usize, values)?;
        }
        Ok(())
    }
}
