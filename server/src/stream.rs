//! Server-sent events: a generation as a stream of chunks, ending with `[DONE]`.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use futures_util::FutureExt;
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use crate::generation::{ChoiceEvent, Generation};
use crate::openai::error::ApiError;
use crate::openai::types::common::Usage;
use crate::openai::types::sampling::StreamOptions;

/// Bytes of events after which a frame is handed over although more events are ready, so that a client that reads
/// slowly does not have its whole answer in memory as JSON.
const FRAME_BYTES: usize = 16 << 10;

/// How an endpoint writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// The chunk of the endpoint.
    type Chunk: Serialize;

    /// What comes before the first event of `choice`, if anything does.
    fn opening(&self, choice: usize) -> Option<Self::Chunk>;

    /// An event, with the usage so far if each chunk reports it; `None` if there is nothing to tell yet.
    fn event(&mut self, event: ChoiceEvent, usage: Option<Usage>) -> Option<Self::Chunk>;

    /// The usage of the whole request.
    fn usage(&self, usage: Usage) -> Self::Chunk;
}

/// Streams `generation` as `chunks` writes it. After `keep_alive` without an event a comment is sent, so that
/// no proxy closes the connection of a request that waits.
///
/// Each token is an event of its own. Those that are ready together leave in one frame, which costs one write.
pub(crate) fn stream<C: Chunks>(
    generation: Generation,
    chunks: C,
    options: StreamOptions,
    keep_alive: Duration,
) -> Response {
    let mut frame = Frame::default();
    for chunk in (0..generation.choices()).filter_map(|choice| chunks.opening(choice)) {
        frame.event(&chunk);
    }
    let silence = Box::pin(sleep(keep_alive));
    let events = Events { generation: Some(generation), chunks, options, keep_alive, silence, frame };
    let frames = unfold(events, async |mut events| {
        let frame = events.next().await?;
        Some((Ok::<_, Infallible>(frame), events))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The events of a stream. Dropping it drops the generation, which aborts what still runs.
struct Events<C> {
    /// Absent once the last event is in the frame.
    generation: Option<Generation>,
    chunks: C,
    options: StreamOptions,
    keep_alive: Duration,
    /// Ends when nothing was sent for `keep_alive`.
    silence: Pin<Box<Sleep>>,
    frame: Frame,
}

impl<C: Chunks> Events<C> {
    /// Waits for an event, and takes those with it that are ready, too; `None` after the last.
    async fn next(&mut self) -> Option<Bytes> {
        // Only moves the deadline, which is cheaper than a timer for each event.
        self.silence.as_mut().reset(Instant::now() + self.keep_alive);
        // An event may have nothing to tell yet.
        while let Some(generation) = &mut self.generation
            && self.frame.bytes.is_empty()
        {
            tokio::select! {
                biased;
                event = generation.next() => self.take(event),
                () = &mut self.silence => self.frame.comment("still working"),
            }
        }
        while let Some(generation) = &mut self.generation
            && self.frame.bytes.len() < FRAME_BYTES
            && let Some(event) = generation.next().now_or_never()
        {
            self.take(event);
        }
        self.frame.take()
    }

    /// Writes what `event` tells, or the end when there is none.
    fn take(&mut self, event: Option<Result<ChoiceEvent, ApiError>>) {
        let Some(generation) = &self.generation else { return };
        match event {
            Some(Ok(choice)) => {
                let usage = self.options.continuous_usage_stats.then(|| generation.usage());
                if let Some(chunk) = self.chunks.event(choice, usage) {
                    self.frame.event(&chunk);
                }
                return;
            }
            Some(Err(error)) => {
                tracing::error!(%error, "stream failed");
                self.frame.event(&error.body());
            }
            None if self.options.include_usage => {
                self.frame.event(&self.chunks.usage(generation.usage()));
            }
            None => {}
        }
        self.frame.data(b"[DONE]");
        self.generation = None;
    }
}

/// Events on their way, as bytes.
#[derive(Default)]
struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    /// Adds an event with the JSON of `chunk`, which has no line breaks.
    fn event(&mut self, chunk: &impl Serialize) {
        match serde_json::to_vec(chunk) {
            Ok(json) => self.data(&json),
            Err(error) => {
                let message = format!("cannot write a chunk: {error}");
                tracing::error!(message);
                // The body of an error holds strings only: it always has a JSON form.
                let body = serde_json::to_vec(&ApiError::Internal { message }.body()).unwrap_or_default();
                self.data(&body);
            }
        }
    }

    fn data(&mut self, data: &[u8]) {
        self.bytes.reserve(data.len() + 8);
        self.bytes.extend_from_slice(b"data: ");
        self.bytes.extend_from_slice(data);
        self.bytes.extend_from_slice(b"\n\n");
    }

    /// Adds a line that clients skip.
    fn comment(&mut self, text: &str) {
        self.bytes.extend_from_slice(format!(": {text}\n\n").as_bytes());
    }

    /// What was added since the last call, if anything.
    fn take(&mut self) -> Option<Bytes> {
        (!self.bytes.is_empty()).then(|| std::mem::take(&mut self.bytes).into())
    }
}
