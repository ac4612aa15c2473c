//! The admin address: what changes the server's state.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::ORIGIN;
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::AppState;
use crate::openai::error::ApiError;

/// `POST /admin/drain`: the server finishes what it accepted and ends, as after SIGTERM.
pub(crate) async fn drain(State(state): State<Arc<AppState>>) -> (StatusCode, Json<Value>) {
    tracing::info!("the admin address was asked to stop the server");
    state.drain.notify_one();
    (StatusCode::ACCEPTED, Json(json!({ "status": "draining" })))
}

/// `POST /admin/reset_prefix_cache`, vLLM's `/reset_prefix_cache`: requests that come later find no prefix of those that
/// have ended.
pub(crate) async fn reset_prefix_cache(State(state): State<Arc<AppState>>) -> Json<Value> {
    tracing::info!("the admin address was asked to reset the prefix cache");
    state.model.engine.reset_prefix_cache();
    Json(json!({ "status": "reset" }))
}

/// Refuses what a page in a browser sends, which may come from anywhere: without keys, being on this machine is all
/// that lets a request in.
pub(crate) async fn refuse_web_pages(request: Request, next: Next) -> Result<Response, ApiError> {
    if request.headers().contains_key(ORIGIN) {
        return Err(ApiError::FromWebPage);
    }
    Ok(next.run(request).await)
}
