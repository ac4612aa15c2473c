//! API keys: a request without a known one is refused, whatever it asks for.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq;

use crate::app::AppState;
use crate::openai::error::ApiError;

/// Whether `key` is one of `keys`; without any, everybody is let in. Takes the same time for every wrong key of
/// one length.
fn accepts(keys: &[String], key: &[u8]) -> bool {
    let one_of_them = keys.iter().fold(0, |found, known| found | known.as_bytes().ct_eq(key).unwrap_u8());
    keys.is_empty() || one_of_them == 1
}

/// Lets requests with a key pass.
pub(crate) async fn require_key(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let header = request.headers().get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let key = header.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    if !accepts(&state.options.api_keys, key.map_or(&b""[..], |(_, key)| key)) {
        return Err(ApiError::Unauthorized);
    }
    Ok(next.run(request).await)
}
