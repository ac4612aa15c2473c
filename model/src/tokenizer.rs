//! Text to token ids and back, by the tokenizer.json of a model directory.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer as HuggingFaceTokenizer;

use crate::config::ModelConfig;
use crate::error::CheckpointError;

/// The tokenizer of a model.
pub struct Tokenizer {
    inner: HuggingFaceTokenizer,
    file: PathBuf,
}

impl Tokenizer {
    /// Opens tokenizer.json of `directory`.
    ///
    /// # Errors
    /// When it is missing or malformed, or gives ids that the model `config` has no embedding for.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<Self, CheckpointError> {
        let file = directory.join("tokenizer.json");
        let text = std::fs::read(&file).map_err(CheckpointError::io("read", &file))?;
        let inner = HuggingFaceTokenizer::from_bytes(&text).map_err(|error| {
            CheckpointError::malformed(&file, error, "fetch the model again or import it again")
        })?;
        let largest = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id);
        if let Some((token, id)) = largest.filter(|&(_, id)| id as usize >= config.vocabulary_size) {
            let size = config.vocabulary_size;
            return Err(CheckpointError::Mismatch {
                file,
                item: format!("token {token:?}"),
                found: format!("id {id}"),
                expected: format!("an id below the model's vocab_size {size}"),
                help: "the tokenizer belongs to another model".to_owned(),
            });
        }
        Ok(Self { inner, file })
    }

    /// The tokens of `text`, with the special tokens the model expects around it or without.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, CheckpointError> {
        match self.inner.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(self.failed("encode a text", &error)),
        }
    }

    /// The text of `ids`, with special tokens or without.
    ///
    /// # Errors
    /// When the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, CheckpointError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| self.failed("decode tokens", &error))
    }

    fn failed(&self, what: &str, error: &tokenizers::Error) -> CheckpointError {
        let problem = format!("the tokenizer cannot {what}: {error}");
        CheckpointError::malformed(&self.file, problem, "fetch the model again or import it again")
    }
}
