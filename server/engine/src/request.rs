//! What goes into the engine and what comes out: requests, their events, and where the events go.

use std::fmt;
use std::sync::Arc;

use nibble_model::pooling_config::Pooling;

use crate::constraint::TokenConstraint;
use crate::sampling::{SamplingParameters, TokenLogprobs};

/// Names one submitted request for the life of the engine; later requests have larger ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// One sequence to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids of the prompt, special tokens included; at least one.
    pub prompt: Vec<u32>,
    /// How to pick tokens and when to stop.
    pub sampling: SamplingParameters,
    /// Restricts the completion, at its beginning.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// Make an embedding of the prompt, and generate nothing.
    pub pooling: Option<Pooling>,
    /// Requests with lower numbers are served first, and take the place of running ones with higher numbers.
    pub priority: i32,
    /// Whose it is: tenants share what the engine can do by their weights. There are few of them.
    pub tenant: Arc<str>,
    /// Only requests with the same salt share keys and values of equal prefixes.
    pub cache_salt: Option<Arc<str>>,
}

impl Request {
    /// A request for a completion of `prompt` without anything else.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParameters) -> Self {
        let tenant = Arc::from("default");
        Self { prompt, sampling, constraint: None, pooling: None, priority: 0, tenant, cache_salt: None }
    }

    /// A request for an embedding of `prompt`.
    pub fn embedding(prompt: Vec<u32>, pooling: Pooling) -> Self {
        let nothing = SamplingParameters { max_tokens: 0, ..SamplingParameters::default() };
        Self { pooling: Some(pooling), ..Self::new(prompt, nothing) }
    }
}

/// Why a request ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced an end-of-sequence token or one of the request's stop tokens.
    Stop,
    /// `max_tokens` tokens were produced, possibly none.
    Length,
    /// [`crate::EngineHandle::abort`] was called, the sink closed, or the drain deadline passed.
    Aborted,
}

/// What the engine reports about one request: log probabilities of its prompt, if it asked for them, and any number of
/// tokens, then exactly one of [`RequestEvent::Finished`] and [`RequestEvent::Failed`], and nothing after it.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestEvent {
    /// The next tokens of the prompt have log probabilities, if the request asked for them: one for each token after
    /// the first, in order, in any number of such events, all of them before the first token of the completion.
    PromptLogprobs {
        /// One for each of the next tokens.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The embedding, of a request that asked for one; the end follows.
    Embedding {
        /// The pooled hidden states behind the final norm, not normalized.
        values: Vec<f32>,
    },
    /// The next token of the completion. The token that stops a sequence is not sent as one: it is in
    /// [`RequestEvent::Finished`].
    Token {
        /// The token.
        token_id: u32,
        /// Its log probability, when the request asked for it.
        logprobs: Option<TokenLogprobs>,
    },
    /// The request ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The end-of-sequence or stop token that ended it, for [`FinishReason::Stop`].
        stop_token: Option<u32>,
        /// The stop token's log probability, when the request asked for it.
        stop_logprobs: Option<TokenLogprobs>,
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens generated, the stop token included.
        completion_tokens: usize,
    },
    /// The engine could not go on with the request.
    Failed(Failure),
}

/// Why the engine could not go on with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened, for a log and for the client.
    pub message: String,
    /// Who could have helped it.
    pub blame: Blame,
}

/// Who could have helped a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The request: what it asks for leaves no token, or more work than may be spent on one. It would fail again.
    Request,
    /// The engine, its model, or the machine.
    Engine,
}

impl Failure {
    /// A failure that no request could have helped.
    pub(crate) fn of_engine(message: impl Into<String>) -> Self {
        Self { message: message.into(), blame: Blame::Engine }
    }
}

/// Whether anybody still reads what a sink is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkState {
    /// Events are read.
    Open,
    /// The reader is gone: the engine aborts the sequence and frees its KV blocks within one step.
    Closed,
}

/// Where the events of one request go. Called on the engine thread: it must not block.
pub trait EventSink: Send {
    /// Tells that the request is in a step for the first time, which is about to begin.
    fn started(&mut self) {}

    /// Hands over one event and tells whether the reader is still there.
    fn send(&mut self, event: RequestEvent) -> SinkState;
}
