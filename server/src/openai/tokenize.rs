//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::blocking;
use super::error::ApiError;
use super::fields::Fields;
use crate::app::AppState;

/// The tokens of a text.
#[derive(Debug, Serialize)]
pub(crate) struct Tokens {
    tokens: Vec<u32>,
    count: usize,
    max_model_len: usize,
}

/// The text of tokens.
#[derive(Debug, Serialize)]
pub(crate) struct Text {
    prompt: String,
}

/// Text to tokens.
pub(crate) async fn tokenize(
    State(state): State<Arc<AppState>>,
    mut fields: Fields,
) -> Result<Json<Tokens>, ApiError> {
    let prompt: String = fields.require("prompt", "a string")?;
    let add_special_tokens = fields.take("add_special_tokens", "true or false")?.unwrap_or(true);
    check_model(&state, &mut fields)?;
    fields.finish()?;
    let max_model_len = state.model.engine.maximum_tokens();
    let tokens =
        blocking(&state, move |state| Ok(state.model.tokenizer.encode(&prompt, add_special_tokens)?)).await?;
    Ok(Json(Tokens { count: tokens.len(), tokens, max_model_len }))
}

/// Tokens to text, special tokens included.
pub(crate) async fn detokenize(
    State(state): State<Arc<AppState>>,
    mut fields: Fields,
) -> Result<Json<Text>, ApiError> {
    let tokens: Vec<u32> = fields.require("tokens", "a list of token ids")?;
    check_model(&state, &mut fields)?;
    fields.finish()?;
    let prompt = blocking(&state, move |state| Ok(state.model.tokenizer.decode(&tokens, false)?)).await?;
    Ok(Json(Text { prompt }))
}

fn check_model(state: &AppState, fields: &mut Fields) -> Result<(), ApiError> {
    let name: Option<String> = fields.take("model", "the name of a model")?;
    state.model.check_name(name.as_deref())
}
