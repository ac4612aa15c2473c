//! The engine as other threads see it: submit, abort, drain, statistics, health.
//!
//! A submission is checked on the caller's thread against limits that never change, and takes its place in
//! the queue under one short lock, so that no caller ever waits for a step.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::request::{EventSink, Request, RequestId};
use crate::runner::RunnerLimits;
use crate::sampling::{InvalidParameter, SamplingParameters, in_vocabulary};
use crate::stats::EngineStats;

/// How the engine runs; see each field for what it trades.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences in one step, at least 1.
    pub max_running_sequences: usize,
    /// Most tokens in one step, prefill and decode together, at least 1. Larger steps prefill faster; smaller
    /// ones let running sequences stutter less while another's prompt is computed.
    pub max_step_tokens: usize,
    /// Most prompt tokens of one sequence in one step, at least 1.
    pub max_prefill_chunk_tokens: usize,
    /// Most rows of one step whose logits are wanted for log probabilities of prompts, at least 1. With one row for
    /// each running sequence this bounds the logits of a step, of `4 * vocabulary` bytes a row; larger values score
    /// prompts in fewer steps.
    pub max_prompt_logit_rows: usize,
    /// Most tokens of a sequence that a step computes on the guess that it repeats itself (prompt lookup); 0 for none.
    /// Changes no token.
    pub max_draft_tokens: usize,
    /// Most tokens of a step, decoded ones and guesses together, up to which guesses are made: they pay while a step
    /// takes as long for a few tokens as for one.
    pub max_step_tokens_with_drafts: usize,
    /// Shares of tenants by name; 1 for others. A tenant of weight 3 gets three times the tokens of one of weight 1
    /// while both have requests waiting.
    pub tenant_weights: BTreeMap<String, u32>,
    /// Most requests of a tenant that wait for their first step; more are refused.
    pub max_waiting_requests: usize,
    /// Share the KV blocks of equal prefixes, and keep those of ended sequences until their place is needed.
    /// Changes no token.
    pub prefix_caching: bool,
    /// Seeds of requests that bring none are derived from this and the request's id.
    pub seed: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_running_sequences: 256,
            max_step_tokens: 2048,
            max_prefill_chunk_tokens: 512,
            max_prompt_logit_rows: 256,
            max_draft_tokens: 0,
            max_step_tokens_with_drafts: 16,
            tenant_weights: BTreeMap::new(),
            max_waiting_requests: 1024,
            prefix_caching: true,
            seed: 0,
        }
    }
}

/// Why a request was not accepted. Its sink got no event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The prompt is empty.
    #[error("the prompt is empty, expected at least one token")]
    EmptyPrompt,
    /// A prompt token or a sampling parameter is outside its range.
    #[error(transparent)]
    Invalid(#[from] InvalidParameter),
    /// The runner gives no hidden states.
    #[error("this engine's runner gives no hidden states to make an embedding of")]
    NoEmbeddings,
    /// The sequence could never be held, whatever else runs.
    #[error(
        "the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together more than the \
         {maximum_tokens} tokens that the model or its KV cache can hold; shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// The longest sequence that fits, prompt and completion together.
        maximum_tokens: usize,
    },
    /// Too many requests of the tenant wait already; one may be accepted later.
    #[error("{waiting} requests wait already, at most {limit} may; try again later")]
    QueueFull {
        /// Requests that wait for their first step.
        waiting: usize,
        /// The most that may.
        limit: usize,
    },
    /// The engine finishes what it accepted and takes no more.
    #[error("the engine is shutting down and accepts no more requests")]
    ShuttingDown,
    /// The engine stopped after an error.
    #[error("the engine has failed: {message}")]
    EngineFailed {
        /// What stopped it.
        message: String,
    },
}

/// Whether the engine works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Accepts requests.
    Ready,
    /// Finishes what it accepted and takes no more.
    Draining,
    /// Ended in order; nothing is open.
    Stopped,
    /// Ended by an error; every open request got a `Failed` event.
    Failed {
        /// What happened.
        message: String,
    },
}

/// What handles ask of the engine thread.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Abort(RequestId),
    ResetPrefixCache,
    /// Finish what was accepted, abort what is left at the deadline, then stop.
    Drain {
        deadline: Instant,
    },
}

/// A request that passed every check a handle can make.
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    pub(crate) sink: Box<dyn EventSink>,
    pub(crate) submitted_at: Instant,
}

/// What the engine thread and the handles both see.
pub(crate) struct Shared {
    pub(crate) limits: RunnerLimits,
    pub(crate) config: EngineConfig,
    state: Mutex<SharedState>,
}

/// The changing part of [`Shared`]: locked for a few assignments, never during a step.
pub(crate) struct SharedState {
    pub(crate) health: Health,
    pub(crate) stats: EngineStats,
    /// Requests accepted so far: also the next request's id.
    pub(crate) submitted: u64,
    /// Submissions that the engine thread has taken from the channel.
    pub(crate) received: u64,
    /// By tenant: requests accepted that had neither their first step nor an end; as of the last publication.
    pub(crate) not_started: BTreeMap<Arc<str>, usize>,
    /// When the last step completed, or when work arrived after idleness; absent when idle.
    pub(crate) working_since: Option<Instant>,
}

impl Shared {
    pub(crate) fn new(limits: RunnerLimits, config: EngineConfig) -> Self {
        let stats = EngineStats::new(&limits, &config);
        let state = SharedState {
            health: Health::Ready,
            stats,
            submitted: 0,
            received: 0,
            not_started: BTreeMap::new(),
            working_since: None,
        };
        Self { limits, config, state: Mutex::new(state) }
    }

    /// The changing part. A panic elsewhere cannot leave it half-written in a way that matters: every writer
    /// only assigns whole values.
    pub(crate) fn state(&self) -> MutexGuard<'_, SharedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Talks to a running engine; clones share it. When the last one is gone the engine finishes what it accepted
/// and stops.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub(crate) fn new(commands: Sender<Command>, shared: Arc<Shared>) -> Self {
        Self { commands, shared }
    }

    /// Queues a request; its events go to `sink`, from the engine thread, ending with exactly one terminal
    /// event. Never waits for a step.
    ///
    /// # Errors
    /// See [`SubmitError`]. On an error `sink` gets no event.
    pub fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<RequestId, SubmitError> {
        self.check(&request)?;
        let mut state = self.shared.state();
        match &state.health {
            Health::Ready => {}
            Health::Draining | Health::Stopped => return Err(SubmitError::ShuttingDown),
            Health::Failed { message } => return Err(SubmitError::EngineFailed { message: message.clone() }),
        }
        let waiting = state.not_started.get(&request.tenant).copied().unwrap_or(0);
        let limit = self.shared.config.max_waiting_requests;
        if waiting >= limit {
            return Err(SubmitError::QueueFull { waiting, limit });
        }
        let id = RequestId(state.submitted);
        let tenant = Arc::clone(&request.tenant);
        let submission = Box::new(Submission { id, request, sink, submitted_at: Instant::now() });
        // Sent under the lock: ids arrive in order, and none arrives after the engine closed the door.
        if self.commands.send(Command::Submit(submission)).is_err() {
            return Err(SubmitError::ShuttingDown);
        }
        state.submitted += 1;
        *state.not_started.entry(tenant).or_default() += 1;
        Ok(id)
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let vocabulary_size = self.shared.limits.vocabulary_size;
        match request.pooling {
            None => request.sampling.check(vocabulary_size)?,
            Some(_) => self.check_embedding(&request.sampling)?,
        }
        for &token_id in &request.prompt {
            in_vocabulary("prompt", token_id, vocabulary_size)?;
        }
        let prompt_tokens = request.prompt.len();
        let max_tokens = request.sampling.max_tokens;
        let maximum_tokens = self.maximum_tokens();
        // Even a prompt that nothing is generated after needs its place in the cache.
        if prompt_tokens.saturating_add(max_tokens.max(1)) > maximum_tokens {
            return Err(SubmitError::TooLong { prompt_tokens, max_tokens, maximum_tokens });
        }
        Ok(())
    }

    /// Refuses what does not go together with an embedding.
    fn check_embedding(&self, sampling: &SamplingParameters) -> Result<(), SubmitError> {
        if self.shared.limits.hidden_size.is_none() {
            return Err(SubmitError::NoEmbeddings);
        }
        let expected = || "nothing to generate or to score beside an embedding".to_owned();
        for (parameter, found) in [
            ("max_tokens", Some(sampling.max_tokens).filter(|&tokens| tokens > 0)),
            ("prompt_logprobs", sampling.prompt_logprobs),
        ] {
            if let Some(found) = found {
                return Err(
                    InvalidParameter { parameter, found: found.to_string(), expected: expected() }.into()
                );
            }
        }
        Ok(())
    }

    /// Ends a request with [`crate::FinishReason::Aborted`]; nothing if it has ended already.
    pub fn abort(&self, id: RequestId) {
        // A closed channel means that every request has its terminal event already.
        let _ = self.commands.send(Command::Abort(id));
    }

    /// Forgets the KV blocks of earlier prompts that no running sequence holds: requests submitted after this find none
    /// of them. Changes no token. Returns at once.
    pub fn reset_prefix_cache(&self) {
        // A closed channel means that the engine has stopped, and nothing is cached.
        let _ = self.commands.send(Command::ResetPrefixCache);
    }

    /// Stops admission at once and lets the engine finish what it accepted; what is still open at `deadline`
    /// is aborted, then the engine stops. Returns at once: [`EngineHandle::health`] turns from
    /// [`Health::Draining`] to [`Health::Stopped`], and [`crate::Engine::join`] returns. Of several deadlines
    /// the earliest counts. A step that hangs is not interrupted: whoever must stop in time looks at
    /// [`EngineStats::last_step_age`] and leaves the process.
    pub fn drain(&self, deadline: Instant) {
        let mut state = self.shared.state();
        if state.health == Health::Ready {
            state.health = Health::Draining;
        }
        // A closed channel means that the engine has stopped already.
        let _ = self.commands.send(Command::Drain { deadline });
    }

    /// The counters as of the last step.
    pub fn stats(&self) -> EngineStats {
        let state = self.shared.state();
        let mut stats = state.stats.clone();
        stats.waiting += (state.submitted - state.received) as usize;
        stats.last_step_age = state.working_since.map(|since| since.elapsed());
        stats
    }

    /// [`EngineStats::last_step_age`] alone.
    pub fn last_step_age(&self) -> Option<Duration> {
        self.shared.state().working_since.map(|since| since.elapsed())
    }

    /// Whether the engine works.
    pub fn health(&self) -> Health {
        self.shared.state().health.clone()
    }

    /// How the engine runs.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// What the runner can hold.
    pub fn limits(&self) -> &RunnerLimits {
        &self.shared.limits
    }

    /// The longest sequence that fits, prompt and completion together, in tokens.
    pub fn maximum_tokens(&self) -> usize {
        self.shared.limits.maximum_tokens()
    }
}
