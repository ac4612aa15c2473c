//! The model in a GGUF file, as a Hugging Face directory would hold it: shape, tokenizer and chat template from the
//! metadata ([`architecture`], [`rope`], [`tokenizer`]), tensors by their Hugging Face names ([`tensors`]) with their
//! rows in Hugging Face's order ([`weights`]).
//!
//! Nothing is copied: the file stays mapped, and a tensor is read when it is asked for. Both users, `nibble import` and
//! [`crate::checkpoint::Checkpoint`], see the same model.
//!
//! llama.cpp stores the query and key projections of Llama models with the two halves of each head interleaved;
//! that is undone where rows are read.
//!
//! Refused by name: other architectures than llama, qwen2 and qwen3, mixtures of experts, files of several
//! parts, tensors that the architecture has no place for.

mod architecture;
mod rope;
mod tensors;
mod tokenizer;
mod weights;

use std::collections::HashMap;
use std::path::Path;

use nibble_kernels::tensor::FloatType;

use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::gguf::GgufFile;
pub(crate) use tensors::{RowOrder, TensorPlan};
pub(crate) use tokenizer::GgufTokenizer;

/// The model of a GGUF file.
pub(crate) struct GgufModel {
    file: GgufFile,
    config: ModelConfig,
    padding_token: Option<u32>,
    /// In the order of the model.
    tensors: Vec<TensorPlan>,
    by_name: HashMap<String, usize>,
}

impl GgufModel {
    /// Opens the file at `path` and checks everything but the elements. Its floating-point type, where one is asked for,
    /// is said to be `float_type`.
    ///
    /// # Errors
    /// Names the metadata or tensor that is missing, malformed or not supported.
    pub(crate) fn open(path: &Path, float_type: FloatType) -> Result<Self, CheckpointError> {
        let file = GgufFile::open(path)?;
        let mut config = shape(&file, float_type)?;
        let tensors = tensors::plan(&file, &config)?;
        let ids = tokenizer::token_ids(&file, &config)?;
        config.bos_token_id = ids.bos;
        config.eos_token_ids = ids.eos;
        let by_name = tensors.iter().enumerate().map(|(index, plan)| (plan.name.clone(), index)).collect();
        Ok(Self { file, config, padding_token: ids.pad, tensors, by_name })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The model's shape.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The padding token, if it has one.
    pub(crate) fn padding_token(&self) -> Option<u32> {
        self.padding_token
    }

    /// Every tensor, in the order of the model.
    pub(crate) fn tensors(&self) -> &[TensorPlan] {
        &self.tensors
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        self.file.tensors().map(|tensor| tensor.data.len() as u64).sum()
    }

    /// Whether there is a tensor of this Hugging Face name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Reads the tokenizer.
    ///
    /// # Errors
    /// Names the metadata that is missing, malformed or not supported.
    pub(crate) fn tokenizer(&self) -> Result<GgufTokenizer, CheckpointError> {
        tokenizer::read(&self.file, &self.config)
    }

    /// Its tokenizer_config.json: special tokens and the chat template.
    ///
    /// # Errors
    /// Names the metadata that is missing, malformed or not supported.
    pub(crate) fn tokenizer_config(&self) -> Result<serde_json::Value, CheckpointError> {
        tokenizer::config_json(&self.file, &self.config)
    }

    /// The chat template, if there is one.
    ///
    /// # Errors
    /// When it is no string.
    pub(crate) fn chat_template(&self) -> Result<Option<&str>, CheckpointError> {
        tokenizer::chat_template(&self.file)
    }
}

/// The shape of the model in `gguf`, said to be of `float_type`. Token ids are left empty.
///
/// # Errors
/// Names the metadata that is missing, malformed or not supported.
pub(crate) fn shape(gguf: &GgufFile, float_type: FloatType) -> Result<ModelConfig, CheckpointError> {
    architecture::read(gguf, float_type)
}
