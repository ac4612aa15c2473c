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

use nibble_engine::{
    EngineHandle, EventSink, FinishReason, RequestEvent, RequestId, SinkState, TokenLogprobs,
};
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
    /// The prompt, if somebody wants to see its tokens, until it was handed out.
    prompt: Vec<TokenOutput>,
    /// Tokens of it that have their log probability, and the first, which never gets one.
    scored: usize,
    /// The embedding, once it is there.
    embedding: Option<Vec<f32>>,
    include_stop: bool,
    generated_tokens: usize,
    /// Characters of all text that the detokenizer gave.
    characters: usize,
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
    /// If the request asked for them. The first token of a prompt has none.
    pub(crate) logprobs: Option<TokenLogprobs>,
    /// Where its text begins in the answer, in characters.
    pub(crate) text_offset: usize,
}

/// News of one choice.
#[derive(Debug)]
pub(crate) struct ChoiceEvent {
    /// Which choice, over all prompts.
    pub(crate) choice: usize,
    /// Text that follows the text before.
    pub(crate) text: String,
    /// In the first event of a choice, the tokens of the prompt, if they are shown.
    pub(crate) prompt: Vec<TokenOutput>,
    /// Tokens since the event before; a token that ends the choice is among them.
    pub(crate) tokens: Vec<TokenOutput>,
    /// In the last event of a choice, the embedding of its prompt, if that was asked for.
    pub(crate) embedding: Option<Vec<f32>>,
    /// Present in the last event of a choice.
    pub(crate) finish: Option<Finish>,
}

/// A choice that has ended.
#[derive(Debug)]
pub(crate) struct CompletedChoice {
    pub(crate) text: String,
    pub(crate) prompt: Vec<TokenOutput>,
    pub(crate) tokens: Vec<TokenOutput>,
    pub(crate) embedding: Option<Vec<f32>>,
    pub(crate) finish: Finish,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    /// [`Outcome::Stop`] or [`Outcome::Length`].
    pub(crate) outcome: Outcome,
    /// The stop string or the stop token, null for an end-of-sequence token.
    pub(crate) stop_reason: Option<Value>,
}

impl Generation {
    /// Submits the sequences of `request`, which arrived at `arrived_at`. On an error none of them runs.
    pub(crate) fn start(
        state: &AppState,
        request: &ValidRequest,
        arrived_at: Instant,
    ) -> Result<Self, ApiError> {
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
            let token = |(at, &token_id): (usize, &u32)| TokenOutput {
                token_id,
                logprobs: None,
                text_offset: prompt.text_offsets.get(at).copied().unwrap_or_default(),
            };
            let shown = if request.presentation().shows_prompt() { &prompt.token_ids[..] } else { &[] };
            // The echo of a chat is the endpoint's.
            let echo = if request.presentation().echo { prompt.echo.as_str() } else { "" };
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
                    ready: echo.to_owned(),
                    tokens: Vec::new(),
                    prompt: shown.iter().enumerate().map(token).collect(),
                    scored: 1,
                    embedding: None,
                    include_stop: request.include_stop(),
                    generated_tokens: 0,
                    characters: echo.chars().count(),
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
                return Some(Err(self.fail("the engine stopped before the request was finished")));
            };
            match self.take(delivery) {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    /// Waits until every choice has ended.
    pub(crate) async fn collect(mut self) -> Result<(Vec<CompletedChoice>, Usage), ApiError> {
        let mut collected: Vec<ChoiceEvent> = (0..self.choices.len())
            .map(|choice| ChoiceEvent {
                choice,
                text: String::new(),
                prompt: Vec::new(),
                tokens: Vec::new(),
                embedding: None,
                finish: None,
            })
            .collect();
        while let Some(event) = self.next().await {
            let event = event?;
            let choice = &mut collected[event.choice];
            choice.text.push_str(&event.text);
            choice.prompt.extend(event.prompt);
            choice.tokens.extend(event.tokens);
            choice.embedding = event.embedding;
            choice.finish = event.finish;
        }
        let completed = collected.into_iter().filter_map(|choice| {
            let ChoiceEvent { text, prompt, tokens, embedding, finish, .. } = choice;
            Some(CompletedChoice { text, prompt, tokens, embedding, finish: finish? })
        });
        Ok((completed.collect(), self.usage()))
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

    /// Ends every choice with an error.
    fn fail(&mut self, message: &str) -> ApiError {
        for choice in self.choices.iter_mut().filter(|choice| choice.text.is_some()) {
            choice.text = None;
            self.engine.abort(choice.id);
            self.metrics.finished(Outcome::Error);
        }
        ApiError::Unavailable { message: message.to_owned() }
    }

    fn take(&mut self, delivery: Delivery) -> Result<Option<ChoiceEvent>, ApiError> {
        let index = delivery.choice;
        let Some(choice) = self.choices.get_mut(index).filter(|choice| choice.text.is_some()) else {
            return Ok(None); // tokens that were under way when a stop string ended the choice
        };
        let finish = match delivery.event {
            RequestEvent::PromptLogprobs { logprobs } => {
                for (token, logprobs) in choice.prompt.iter_mut().skip(choice.scored).zip(logprobs) {
                    token.logprobs = Some(logprobs);
                    choice.scored += 1;
                }
                return Ok(None);
            }
            RequestEvent::Embedding { values } => {
                choice.embedding = Some(values);
                return Ok(None);
            }
            RequestEvent::Token { token_id, logprobs } => {
                self.usage.completion_tokens += 1;
                self.metrics.token(choice.last_token_at, delivery.sent_at);
                choice.last_token_at = Some(delivery.sent_at);
                let stopped = choice.push(token_id, logprobs)?;
                if stopped.is_some() {
                    self.engine.abort(choice.id);
                }
                stopped
            }
            RequestEvent::Finished { reason, stop_token, stop_logprobs, completion_tokens, .. } => {
                // The token that stopped the sequence was generated, not sent.
                self.usage.completion_tokens += completion_tokens.saturating_sub(choice.generated_tokens);
                let stopped = match stop_token {
                    Some(token_id) => choice.push_stop(token_id, stop_logprobs)?,
                    None => None,
                };
                let named = stop_token.filter(|token| !self.engine.limits().eos_token_ids.contains(token));
                match stopped {
                    None => Some(choice.end(reason, named)?),
                    stopped => stopped,
                }
            }
            RequestEvent::Failed { message } => return Err(self.fail(&message)),
        };
        if let Some(finish) = &finish {
            choice.text = None;
            self.metrics.finished(finish.outcome);
        } else if choice.ready.is_empty() {
            return Ok(None);
        }
        Ok(Some(ChoiceEvent {
            choice: index,
            text: std::mem::take(&mut choice.ready),
            prompt: std::mem::take(&mut choice.prompt),
            tokens: std::mem::take(&mut choice.tokens),
            embedding: choice.embedding.take(),
            finish,
        }))
    }
}

impl Choice {
    /// Takes a token; tells how the choice ended if that completed a stop string.
    fn push(
        &mut self,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<Option<Finish>, CheckpointError> {
        self.tokens.push(TokenOutput { token_id, logprobs, text_offset: self.characters });
        self.generated_tokens += 1;
        let Some(state) = &mut self.text else { return Ok(None) };
        let piece = state.detokenizer.push(token_id)?;
        Ok(self.push_text(&piece))
    }

    /// Takes the token that ends the choice, which belongs to the text if the request says so; then it may complete a
    /// stop string.
    fn push_stop(
        &mut self,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<Option<Finish>, CheckpointError> {
        self.tokens.push(TokenOutput { token_id, logprobs, text_offset: self.characters });
        let Some(state) = self.text.as_mut().filter(|_| self.include_stop) else { return Ok(None) };
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
                Some(Finish { outcome: Outcome::Stop, stop_reason: Some(stop.into()) })
            }
        }
    }

    /// Ends the choice as the engine says, unless the last of the text holds a stop string.
    fn end(&mut self, reason: FinishReason, stop_token: Option<u32>) -> Result<Finish, ApiError> {
        let finish = match reason {
            FinishReason::Stop => Finish { outcome: Outcome::Stop, stop_reason: stop_token.map(Value::from) },
            FinishReason::Length => Finish { outcome: Outcome::Length, stop_reason: None },
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
