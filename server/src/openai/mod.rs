//! The OpenAI API: one file for each endpoint, its requests and responses under `types`.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod fields;
mod logprobs;
pub(crate) mod models;
pub(crate) mod tokenize;
pub(crate) mod types;

use std::sync::Arc;

use crate::app::AppState;
use error::ApiError;

/// Runs what takes time on a thread that may block.
async fn blocking<T: Send + 'static>(
    state: &Arc<AppState>,
    work: impl FnOnce(&AppState) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let state = Arc::clone(state);
    tokio::task::spawn_blocking(move || work(&state)).await.unwrap_or_else(|error| {
        Err(ApiError::Internal { message: format!("preparing the request failed: {error}") })
    })
}
