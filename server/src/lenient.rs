//! Fields that nobody knows, for clients that send them all the same: ignored, and named in the answer.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

/// The header that names what was ignored.
const HEADER: HeaderName = HeaderName::from_static("x-nibble-ignored-fields");
/// Most bytes of the header's value; names beyond are left out.
const MAXIMUM_HEADER_BYTES: usize = 1024;
/// Most names that are remembered as logged: clients may invent them.
const MAXIMUM_LOGGED_NAMES: usize = 256;

/// The fields of one request that were ignored. Present in a request's extensions exactly when they may be.
#[derive(Clone, Debug, Default)]
pub(crate) struct IgnoredFields(Arc<Mutex<Vec<String>>>);

impl IgnoredFields {
    /// Notes that the field `name` was ignored.
    pub(crate) fn add(&self, name: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(name);
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The names that were logged once.
#[derive(Debug, Default)]
pub(crate) struct LoggedNames(Mutex<BTreeSet<String>>);

impl LoggedNames {
    /// Whether `name` comes for the first time.
    fn is_new(&self, name: &str) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logged.len() < MAXIMUM_LOGGED_NAMES && logged.insert(name.to_owned())
    }
}

/// Lets a request's unknown fields pass, names them in its answer's header, and logs each name once.
pub(crate) async fn ignore_unknown_fields(
    State(logged): State<Arc<LoggedNames>>,
    mut request: Request,
    next: Next,
) -> Response {
    let fields = IgnoredFields::default();
    request.extensions_mut().insert(fields.clone());
    let mut response = next.run(request).await;
    let names: Vec<String> = fields.take().iter().map(|name| printable(name)).collect();
    for name in &names {
        if logged.is_new(name) {
            tracing::warn!(field = name, "a field of a request is not supported and was ignored");
        }
    }
    if let Some(value) = header(&names) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

/// The names, with commas between, as many as fit.
fn header(names: &[String]) -> Option<HeaderValue> {
    let mut value = String::new();
    for name in names {
        let separator = if value.is_empty() { "" } else { ", " };
        if value.len() + separator.len() + name.len() > MAXIMUM_HEADER_BYTES {
            break;
        }
        value.push_str(separator);
        value.push_str(name);
    }
    if value.is_empty() { None } else { HeaderValue::from_str(&value).ok() }
}

/// `name` in characters that a header may hold, cut after 64: those that it may not are written as "?".
fn printable(name: &str) -> String {
    let plain =
        |character: char| if character.is_ascii_graphic() && character != ',' { character } else { '?' };
    name.chars().take(64).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_header_may_hold_are_written_without_what_it_may_not() {
        let names: Vec<String> =
            ["a\r\nset-cookie: x", "b,c", "日"].iter().map(|name| printable(name)).collect();
        assert_eq!(header(&names).unwrap(), "a??set-cookie:?x, b?c, ?");
        assert_eq!(header(&[]), None);
        let many: Vec<String> = (0..1000).map(|name| name.to_string()).collect();
        assert!(header(&many).unwrap().len() <= MAXIMUM_HEADER_BYTES);
    }

    #[test]
    fn a_name_is_new_once_and_their_number_is_bounded() {
        let logged = LoggedNames::default();
        assert!(logged.is_new("a") && !logged.is_new("a"));
        let new = (0..2 * MAXIMUM_LOGGED_NAMES).filter(|name| logged.is_new(&name.to_string())).count();
        assert_eq!(new, MAXIMUM_LOGGED_NAMES - 1);
    }
}
