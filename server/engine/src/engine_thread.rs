//! The one thread of an engine: takes commands, runs steps, samples, sends events.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use nibble_model::forward::{Batch, Logits};

use crate::engine::{EngineFailure, panic_message};
use crate::handle::{Command, Health, Shared, Submission};
use crate::ledger::Ledger;
use crate::request::{Failure, RequestEvent, RequestId, SinkState};
use crate::runner::{RunnerLimits, StepError, StepRunner, StepValues};
use crate::sampling::{LogitRow, NextToken, Sampler, SamplingRow, TokenLogprobs, on_device};
use crate::scheduler::{Effect, EffectKind, Scheduler, StepOutput, StepPlan};
use crate::stats::EngineStats;

/// Sequences whose constraints one thread evaluates in a step: a grammar takes some tens of microseconds, as much
/// as starting a thread.
const CONSTRAINED_SEQUENCES_PER_THREAD: usize = 16;

/// Whether more requests may come.
#[derive(Clone, Copy)]
enum Admission {
    Open,
    /// Stop when everything is finished; abort what is not at the deadline, if there is one.
    Draining {
        deadline: Option<Instant>,
    },
}

/// Everything that the engine's thread owns.
pub(crate) struct EngineThread {
    runner: Box<dyn StepRunner>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    sampler: Sampler,
    ledger: Ledger,
    admission: Admission,
    started: Instant,
    /// Submissions taken from the channel.
    received: u64,
    /// When the last step completed, or when work arrived after idleness.
    working_since: Option<Instant>,
    /// Effects that were not sent yet, and the log probabilities of the step they come from, by logit row.
    effects: Vec<Effect>,
    logprobs: Vec<Option<TokenLogprobs>>,
}

impl EngineThread {
    pub(crate) fn new(runner: Box<dyn StepRunner>, commands: Receiver<Command>, shared: Arc<Shared>) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            scheduler: Scheduler::new(&shared.limits, &shared.config),
            runner,
            commands,
            shared,
            sampler: Sampler::new(threads),
            ledger: Ledger::default(),
            admission: Admission::Open,
            started: Instant::now(),
            received: 0,
            working_since: None,
            effects: Vec::new(),
            logprobs: Vec::new(),
        }
    }

    /// Serves until there is nothing more to do or an error, then sees to it that every request was told.
    pub(crate) fn run(mut self) -> Result<(), EngineFailure> {
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let message = match ended {
            Ok(Ok(())) => {
                self.shared.state().health = Health::Stopped;
                tracing::info!("the engine has stopped");
                return Ok(());
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic_message(&*panic),
        };
        tracing::error!(%message, "the engine has failed");
        self.fail(&message);
        Err(EngineFailure { message })
    }

    fn serve(&mut self) -> Result<(), StepError> {
        loop {
            if self.scheduler.is_idle() {
                if let Admission::Draining { .. } = self.admission {
                    return Ok(());
                }
                match self.commands.recv() {
                    Ok(command) => self.take(command),
                    Err(_) => return Ok(()),
                }
            }
            self.take_commands();
            self.abort_after_deadline();
            self.send_effects();
            self.step()?;
        }
    }

    /// One step, if there is anything to compute.
    fn step(&mut self) -> Result<(), StepError> {
        let now = self.now();
        let plan = self.scheduler.schedule(now);
        self.publish();
        let Some(plan) = plan else { return Ok(()) };
        for planned in &plan.entries {
            let sequence = &self.scheduler.running()[planned.running];
            if sequence.times.started == Some(now) {
                self.ledger.started(sequence.id);
            }
        }
        let (logits, hidden_states) = self.execute(&plan)?;
        check_values(logits.as_ref(), &hidden_states, &plan.batch, &self.shared.limits)?;
        // Those aborted meanwhile end with this step, without another token.
        self.take_commands();
        let next_tokens = self.next_tokens(&plan, logits.as_ref())?;
        self.working_since = Some(Instant::now());
        let output = StepOutput { plan, next_tokens, hidden_states, completed_at: self.now() };
        self.scheduler.complete(output, &mut self.effects);
        self.send_effects();
        Ok(())
    }

    /// Computes the logits, unless the device keeps them to sample from, and the hidden states of `plan`. Meanwhile
    /// constraints say which tokens may come.
    fn execute(&mut self, plan: &StepPlan) -> Result<(Option<Logits>, Vec<f32>), StepError> {
        let on_device = self.can_sample_on_device(plan);
        let runner = &mut self.runner;
        let mut compute = || match runner.device_sampler().filter(|_| on_device) {
            Some(sampler) => Ok((None, sampler.start(&plan.batch)?)),
            None => {
                let StepValues { logits, hidden_states } = runner.execute(&plan.batch)?;
                Ok((Some(logits), hidden_states))
            }
        };
        let mut constrained = self.scheduler.constrained(plan);
        if constrained.is_empty() {
            return compute();
        }
        std::thread::scope(|scope| {
            for sequences in constrained.chunks_mut(CONSTRAINED_SEQUENCES_PER_THREAD) {
                scope.spawn(|| sequences.iter_mut().for_each(|sequence| sequence.constrain()));
            }
            compute()
        })
    }

    /// Whether a device that samples can do all that the sequences of `plan` want.
    fn can_sample_on_device(&self, plan: &StepPlan) -> bool {
        plan.entries.iter().all(|planned| {
            let parameters = &self.scheduler.running()[planned.running].sampling;
            on_device::is_possible(parameters.logprobs) && on_device::is_possible(parameters.prompt_logprobs)
        })
    }

    /// The token that follows each logit row of `plan`, sampled or known; log probabilities go to `self.logprobs`.
    /// Without `logits` the device samples.
    fn next_tokens(
        &mut self,
        plan: &StepPlan,
        logits: Option<&Logits>,
    ) -> Result<Vec<Result<u32, Failure>>, StepError> {
        let mut rows = Vec::with_capacity(plan.batch.logit_rows.len());
        let row = |index: usize| logits.map_or(&[][..], |logits| logits.row(index));
        for (planned, batch_rows) in plan.entries.iter().zip(&plan.batch.sequences) {
            let sequence = &self.scheduler.running()[planned.running];
            let end = batch_rows.first_position + planned.tokens;
            let next_known = sequence.tokens_and_draft().iter().skip(end + 1 - planned.logits);
            for &token_id in next_known.take(planned.scored()) {
                let top = sequence.sampling.prompt_logprobs.unwrap_or(0);
                rows.push(LogitRow::Score { logits: row(rows.len()), token_id, top });
            }
            for drafted in (0..=planned.draft_tokens).take_while(|_| planned.samples) {
                rows.push(LogitRow::Sample(SamplingRow::new(sequence, drafted, row(rows.len()))));
            }
        }
        let sampled = match self.runner.device_sampler().filter(|_| logits.is_none()) {
            Some(sampler) => on_device::sample(sampler, &rows, self.shared.limits.vocabulary_size)?,
            None => self.sampler.sample(&rows),
        };
        self.logprobs.clear();
        let mut tokens = Vec::with_capacity(sampled.len());
        for outcome in sampled {
            let (token, logprobs) = match outcome {
                Ok(NextToken { token_id, logprobs }) => (Ok(token_id), logprobs),
                Err(error) => (Err(error.into()), None),
            };
            tokens.push(token);
            self.logprobs.push(logprobs);
        }
        Ok(tokens)
    }

    /// Takes every command that has arrived.
    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    if let Admission::Open = self.admission {
                        self.admission = Admission::Draining { deadline: None };
                    }
                    return;
                }
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let Submission { id, request, sink, submitted_at } = *submission;
                self.received += 1;
                self.working_since.get_or_insert_with(Instant::now);
                self.ledger.open(id, sink);
                let submitted = submitted_at.saturating_duration_since(self.started);
                self.scheduler.submit(id, request, submitted);
            }
            Command::Abort(id) => self.scheduler.abort(id, &mut self.effects),
            Command::ResetPrefixCache => self.scheduler.reset_prefix_cache(),
            Command::Drain { deadline } => {
                let earlier = match self.admission {
                    Admission::Draining { deadline: Some(earlier) } => earlier.min(deadline),
                    _ => deadline,
                };
                self.admission = Admission::Draining { deadline: Some(earlier) };
            }
        }
    }

    fn abort_after_deadline(&mut self) {
        let Admission::Draining { deadline: Some(deadline) } = self.admission else { return };
        if Instant::now() >= deadline {
            for request in self.ledger.requests() {
                self.scheduler.abort(request, &mut self.effects);
            }
        }
    }

    /// Sends what there is to tell. No step is in flight, so the sequences of closed sinks end at once, and
    /// that is told too.
    fn send_effects(&mut self) {
        while !self.effects.is_empty() {
            // First the counters: who reads them after an event finds it counted.
            self.publish();
            for Effect { request, kind } in std::mem::take(&mut self.effects) {
                match kind {
                    EffectKind::PromptLogprobs { logit_rows } => {
                        let logprobs =
                            self.logprobs[logit_rows].iter_mut().filter_map(Option::take).collect();
                        self.tell(request, RequestEvent::PromptLogprobs { logprobs });
                    }
                    EffectKind::Embedding { values } => {
                        self.tell(request, RequestEvent::Embedding { values });
                    }
                    EffectKind::Token { token_id, logit_row } => {
                        let logprobs = self.logprobs[logit_row].take();
                        self.tell(request, RequestEvent::Token { token_id, logprobs });
                    }
                    EffectKind::Finished { reason, stop_token, prompt_tokens, completion_tokens } => {
                        let finished = RequestEvent::Finished {
                            reason,
                            stop_token: stop_token.map(|(token_id, _)| token_id),
                            stop_logprobs: stop_token
                                .and_then(|(_, logit_row)| self.logprobs[logit_row].take()),
                            prompt_tokens,
                            completion_tokens,
                        };
                        self.ledger.close(request, finished);
                    }
                    EffectKind::Failed(failure) => {
                        self.ledger.close(request, RequestEvent::Failed(failure));
                    }
                }
            }
        }
    }

    /// Sends an event of an open request that is not its last; ends the request if nobody reads it.
    fn tell(&mut self, request: RequestId, event: RequestEvent) {
        if self.ledger.send(request, event) == SinkState::Closed {
            self.scheduler.abort(request, &mut self.effects);
        }
    }

    /// Shows the handles where the engine is.
    fn publish(&mut self) {
        if self.scheduler.is_idle() {
            self.working_since = None;
        }
        let stats = self.scheduler.stats();
        let mut state = self.shared.state();
        if stats.preemptions > state.stats.preemptions {
            let EngineStats { preemptions, running, waiting, .. } = stats;
            tracing::debug!(
                preemptions,
                running,
                waiting,
                "sequences went back to the queue: KV blocks ran out, or a priority took their place"
            );
        }
        state.stats = stats;
        state.received = self.received;
        for tenant in self.scheduler.take_started() {
            if let Some(waiting) = state.not_started.get_mut(&tenant) {
                *waiting -= 1;
                if *waiting == 0 {
                    state.not_started.remove(&tenant);
                }
            }
        }
        state.working_since = self.working_since;
    }

    /// Closes the door, then fails every request that came through it.
    fn fail(&mut self, message: &str) {
        // Requests are sent under this lock and only to a healthy engine: none comes after this.
        self.shared.state().health = Health::Failed { message: message.to_owned() };
        for command in self.commands.try_iter() {
            if let Command::Submit(submission) = command {
                self.received += 1;
                self.ledger.open(submission.id, submission.sink);
            }
        }
        let failed = self.ledger.requests().len() as u64;
        {
            let mut state = self.shared.state();
            state.received = self.received;
            state.not_started.clear();
            state.working_since = None;
            state.stats.finished.failed += failed;
            state.stats.running = 0;
            state.stats.waiting = 0;
            state.stats.kv_blocks_used = 0;
        }
        self.ledger.fail_all(&format!("the engine has failed: {message}"));
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Refuses logits and hidden states that are not those of `batch`.
fn check_values(
    logits: Option<&Logits>,
    hidden_states: &[f32],
    batch: &Batch,
    limits: &RunnerLimits,
) -> Result<(), StepError> {
    let (rows, vocabulary_size) = (batch.logit_rows.len(), limits.vocabulary_size);
    let (hidden_rows, hidden_size) = (batch.hidden_rows.len(), limits.hidden_size.unwrap_or(0));
    if hidden_states.len() != hidden_rows * hidden_size {
        return Err(StepError::new(format!(
            "the runner returned {} values of hidden states, expected {hidden_rows} rows of {hidden_size}",
            hidden_states.len()
        )));
    }
    let Some(logits) = logits else { return Ok(()) };
    if logits.rows == rows
        && logits.vocabulary == vocabulary_size
        && logits.values.len() == rows * vocabulary_size
    {
        return Ok(());
    }
    Err(StepError::new(format!(
        "the runner returned {} values as {} rows of {} logits, expected {rows} rows of {vocabulary_size}",
        logits.values.len(),
        logits.rows,
        logits.vocabulary
    )))
}
