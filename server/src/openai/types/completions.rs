//! `/v1/completions`: request, response, chunk of a stream.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::common::{PromptLogprobs, Usage};
use super::sampling::GenerationFields;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

/// A completion request, as it was sent.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) generation: GenerationFields,
    pub(crate) prompt: Prompts,
    pub(crate) echo: bool,
    pub(crate) logprobs: Option<u32>,
    pub(crate) add_special_tokens: bool,
}

/// One prompt or several, as text or as tokens.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    /// The tokens of each; texts are turned into them by `encode`.
    pub(crate) fn token_ids<E>(
        self,
        encode: impl Fn(String) -> Result<Vec<u32>, E>,
    ) -> Result<Vec<Vec<u32>>, E> {
        match self {
            Self::Text(text) => Ok(vec![encode(text)?]),
            Self::Texts(texts) => texts.into_iter().map(encode).collect(),
            Self::Tokens(tokens) => Ok(vec![tokens]),
            Self::TokenLists(lists) => Ok(lists),
        }
    }
}

impl TryFrom<Fields> for CompletionRequest {
    type Error = ApiError;

    fn try_from(mut fields: Fields) -> Result<Self, ApiError> {
        const BOOLEAN: &str = "true or false";
        const PROMPT: &str = "a string, a list of strings, a list of token ids or a list of such lists";
        let request = Self {
            prompt: fields.require("prompt", PROMPT)?,
            echo: fields.take("echo", BOOLEAN)?.unwrap_or(false),
            logprobs: fields.take("logprobs", "an integer of at least 0")?,
            add_special_tokens: fields.take("add_special_tokens", BOOLEAN)?.unwrap_or(true),
            generation: GenerationFields::take(&mut fields)?,
        };
        fields.finish()?;
        Ok(request)
    }
}

/// A whole completion, or a part of a streamed one.
#[derive(Debug, Serialize)]
pub(crate) struct CompletionResponse {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
}

/// One completion, or what a chunk adds to it.
#[derive(Debug, Serialize)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    /// Absent while it goes on.
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
    /// In a stream, in the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
}

/// Log probabilities in columns, one entry for each token.
#[derive(Debug, Default, Serialize)]
pub(crate) struct CompletionLogprobs {
    /// Where the token begins in the text, in characters.
    pub(crate) text_offset: Vec<usize>,
    /// Null for the first token of a prompt, which nothing comes before.
    pub(crate) token_logprobs: Vec<Option<f32>>,
    pub(crate) tokens: Vec<String>,
    /// The most likely tokens in its place, and itself; null as well.
    pub(crate) top_logprobs: Vec<Option<TopLogprobs>>,
}

/// Texts of tokens and their log probabilities, as an object.
#[derive(Debug)]
pub(crate) struct TopLogprobs(pub(crate) Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}
