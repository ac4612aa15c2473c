//! `GET /v1/models`: the one model that is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::error::ApiError;
use crate::app::AppState;

/// A list of models.
#[derive(Debug, Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ModelEntry>,
}

/// A model.
#[derive(Debug, Serialize)]
pub(crate) struct ModelEntry {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The longest sequence that fits, prompt and completion together; vLLM's field.
    max_model_len: usize,
}

fn entry(state: &AppState) -> ModelEntry {
    ModelEntry {
        id: state.model.name.clone(),
        object: "model",
        created: state.started_at,
        owned_by: "nibble",
        max_model_len: state.model.engine.maximum_tokens(),
    }
}

/// Every model that is served.
pub(crate) async fn list(State(state): State<Arc<AppState>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![entry(&state)] })
}

/// One model by its name.
pub(crate) async fn one(
    State(state): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> Result<Json<ModelEntry>, ApiError> {
    if name == state.model.name {
        return Ok(Json(entry(&state)));
    }
    Err(ApiError::ModelNotFound { found: name, expected: state.model.name.clone() })
}
