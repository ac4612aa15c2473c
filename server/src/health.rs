//! `/health` and `/ready`: what a supervisor and a load balancer ask.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nibble_engine::Health;
use serde::Serialize;

use crate::app::AppState;

/// The answer of both.
#[derive(Debug, Serialize)]
struct Report {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// `GET /health`: 200 while the engine works, idle or draining too; 503 when it is dead or stuck.
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> Response {
    respond(&state, true)
}

/// `GET /ready`: 200 while requests are accepted.
pub(crate) async fn ready(State(state): State<Arc<AppState>>) -> Response {
    respond(&state, false)
}

fn respond(state: &AppState, draining_is_fine: bool) -> Response {
    let engine = &state.model.engine;
    // An idle engine's last step has no age, however long ago it was.
    let stuck_for = engine.last_step_age().filter(|&age| age >= state.options.stuck_after);
    let (healthy, status, message) = match (engine.health(), stuck_for) {
        (Health::Failed { message }, _) => (false, "failed", Some(message)),
        (Health::Stopped, _) => (false, "stopped", None),
        (_, Some(age)) => {
            (false, "stuck", Some(format!("no step was finished in the last {} seconds", age.as_secs())))
        }
        (Health::Draining, None) => (draining_is_fine, "draining", None),
        (Health::Ready, None) => (true, "ok", None),
    };
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Report { status, message })).into_response()
}
