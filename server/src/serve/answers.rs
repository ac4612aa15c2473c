//! The answers of one connection: whether any is open, and which of them nobody takes.
//!
//! HTTP/1 gives one answer at a time, and what its client does not take blocks the connection, where it is noticed.
//! Over HTTP/2 every answer has a window of its own: a client may leave one alone and go on with the others. So answers
//! are handed over in pieces there, and one whose next piece nobody asks for is given up by itself.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use http::Version;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Most bytes of an answer that are handed over at once, and wait in memory behind a window that its client keeps shut.
const PIECE_BYTES: usize = 16 << 10;

/// The client did not take the answer in time.
#[derive(Debug, thiserror::Error)]
#[error("the client took nothing of the answer for too long")]
struct NotTaken;

/// The requests of one connection that have not had all of their answer.
pub(super) struct OpenAnswers {
    state: Mutex<State>,
}

struct State {
    /// By number; absent while the answer has not begun.
    open: BTreeMap<u64, Option<Arc<Mutex<Answer>>>>,
    next_number: u64,
    /// When the last one was over, or the connection began.
    idle_since: Instant,
}

/// An answer that has begun.
struct Answer {
    /// What is still to come; absent once it was given up.
    body: Option<Body>,
    /// The part of a frame of `body` that was not handed over yet.
    rest: Bytes,
    /// When a piece was handed over, until the next one is asked for.
    offered_at: Option<Instant>,
}

impl OpenAnswers {
    /// Of a connection that begins now.
    pub(super) fn new() -> Self {
        let state = State { open: BTreeMap::new(), next_number: 0, idle_since: Instant::now() };
        Self { state: Mutex::new(state) }
    }

    /// Counts a request as open until the place is gone, or the body that it makes.
    pub(super) fn begin(self: &Arc<Self>, version: Version) -> Place {
        let mut state = self.state();
        let number = state.next_number;
        state.next_number += 1;
        state.open.insert(number, None);
        Place { answers: Arc::clone(self), number, in_pieces: version == Version::HTTP_2 }
    }

    /// How long no request has been open.
    pub(super) fn idle_for(&self) -> Duration {
        let state = self.state();
        if state.open.is_empty() { state.idle_since.elapsed() } else { Duration::ZERO }
    }

    /// Gives up the answers of which a piece has been waiting for `timeout`: their sequences end, and who asks for more
    /// gets an error.
    pub(super) fn give_up_untaken(&self, timeout: Duration) {
        let answers: Vec<_> = self.state().open.iter().filter_map(|(&n, a)| Some((n, a.clone()?))).collect();
        for (number, answer) in answers {
            let mut answer = lock(&answer);
            if answer.offered_at.is_some_and(|offered_at| offered_at.elapsed() >= timeout) {
                tracing::debug!("an answer that nobody takes is given up");
                answer.rest = Bytes::new();
                answer.body = None;
                self.state().close(number);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    fn close(&mut self, number: u64) {
        if self.open.remove(&number).is_some() && self.open.is_empty() {
            self.idle_since = Instant::now();
        }
    }
}

/// What keeps a request open.
pub(super) struct Place {
    answers: Arc<OpenAnswers>,
    number: u64,
    in_pieces: bool,
}

impl Place {
    /// `body` as the answer of the request, which is open until that is sent or dropped.
    pub(super) fn answer(self, body: Body) -> Body {
        let answer = Arc::new(Mutex::new(Answer { body: Some(body), rest: Bytes::new(), offered_at: None }));
        if self.in_pieces {
            self.answers.state().open.insert(self.number, Some(Arc::clone(&answer)));
        }
        Body::new(WatchedBody { answer, place: self })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.answers.state().close(self.number);
    }
}

/// The body of an answer, as it is taken.
struct WatchedBody {
    answer: Arc<Mutex<Answer>>,
    place: Place,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut answer = lock(&self.answer);
        answer.offered_at = None;
        if answer.rest.is_empty() {
            let Some(body) = &mut answer.body else {
                return Poll::Ready(Some(Err(axum::Error::new(NotTaken))));
            };
            let frame = match ready!(Pin::new(body).poll_frame(context)) {
                Some(Ok(frame)) if self.place.in_pieces => frame,
                other => return Poll::Ready(other),
            };
            match frame.into_data() {
                Ok(data) => answer.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let length = answer.rest.len().min(PIECE_BYTES);
        answer.offered_at = Some(Instant::now());
        Poll::Ready(Some(Ok(Frame::data(answer.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        let answer = lock(&self.answer);
        answer.rest.is_empty() && answer.body.as_ref().is_some_and(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let answer = lock(&self.answer);
        let rest = answer.rest.len() as u64;
        let hint = answer.body.as_ref().map(HttpBody::size_hint).unwrap_or_default();
        let mut with_rest = SizeHint::new();
        with_rest.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            with_rest.set_upper(upper + rest);
        }
        with_rest
    }
}

/// A panic elsewhere leaves nothing half-written: every writer assigns whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
