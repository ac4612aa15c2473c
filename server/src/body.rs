//! Request bodies that come too slowly are given up.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use tokio::time::Sleep;

/// A body did not come in time.
#[derive(Debug, thiserror::Error)]
#[error("the body did not arrive within {} seconds", timeout.as_secs_f32())]
pub(crate) struct BodyTimedOut {
    /// The time it had.
    pub(crate) timeout: Duration,
}

impl BodyTimedOut {
    /// Finds it among the causes of `error`.
    pub(crate) fn cause_of<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref())
    }
}

/// Gives the whole body of a request `timeout`.
pub(crate) async fn limit_body_time(
    State(timeout): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    let timed = |body: Body| {
        if body.is_end_stream() {
            return body;
        }
        Body::new(TimedBody { body, timeout, deadline: Box::pin(tokio::time::sleep(timeout)) })
    };
    next.run(request.map(timed)).await
}

struct TimedBody {
    body: Body,
    timeout: Duration,
    deadline: Pin<Box<Sleep>>,
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        ready!(self.deadline.as_mut().poll(context));
        Poll::Ready(Some(Err(axum::Error::new(BodyTimedOut { timeout: self.timeout }))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
