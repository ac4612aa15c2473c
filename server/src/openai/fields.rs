//! The fields of a request body: each is taken by name, and what is left over is refused by name.
//!
//! `null` counts as absent, as OpenAI's clients send it.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// The largest body the server reads, in bytes: far more text than any context holds.
pub(crate) const BODY_LIMIT_BYTES: usize = 8 << 20;

/// Fields that change nothing about the answer here: about the account, the bill or a cache.
const WITHOUT_EFFECT: [&str; 6] =
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"];

/// The fields of a JSON object that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Fields {
    object: Map<String, Value>,
}

impl Fields {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut object: Map<String, Value> = serde_json::from_slice(body)
            .map_err(|error| ApiError::InvalidJson { problem: error.to_string() })?;
        object.retain(|_, value| !value.is_null());
        Ok(Self { object })
    }

    /// Takes the field `name`, if it is there. `expected` describes its type to the user.
    pub(crate) fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.object.shift_remove(name) else { return Ok(None) };
        serde_path_to_error::deserialize(&value).map(Some).map_err(|error| {
            let path = error.path().to_string();
            if path == "." {
                return ApiError::invalid(name, short(&value), expected);
            }
            let separator = if path.starts_with('[') { "" } else { "." };
            let param = format!("{name}{separator}{path}");
            let message = format!("{param}: {}", error.inner());
            ApiError::InvalidField { param, message }
        })
    }

    /// Takes the field `name`, which must be there.
    pub(crate) fn require<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<T, ApiError> {
        self.take(name, expected)?
            .ok_or_else(|| ApiError::MissingField { param: name.to_owned(), expected: expected.to_owned() })
    }

    /// Refuses what was not taken, unless it changes nothing.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        for (param, value) in self.object {
            if WITHOUT_EFFECT.contains(&param.as_str()) {
                continue;
            }
            match is_neutral(&param, &value) {
                None => return Err(ApiError::UnknownField { param }),
                Some(false) => return Err(ApiError::UnsupportedField { param, found: short(&value) }),
                Some(true) => {}
            }
        }
        Ok(())
    }
}

/// Whether `value` is what leaving out the unsupported field `name` means; `None` when no API has this field.
fn is_neutral(name: &str, value: &Value) -> Option<bool> {
    let empty = || value.as_array().is_some_and(Vec::is_empty);
    Some(match name {
        "tools" | "functions" => empty(),
        "tool_choice" | "function_call" => value == "none" || value == "auto",
        "suffix" => value == "",
        "modalities" => value.as_array().is_some_and(|modes| modes.iter().all(|mode| mode == "text")),
        "best_of" => value == 1,
        "length_penalty" => value.as_f64() == Some(1.0),
        "max_repetition_pattern_size" | "min_repetition_pattern_size" | "repetition_min_count" => value == 0,
        // A completion has no message to split thoughts from.
        "include_reasoning" => value == true,
        "use_beam_search" | "web_search_options" => value == false,
        "audio"
        | "prediction"
        | "prompt_embeds"
        | "reasoning_effort"
        | "verbosity"
        | "mm_processor_kwargs"
        | "logits_processors"
        | "kv_transfer_params"
        | "vllm_xargs"
        | "guided_json"
        | "guided_regex"
        | "guided_choice"
        | "guided_grammar"
        | "guided_decoding_backend"
        | "guided_whitespace_pattern" => false,
        _ => return None,
    })
}

/// `value` as JSON, cut after 80 characters.
pub(crate) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let content_type =
            request.headers().get(CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
        // Demanding JSON keeps pages of other sites from sending requests through a browser unasked.
        let essence =
            content_type.as_deref().unwrap_or("missing").split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::UnsupportedMediaType { found: essence.to_owned() });
        }
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| ApiError::unreadable(&rejection, BODY_LIMIT_BYTES))?;
        Self::parse(&body)
    }
}
