//! `/v1/embeddings`: request and response.

use serde::{Deserialize, Serialize};

use super::completions::Prompts;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

/// An embedding request, as it was sent.
#[derive(Debug)]
pub(crate) struct EmbeddingRequest {
    pub(crate) model: Option<String>,
    pub(crate) input: Prompts,
    pub(crate) encoding_format: EncodingFormat,
    pub(crate) dimensions: Option<u32>,
    /// What the model wants if absent.
    pub(crate) pooling: Option<PoolingField>,
    /// -1 stands for what fits.
    pub(crate) truncate_prompt_tokens: Option<i64>,
    pub(crate) add_special_tokens: bool,
    pub(crate) request_id: Option<String>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) priority: i32,
}

/// How the numbers of an embedding are written.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EncodingFormat {
    /// As a list.
    #[default]
    Float,
    /// Their bytes, as little-endian 32-bit numbers, in base64.
    Base64,
}

/// How the hidden states of an input become one.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PoolingField {
    Mean,
    Last,
}

impl TryFrom<Fields> for EmbeddingRequest {
    type Error = ApiError;

    fn try_from(mut fields: Fields) -> Result<Self, ApiError> {
        const INPUT: &str = "a string, a list of strings, a list of token ids or a list of such lists";
        let request = Self {
            model: fields.take("model", "the name of a model")?,
            input: fields.require("input", INPUT)?,
            encoding_format: fields.take("encoding_format", "\"float\" or \"base64\"")?.unwrap_or_default(),
            dimensions: fields.take("dimensions", "an integer of at least 1")?,
            pooling: fields.take("pooling", "\"mean\" or \"last\"")?,
            truncate_prompt_tokens: fields.take("truncate_prompt_tokens", "an integer of at least -1")?,
            add_special_tokens: fields.take("add_special_tokens", "true or false")?.unwrap_or(true),
            request_id: fields.take("request_id", "a string")?,
            cache_salt: fields.take("cache_salt", "a string")?,
            priority: fields.take("priority", "an integer of 32 bits")?.unwrap_or(0),
        };
        fields.finish()?;
        Ok(request)
    }
}

/// The embeddings of all inputs.
#[derive(Debug, Serialize)]
pub(crate) struct EmbeddingResponse {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) data: Vec<EmbeddingEntry>,
    pub(crate) usage: EmbeddingUsage,
}

/// The embedding of one input.
#[derive(Debug, Serialize)]
pub(crate) struct EmbeddingEntry {
    pub(crate) object: &'static str,
    pub(crate) index: usize,
    pub(crate) embedding: EmbeddingValues,
}

/// The numbers of an embedding.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum EmbeddingValues {
    Float(Vec<f32>),
    Base64(String),
}

/// Tokens that the inputs have.
#[derive(Debug, Serialize)]
pub(crate) struct EmbeddingUsage {
    pub(crate) prompt_tokens: usize,
    pub(crate) total_tokens: usize,
}
