//! `/health` and `/ready`: what a supervisor and a load balancer ask.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nibble_engine::{EngineHandle, Health};
use serde::Serialize;

use crate::app::AppState;

/// Time without a finished step, while there is work, after which the engine counts as stuck. Far above the
/// time of the longest step, so that a slow machine under load is not restarted.
pub(crate) const STUCK_AFTER: Duration = Duration::from_secs(120);

/// The answer of both.
#[derive(Debug, Serialize)]
struct Report {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// `GET /health`: 200 while the engine works, idle or draining too; 503 when it is dead or stuck.
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> Response {
    respond(&state.model.engine, true)
}

/// `GET /ready`: 200 while requests are accepted.
pub(crate) async fn ready(State(state): State<Arc<AppState>>) -> Response {
    respond(&state.model.engine, false)
}

fn respond(engine: &EngineHandle, draining_is_fine: bool) -> Response {
    let (healthy, status, message) = match (engine.health(), stuck_for(engine.stats().last_step_age)) {
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

/// The age of the last step, when it is too old; an idle engine has none.
fn stuck_for(last_step_age: Option<Duration>) -> Option<Duration> {
    last_step_age.filter(|&age| age >= STUCK_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_old_step_with_work_pending_counts_as_stuck() {
        assert_eq!(stuck_for(None), None);
        assert_eq!(stuck_for(Some(STUCK_AFTER - Duration::from_millis(1))), None);
        assert_eq!(stuck_for(Some(STUCK_AFTER)), Some(STUCK_AFTER));
    }
}
