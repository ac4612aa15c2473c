//! What surrounds every request: its id, its span, its line in the access log, its count.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use opentelemetry::trace::SpanContext;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::app::AppState;
use crate::metrics::HttpRequest;
use crate::traces::Traces;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a client.
const MAXIMUM_ID_BYTES: usize = 128;

/// Names a request in logs, in its answer and in the `x-request-id` header, and says when it arrived.
#[derive(Clone, Debug)]
pub(crate) struct RequestIdentity {
    pub(crate) id: String,
    pub(crate) arrived_at: Instant,
    /// The client's span; invalid if it told of none, or spans are not exported.
    pub(crate) parent: SpanContext,
}

/// Gives a request its identity, and logs and counts it when its response begins.
pub(crate) async fn observe(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let arrived_at = Instant::now();
    let id = given_id(&request).unwrap_or_else(|| Uuid::new_v4().simple().to_string());
    let header = HeaderValue::from_str(&id).ok();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let handler =
        request.extensions().get::<MatchedPath>().map_or("none".to_owned(), |path| path.as_str().to_owned());
    let request_bytes = known_bytes(request.body());
    let span = tracing::info_span!("request", %id);
    let parent = match &state.options.traces {
        Some(_) => Traces::parent(request.headers()),
        None => SpanContext::NONE,
    };
    request.extensions_mut().insert(RequestIdentity { id, arrived_at, parent });
    let mut response = next.run(request).instrument(span.clone()).await;
    if let Some(header) = header {
        response.headers_mut().insert(X_REQUEST_ID, header);
    }
    let (status, elapsed) = (response.status().as_u16(), arrived_at.elapsed());
    state.metrics.http(HttpRequest {
        handler: &handler,
        method: known_method(method.as_str()),
        status,
        elapsed,
        request_bytes,
        response_bytes: known_bytes(response.body()),
    });
    span.in_scope(|| {
        tracing::info!(%method, path, status, milliseconds = elapsed.as_millis() as u64, "answered");
    });
    // What a stream logs later belongs to the request as well.
    if response.body().size_hint().exact().is_none() {
        response = response.map(|body| Body::new(BodyInSpan { body, span }));
    }
    response
}

/// A body that is written within the span of its request.
struct BodyInSpan {
    body: Body,
    span: Span,
}

impl HttpBody for BodyInSpan {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, span } = &mut *self;
        let _inside = span.enter();
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of a body whose length is known in advance, else 0.
fn known_bytes(body: &impl HttpBody) -> u64 {
    body.size_hint().exact().unwrap_or(0)
}

/// The client's own id, when it is a plain word.
fn given_id(request: &Request) -> Option<String> {
    let id = request.headers().get(X_REQUEST_ID)?.to_str().ok()?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b':');
    (!id.is_empty() && id.len() <= MAXIMUM_ID_BYTES && id.bytes().all(plain)).then(|| id.to_owned())
}

/// `method`, or "other" for one that HTTP does not know: clients may invent them.
fn known_method(method: &str) -> &str {
    match method {
        "GET" | "POST" | "PUT" | "DELETE" | "HEAD" | "OPTIONS" | "PATCH" => method,
        _ => "other",
    }
}
