//! One running request: its sequences in the engine, and the text that comes out of them.
//!
//! The engine thread only puts events into a channel. Detokenization and stop strings happen here, on the
//! thread that asks for the next event. The channel never makes the engine wait; it holds at most the
//! `max_tokens` tokens of each choice, which is what bounds its memory when a client reads slowly.
//!
//! Dropping a [`Generation`] aborts what still runs: when a connection ends, the future or the stream that
//! holds it is dropped, whether its sequences wait, are in prefill, or decode.

mod choice;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use nibble_engine::{
    Blame, EngineHandle, EventSink, Failure, Request, RequestEvent, SinkState, TokenLogprobs,
};
use nibble_model::detokenizer::Detokenizer;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use self::choice::{Choice, TextState};
use crate::app::AppState;
use crate::auth::Tenant;
use crate::metrics::{Outcome, RequestMetrics};
use crate::observe::RequestIdentity;
use crate::openai::error::ApiError;
use crate::openai::types::common::Usage;
use crate::stop_strings::StopStrings;
use crate::traces::{RequestTrace, TracedUsage};
use crate::validation::ValidRequest;

/// A request whose sequences run in the engine.
pub(crate) struct Generation {
    engine: EngineHandle,
    metrics: RequestMetrics,
    trace: Option<RequestTrace>,
    events: UnboundedReceiver<Delivery>,
    /// Events that come before those of the channel.
    next_events: VecDeque<Delivery>,
    /// Why the engine will send nothing more, if that is so.
    given_up: watch::Receiver<Option<Arc<str>>>,
    choices: Vec<Choice>,
    choices_per_prompt: usize,
    usage: Usage,
}

/// One event of one choice, on its way from the engine thread.
#[derive(Clone)]
struct Delivery {
    choice: usize,
    /// When its sequence had its first step.
    started_at: Option<Instant>,
    sent_at: Instant,
    event: RequestEvent,
}

/// Puts a choice's events into the channel of its request.
struct ChannelSink {
    choice: usize,
    started_at: Option<Instant>,
    events: UnboundedSender<Delivery>,
}

impl EventSink for ChannelSink {
    fn started(&mut self) {
        self.started_at = Some(Instant::now());
    }

    fn send(&mut self, event: RequestEvent) -> SinkState {
        let (choice, started_at) = (self.choice, self.started_at);
        let delivery = Delivery { choice, started_at, sent_at: Instant::now(), event };
        match self.events.send(delivery) {
            Ok(()) => SinkState::Open,
            Err(_) => SinkState::Closed,
        }
    }
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
    /// Submits the sequences of `request`, as those of `tenant`. On an error none of them runs.
    pub(crate) fn start(
        state: &AppState,
        request: &ValidRequest,
        identity: &RequestIdentity,
        tenant: &Tenant,
    ) -> Result<Self, ApiError> {
        let engine = state.model.engine.clone();
        let (sender, events) = unbounded_channel();
        let mut generation = Self {
            engine,
            metrics: state.metrics.request(identity.arrived_at),
            trace: RequestTrace::new(state, identity),
            events,
            next_events: VecDeque::new(),
            given_up: state.given_up.subscribe(),
            choices: Vec::new(),
            choices_per_prompt: request.choices_per_prompt(),
            usage: Usage::default(),
        };
        if let Some(message) = generation.given_up.borrow().as_deref() {
            return Err(ApiError::Unavailable { message: message.to_owned() });
        }
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
            let unscored = if request.scores_prompts() { shown.len().saturating_sub(1) } else { 0 };
            for choice in 0..request.choices_per_prompt() {
                let sink = ChannelSink {
                    choice: generation.choices.len(),
                    started_at: None,
                    events: sender.clone(),
                };
                let submit = |engine_request: Request| {
                    if let Some(trace) = &mut generation.trace {
                        trace.submits(engine_request.sampling.max_tokens);
                    }
                    let id = generation.engine.submit(engine_request, Box::new(sink));
                    id.map_err(|error| ApiError::submit(error, request.prompt_field()))
                };
                let id = request.engine_request(prompt, choice, tenant).map(submit).transpose()?;
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
                    unscored,
                    held: Vec::new(),
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
            let delivery = match self.delivery().await {
                Ok(delivery) => delivery,
                Err(message) => return Some(Err(self.fail(Blame::Engine, &message))),
            };
            match self.take(delivery) {
                Ok(None) => {}
                Ok(Some(event)) => return Some(Ok(event)),
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    /// The next event of the engine, or why there is none.
    async fn delivery(&mut self) -> Result<Delivery, Arc<str>> {
        if let Some(delivery) = self.next_events.pop_front() {
            return Ok(delivery);
        }
        if let Ok(delivery) = self.events.try_recv() {
            return Ok(delivery);
        }
        let stopped = || Arc::from("the engine stopped before the request was finished");
        tokio::select! {
            delivery = self.events.recv() => delivery.ok_or_else(stopped),
            message = self.given_up.wait_for(Option::is_some) => {
                Err(message.ok().and_then(|message| message.clone()).unwrap_or_else(stopped))
            }
        }
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
    fn fail(&mut self, blame: Blame, message: &str) -> ApiError {
        if let Some(trace) = &mut self.trace {
            trace.fails("the engine did not finish the request");
        }
        for choice in self.choices.iter_mut().filter(|choice| choice.text.is_some()) {
            choice.text = None;
            choice.id.into_iter().for_each(|id| self.engine.abort(id));
            self.metrics.finished(Outcome::Error);
        }
        let message = message.to_owned();
        match blame {
            Blame::Request => ApiError::CannotGoOn { message },
            Blame::Engine => ApiError::Unavailable { message },
        }
    }

    /// The other choices of the prompt of `choice`, if that is the first of them.
    fn others_of_prompt(&self, choice: usize) -> Range<usize> {
        let is_first = choice.is_multiple_of(self.choices_per_prompt);
        choice + 1..if is_first { choice + self.choices_per_prompt } else { choice + 1 }
    }

    /// Repeats an event of the first choice of a prompt for the others whom it concerns.
    fn repeat(&mut self, delivery: &Delivery) {
        for other in self.others_of_prompt(delivery.choice) {
            let concerns = match delivery.event {
                RequestEvent::PromptLogprobs { .. } => true,
                // Its tokens are its own, unless there are none.
                RequestEvent::Finished { .. } => self.choices[other].id.is_none(),
                _ => false,
            };
            if concerns {
                self.next_events.push_back(Delivery { choice: other, ..delivery.clone() });
            }
        }
    }

    fn take(&mut self, delivery: Delivery) -> Result<Option<ChoiceEvent>, ApiError> {
        let index = delivery.choice;
        self.repeat(&delivery);
        let Some(choice) = self.choices.get_mut(index).filter(|choice| choice.text.is_some()) else {
            return Ok(None); // tokens that were under way when a stop string ended the choice
        };
        let is_first = index.is_multiple_of(self.choices_per_prompt);
        let scores = matches!(delivery.event, RequestEvent::PromptLogprobs { .. } | RequestEvent::Failed(_));
        if choice.unscored > 0 && !is_first && !scores {
            choice.held.push(delivery);
            return Ok(None);
        }
        if let Some(trace) = &mut self.trace {
            let is_token = matches!(delivery.event, RequestEvent::Token { .. });
            trace.hears(delivery.started_at, is_token.then_some(delivery.sent_at));
        }
        let finish = match delivery.event {
            RequestEvent::PromptLogprobs { logprobs } => {
                let first = choice.prompt.len() - choice.unscored;
                for (token, logprobs) in choice.prompt.iter_mut().skip(first).zip(logprobs) {
                    token.logprobs = Some(logprobs);
                    choice.unscored -= 1;
                }
                if choice.unscored == 0 {
                    self.next_events.extend(choice.held.drain(..));
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
                    choice.id.into_iter().for_each(|id| self.engine.abort(id));
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
                let finish = match stopped {
                    None => choice.end(reason, named)?,
                    Some(finish) => finish,
                };
                choice.generated_tokens = completion_tokens.max(choice.generated_tokens);
                Some(finish)
            }
            RequestEvent::Failed(Failure { message, blame }) => return Err(self.fail(blame, &message)),
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

impl Drop for Generation {
    fn drop(&mut self) {
        for choice in self.choices.iter().filter(|choice| choice.text.is_some()) {
            choice.id.into_iter().for_each(|id| self.engine.abort(id));
            self.metrics.finished(Outcome::Abort);
            if let Some(trace) = &mut self.trace {
                trace.fails("the client went away");
            }
        }
        for choices in self.choices.chunks(self.choices_per_prompt) {
            let longest = choices.iter().map(|choice| choice.generated_tokens).max();
            self.metrics.prompt_finished(self.choices_per_prompt, longest.unwrap_or(0));
        }
        if let Some(trace) = &self.trace {
            trace.end(&TracedUsage {
                choices_per_prompt: self.choices_per_prompt,
                choices: self.choices.len(),
                prompt_tokens: self.usage.prompt_tokens,
                completion_tokens: self.usage.completion_tokens,
            });
        }
    }
}
