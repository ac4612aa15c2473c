//! Whether a checkpoint holds every weight of its model, without reading the large ones.

use super::decoder_layer::{LinearRole, norms};
use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;

/// Checks that every tensor of an unquantized model is there, with its shape and a floating-point type: what
/// must be known before hours of work on it.
///
/// # Errors
/// Names the first tensor that is missing or malformed.
pub fn check_dense(checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    let config = checkpoint.config();
    let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
    checkpoint.dense("model.embed_tokens.weight", vocabulary, hidden)?;
    if !config.tie_word_embeddings {
        checkpoint.dense("lm_head.weight", vocabulary, hidden)?;
    }
    checkpoint.vector("model.norm.weight", hidden)?;
    for layer in 0..config.layers {
        for (name, length) in norms(config, layer) {
            checkpoint.vector(&name, length)?;
        }
        for spec in LinearRole::ALL.map(|role| role.spec(config, layer)) {
            checkpoint.dense(&spec.weight_name(), spec.out_features, spec.in_features)?;
            if spec.bias {
                checkpoint.vector(&spec.bias_name(), spec.out_features)?;
            }
        }
    }
    Ok(())
}
