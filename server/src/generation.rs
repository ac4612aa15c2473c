//! One running request: its sequences in the engine, and the text that comes out of them.
//!
//! The engine thread only puts events into a channel. Detokenization and stop strings happen here, on the
//! thread that asks for the next event. The channel never makes the engine wait; it holds at most the
//! `max_tokens` tokens of each choice, which is what bounds its memory when a client reads slowly.
//!
//! Dropping a [`Generation`] aborts what still runs: when a connection ends, the future or the stream that
//! holds it is dropped, whether its sequences wait, are in prefill, or decode.

use std::sync::Arc;
use std::time::Instant;

use nibble_engine::{EngineHandle, EventSink, FinishReason, RequestEvent, RequestId, SinkState, TokenLogprobs};
use nibble_model::detokenizer::Detokenizer;
use nibble_model::error::CheckpointError;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::app::AppState;
use crate::metrics::{Outcome, RequestMetrics};
use crate::openai::error::ApiError;
use crate::openai::types::common::Usage;
use crate::stop_strings::{Found, StopStrings};
use crate::validation::ValidRequest;

/// A request whose sequences run in the engine.
pub(crate) struct Generation {
    engine: EngineHandle,
    metrics: RequestMetrics,
    events: UnboundedReceiver<Delivery>,
    choices: Vec<Choice>,
    usage: Usage,
}

/// One event of one choice, on its way from the engine thread.
struct Delivery {
    choice: usize,
    sent_at: Instant,
    event: RequestEvent,
}

/// Puts a choice's events into the channel of its request.
struct ChannelSink {
    choice: usize,
    events: UnboundedSender<Delivery>,
}

impl EventSink for ChannelSink {
    fn send(&mut self, event: RequestEvent) -> SinkState {
        let delivery = Delivery { choice: self.choice, sent_at: Instant::now(), event };
        match self.events.send(delivery) {
            Ok(()) => SinkState::Open,
            Err(_) => SinkState::Closed,
        }
    }
}

/// One sequence and its text so far.
struct Choice {
    id: RequestId,
    /// Absent once the choice has ended.
    text: Option<TextState>,
    /// Text that is certain and was not handed out yet.
    ready: String,
    /// Tokens that were not handed out yet.
    tokens: Vec<TokenOutput>,
    generated_tokens: usize,
    /// Characters of all text that the detokenizer gave.
    characters: usize,
    first_token_at: Option<Instant>,
    last_token_at: Option<Instant>,
}

/// What turns tokens into text.
struct TextState {
    detokenizer: Detokenizer,
    stop: StopStrings,
    min_tokens: usize,
}

/// A token as the API reports it.
#[derive(Debug)]
pub(crate) struct TokenOutput {
    pub(crate) token_id: u32,
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Where its text begins in the completion, in characters.
    pub(crate) text_offset: usize,
}

/// News of one choice.
#[derive(Debug)]
pub(crate) struct ChoiceEvent {
    /// Which choice, over all prompts.
    pub(crate) choice: usize,
    /// Text that follows the text before.
    pub(crate) text: String,
    /// Tokens since the event before.
    pub(crate) tokens: Vec<TokenOutput>,
    /// Present in the last event of a choice.
    pub(crate) finish: Option<Finish>,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    /// "stop" or "length".
    pub(crate) reason: &'static str,
    /// The stop string or the stop token, null for an end-of-sequence token.
    pub(crate) stop_reason: Option<Value>,
}

impl Generation {
    /// Submits the sequences of `request`, which arrived at `arrived_at`. On an error none of them runs.
    pub(crate) fn start(state: &AppState, request: &ValidRequest, arrived_at: Instant) -> Result<Self, ApiError> {
        let engine = state.model.engine.clone();
        let (sender, events) = unbounded_channel();
        let mut generation = Self {
            engine,
            metrics: state.metrics.request(arrived_at),
            events,
            choices: Vec::new(),
            usage: Usage::default(),
        };
        for prompt in request.prompts() {
            generation.usage.prompt_tokens += prompt.token_ids.len();
            for choice in 0..request.choices_per_prompt() {
                let sink = ChannelSink { choice: generation.choices.len(), events: sender.clone() };
                let engine_request = request.engine_request(prompt, choice);
                let id = generation
                    .engine
                    .submit(engine_request, Box::new(sink))
                    .map_err(|error| ApiError::submit(error, request.prompt_field()))?;
                let tokenizer = Arc::clone(&state.model.tokenizer);
                generation.choices.push(Choice {
                    id,
                    text: Some(TextState {
                        detokenizer: Detokenizer::new(tokenizer, request.skip_special_tokens()),
                        stop: StopStrings::new(request.stop().to_vec(), request.include_stop()),
                        min_tokens: request.min_tokens(),
                    }),
                    ready: prompt.echo.clone(),
                    tokens: Vec::new(),
                    generated_tokens: 0,
                    characters: prompt.echo.chars().count(),
                    first_token_at: None,
                    last_token_at: None,
                });
            }
        }
        Ok(generation)
    }

    /// The next event with text or an end, or `None` after the last choice has ended. After an error the
    /// request is over.
    pub(crate) async fn next(&mut self) -> Option<Result<ChoiceEvent, ApiError>> {
        while self.choices.iter().any(|choice| choice.text.is_some()) {
            let Some(delivery) = self.events.recv().await else {
                let message = "the engine stopped before the request was finished".to_owned();
                return Some(Err(ApiError::Unavailable { message }));
            };
            match self.take(delivery) {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    /// Tokens taken so far.
    pub(crate) fn usage(&self) -> Usage {
        let total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens;
        Usage { total_tokens, ..self.usage }
    }

    /// Choices of this request, over all prompts.
    pub(crate) fn choices(&self) -> usize {
        self.choices.len()
    }

    fn take(&mut self, delivery: Delivery) -> Result<Option<ChoiceEvent>, ApiError> {
        let index = delivery.choice;
        let Some(choice) = self.choices.get_mut(index).filter(|choice| choice.text.is_some()) else {
            return Ok(None); // tokens that were under way when a stop string ended the choice
        };
        let finish = match delivery.event {
            RequestEvent::Token { token_id, logprobs } => {
                self.usage.completion_tokens += 1;
                self.metrics.token(choice.last_token_at, delivery.sent_at);
                choice.first_token_at.get_or_insert(delivery.sent_at);
                choice.last_token_at = Some(delivery.sent_at);
                let stopped = choice.push(token_id, logprobs)?;
                if stopped.is_some() {
                    self.engine.abort(choice.id);
                }
                stopped
            }
            RequestEvent::Finished { reason, stop_token, completion_tokens, .. } => {
                // The token that stopped the sequence was generated, not sent.
                self.usage.completion_tokens += completion_tokens.saturating_sub(choice.generated_tokens);
                Some(choice.end(reason, stop_token)?)
            }
            RequestEvent::Failed { message } => return Err(ApiError::Unavailable { message }),
        };
        if let Some(finish) = &finish {
            choice.text = None;
            self.metrics.finished(Outcome::of(finish.reason));
        } else if choice.ready.is_empty() {
            return Ok(None);
        }
        let text = std::mem::take(&mut choice.ready);
        Ok(Some(ChoiceEvent { choice: index, text, tokens: std::mem::take(&mut choice.tokens), finish }))
    }
}

impl Choice {
    /// Takes a token; tells how the choice ended if that completed a stop string.
    fn push(&mut self, token_id: u32, logprobs: Option<TokenLogprobs>) -> Result<Option<Finish>, CheckpointError> {
        self.tokens.push(TokenOutput { token_id, logprobs, text_offset: self.characters });
        self.generated_tokens += 1;
        let Some(state) = &mut self.text else { return Ok(None) };
        let piece = state.detokenizer.push(token_id)?;
        Ok(self.push_text(&piece))
    }

    fn push_text(&mut self, piece: &str) -> Option<Finish> {
        self.characters += piece.chars().count();
        let state = self.text.as_mut()?;
        if self.generated_tokens < state.min_tokens {
            self.ready.push_str(piece);
            return None;
        }
        match state.stop.push(piece) {
            Found::Text(text) => {
                self.ready.push_str(&text);
                None
            }
            Found::Stop(text, stop) => {
                self.ready.push_str(&text);
                Some(Finish { reason: "stop", stop_reason: Some(stop.into()) })
            }
        }
    }

    /// Ends the choice as the engine says, unless the last of the text holds a stop string.
    fn end(&mut self, reason: FinishReason, stop_token: Option<u32>) -> Result<Finish, ApiError> {
        let finish = match reason {
            FinishReason::Stop => Finish { reason: "stop", stop_reason: stop_token.map(Value::from) },
            FinishReason::Length => Finish { reason: "length", stop_reason: None },
            FinishReason::Aborted => {
                let message = "the server stopped before the request was finished".to_owned();
                return Err(ApiError::Unavailable { message });
            }
        };
        let rest = match &mut self.text {
            Some(state) => state.detokenizer.finish()?,
            None => String::new(),
        };
        if let Some(stopped) = self.push_text(&rest) {
            return Ok(stopped);
        }
        let held = self.text.as_mut().map(|state| state.stop.finish()).unwrap_or_default();
        self.ready.push_str(&held);
        Ok(finish)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for choice in self.choices.iter().filter(|choice| choice.text.is_some()) {
            self.engine.abort(choice.id);
            self.metrics.finished(Outcome::Abort);
        }
    }
}
