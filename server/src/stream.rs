//! Server-sent events: a generation as a stream of chunks, ending with `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde::Serialize;

use crate::generation::{ChoiceEvent, Generation};
use crate::openai::error::ApiError;
use crate::openai::types::common::Usage;
use crate::openai::types::sampling::StreamOptions;

/// How an endpoint writes its chunks.
pub(crate) trait Chunks: Send + 'static {
    /// The chunk of the endpoint.
    type Chunk: Serialize;

    /// What comes before the first event of `choice`, if anything does.
    fn opening(&self, choice: usize) -> Option<Self::Chunk>;

    /// An event, with the usage so far if each chunk reports it.
    fn event(&self, event: ChoiceEvent, usage: Option<Usage>) -> Self::Chunk;

    /// The usage of the whole request.
    fn usage(&self, usage: Usage) -> Self::Chunk;
}

/// Streams `generation` as `chunks` writes it. After `keep_alive` without an event a comment is sent, so that
/// no proxy closes the connection of a request that waits.
pub(crate) fn stream<C: Chunks>(
    generation: Generation,
    chunks: C,
    options: StreamOptions,
    keep_alive: Duration,
) -> Response {
    let opening = (0..generation.choices()).filter_map(|choice| chunks.opening(choice));
    let queue = opening.map(|chunk| event(&chunk)).collect();
    let events = Events { generation: Some(generation), chunks, options, queue };
    let stream = unfold(events, async |mut events| {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(event), events))
    });
    let keep_alive = KeepAlive::new().interval(keep_alive).text("still working");
    let mut response = Sse::new(stream).keep_alive(keep_alive).into_response();
    // nginx would collect the events otherwise.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The events of a stream. Dropping it drops the generation, which aborts what still runs.
struct Events<C> {
    /// Absent once the last event is in the queue.
    generation: Option<Generation>,
    chunks: C,
    options: StreamOptions,
    queue: VecDeque<Event>,
}

impl<C: Chunks> Events<C> {
    async fn next(&mut self) -> Option<Event> {
        if self.queue.is_empty() {
            self.advance().await;
        }
        self.queue.pop_front()
    }

    /// Puts the next events of the generation into the queue; none when it is over.
    async fn advance(&mut self) {
        let Some(generation) = &mut self.generation else { return };
        match generation.next().await {
            Some(Ok(choice)) => {
                let usage = self.options.continuous_usage_stats.then(|| generation.usage());
                self.queue.push_back(event(&self.chunks.event(choice, usage)));
                return;
            }
            Some(Err(error)) => {
                tracing::error!(%error, "stream failed");
                self.queue.push_back(event(&error.body()));
            }
            None if self.options.include_usage => {
                self.queue.push_back(event(&self.chunks.usage(generation.usage())));
            }
            None => {}
        }
        self.queue.push_back(Event::default().data("[DONE]"));
        self.generation = None;
    }
}

fn event(chunk: &impl Serialize) -> Event {
    Event::default().json_data(chunk).unwrap_or_else(|error| {
        let message = format!("cannot write a chunk: {error}");
        tracing::error!(message);
        // The body of an error holds strings only: it always has a JSON form.
        let body = serde_json::to_string(&ApiError::Internal { message }.body()).unwrap_or_default();
        Event::default().data(body)
    })
}
