//! The fields that completions and chat completions share.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::structured::StructuredOutput;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

const NUMBER: &str = "a number";
const COUNT: &str = "an integer of at least 0";
const BOOLEAN: &str = "true or false";
const TOKEN_IDS: &str = "a list of token ids";
const COUNT_OR_ALL: &str = "an integer of at least -1";

/// How to generate: OpenAI's fields and vLLM's, as they were sent.
#[derive(Debug, Default)]
pub(crate) struct GenerationFields {
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: Option<u32>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    /// 0 and -1 stand for all tokens.
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    /// Token ids, in decimal, to what is added to their logits.
    pub(crate) logit_bias: BTreeMap<String, f32>,
    pub(crate) seed: Option<i64>,
    pub(crate) n: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) allowed_token_ids: Option<Vec<u32>>,
    pub(crate) bad_words: Vec<String>,
    /// -1 stands for the whole vocabulary.
    pub(crate) prompt_logprobs: Option<i64>,
    /// -1 stands for what fits.
    pub(crate) truncate_prompt_tokens: Option<i64>,
    pub(crate) return_token_ids: bool,
    pub(crate) return_tokens_as_token_ids: bool,
    pub(crate) request_id: Option<String>,
    pub(crate) cache_salt: Option<String>,
    /// Lower is served first.
    pub(crate) priority: i32,
    /// The form that the answer must have.
    pub(crate) structured: Option<StructuredOutput>,
    pub(crate) stream: bool,
    pub(crate) stream_options: Option<StreamOptions>,
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// Whether a last chunk reports the usage.
    #[serde(default)]
    pub(crate) include_usage: bool,
    /// Whether each chunk reports the usage so far; vLLM's field.
    #[serde(default)]
    pub(crate) continuous_usage_stats: bool,
}

/// One string or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Strings {
    One(String),
    Several(Vec<String>),
}

impl GenerationFields {
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let stop = match fields.take("stop", "a string or a list of strings")? {
            None => Vec::new(),
            Some(Strings::One(stop)) => vec![stop],
            Some(Strings::Several(stops)) => stops,
        };
        // Tokenizers of the kind that is supported never put spaces between them, whatever this says.
        let _: Option<bool> = fields.take("spaces_between_special_tokens", BOOLEAN)?;
        Ok(Self {
            model: fields.take("model", "the name of a model")?,
            max_tokens: fields.take("max_tokens", COUNT)?,
            min_tokens: fields.take("min_tokens", COUNT)?,
            temperature: fields.take("temperature", NUMBER)?,
            top_p: fields.take("top_p", NUMBER)?,
            top_k: fields.take("top_k", "an integer")?,
            min_p: fields.take("min_p", NUMBER)?,
            repetition_penalty: fields.take("repetition_penalty", NUMBER)?,
            frequency_penalty: fields.take("frequency_penalty", NUMBER)?,
            presence_penalty: fields.take("presence_penalty", NUMBER)?,
            logit_bias: fields.take("logit_bias", "an object of token ids to numbers")?.unwrap_or_default(),
            seed: fields.take("seed", "an integer of 64 bits")?,
            n: fields.take("n", "an integer of at least 1")?,
            stop,
            stop_token_ids: fields.take("stop_token_ids", TOKEN_IDS)?.unwrap_or_default(),
            include_stop_str_in_output: fields.take("include_stop_str_in_output", BOOLEAN)?.unwrap_or(false),
            ignore_eos: fields.take("ignore_eos", BOOLEAN)?.unwrap_or(false),
            skip_special_tokens: fields.take("skip_special_tokens", BOOLEAN)?.unwrap_or(true),
            allowed_token_ids: fields.take("allowed_token_ids", TOKEN_IDS)?,
            bad_words: fields.take("bad_words", "a list of strings")?.unwrap_or_default(),
            prompt_logprobs: fields.take("prompt_logprobs", COUNT_OR_ALL)?,
            truncate_prompt_tokens: fields.take("truncate_prompt_tokens", COUNT_OR_ALL)?,
            return_token_ids: fields.take("return_token_ids", BOOLEAN)?.unwrap_or(false),
            return_tokens_as_token_ids: fields.take("return_tokens_as_token_ids", BOOLEAN)?.unwrap_or(false),
            request_id: fields.take("request_id", "a string")?,
            cache_salt: fields.take("cache_salt", "a string")?,
            priority: fields.take("priority", "an integer of 32 bits")?.unwrap_or(0),
            structured: StructuredOutput::take(fields)?,
            stream: fields.take("stream", BOOLEAN)?.unwrap_or(false),
            stream_options: fields.take("stream_options", "an object with include_usage")?,
        })
    }
}
