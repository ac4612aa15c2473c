//! Which sequences compute how many tokens in the next step: a pure state machine with four verbs.
//!
//! [`Scheduler::submit`] and [`Scheduler::abort`] may come at any time; [`Scheduler::schedule`] plans a step
//! and [`Scheduler::complete`] takes its outcome, in turns. There is no clock, thread, input or randomness in
//! here: the same calls give the same plans.
//!
//! A step, within `max_step_tokens`:
//! 1. *Decode first*: every running sequence with one token to compute gets it, oldest first. If it needs a
//!    block and none is free, the **youngest** running sequence is preempted: its blocks are freed at once, it
//!    goes back to the head of the queue, and will compute its tokens again. It may be the needy one itself.
//! 2. *Prefill*: running sequences with more to compute get chunks of it, oldest first. Rows whose logits are
//!    wanted for log probabilities of a prompt have a budget of their own, `max_prompt_logit_rows`, which cuts chunks:
//!    so a step never has more than that and one for each running sequence.
//! 3. *Admission*: sequences enter from the head of the queue, strictly in the order of arrival, each with
//!    blocks for all tokens it knows, so that a prefill never waits for a block; one more block for each
//!    running sequence must stay free, so that the newcomer is not preempted at once. Full blocks of the
//!    sequence's prefix that the cache has already are shared, not computed, unless log probabilities of its prompt
//!    are wanted.
//!
//! Why nothing starves: every running sequence is older than every waiting one (admission takes the oldest,
//! preemption the youngest), so the oldest of all runs, is never preempted (alone it fits the cache: `submit`
//! demands it) and computes at least a token in every step: no more than `max_step_tokens` sequences run, so
//! decoding ones always leave a token to the oldest prefill, which has the first of the logit rows, too.
//!
//! Blocks go back when a sequence ends in `complete`, or in `schedule` and `abort` if no step is in flight:
//! never while a step that may write to them is.

#[cfg(test)]
mod invariants;
mod plan;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

pub(crate) use plan::{Effect, EffectKind, StepId, StepOutput, StepPlan};

use crate::blocks::{BlockId, BlockPool};
use crate::handle::EngineConfig;
use crate::request::{FinishReason, Request, RequestId};
use crate::runner::RunnerLimits;
use crate::sampling::random;
use crate::sequence::{Sequence, SequenceState};
use crate::stats::EngineStats;

/// What is left of a step for prefills.
#[derive(Clone, Copy)]
struct Budget {
    tokens: usize,
    /// Rows with logits for log probabilities of prompts.
    prompt_logit_rows: usize,
}

/// The state machine; see the [module](self).
pub(crate) struct Scheduler {
    config: EngineConfig,
    eos_token_ids: Vec<u32>,
    pool: BlockPool,
    /// Oldest first; all younger than the running ones.
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
    next_step: StepId,
    in_flight: Option<StepId>,
    /// The last plan, and blocks that were looked up, for their memory.
    spare_plan: StepPlan,
    cached_prefix: Vec<BlockId>,
    counters: EngineStats,
}

impl Scheduler {
    /// A scheduler of an empty cache.
    pub(crate) fn new(limits: &RunnerLimits, config: &EngineConfig) -> Self {
        Self {
            config: config.clone(),
            eos_token_ids: limits.eos_token_ids.clone(),
            pool: BlockPool::new(limits.blocks, limits.block_size),
            waiting: VecDeque::new(),
            running: Vec::new(),
            next_step: StepId(0),
            in_flight: None,
            spare_plan: StepPlan::default(),
            cached_prefix: Vec::new(),
            counters: EngineStats::new(limits.blocks, limits.block_size),
        }
    }

    /// Queues a request that was submitted at `submitted` (since the start of the engine).
    ///
    /// # Panics
    /// When ids do not ascend, or the request could never fit the cache: [`crate::EngineHandle`] sees to both.
    pub(crate) fn submit(&mut self, id: RequestId, request: Request, submitted: Duration) {
        let seed = random::derived_seed(self.config.seed, id.0);
        let sequence = Sequence::new(id, request, &self.eos_token_ids, seed, submitted);
        let youngest = self.waiting.back().or(self.running.last());
        assert!(
            youngest.is_none_or(|youngest| youngest.id < id),
            "requests arrive in the order of their ids"
        );
        assert!(sequence.remaining() > 0, "a request has a prompt");
        assert!(
            sequence.maximum_cached_tokens() <= self.pool.total() * self.pool.block_size(),
            "an accepted request fits the cache"
        );
        self.waiting.push_back(sequence);
    }

    /// Ends a request: at once, or if a step is in flight and it is running, when that step completes.
    /// Nothing if it has ended already.
    pub(crate) fn abort(&mut self, id: RequestId, effects: &mut Vec<Effect>) {
        if let Ok(index) = self.waiting.binary_search_by_key(&id, |sequence| sequence.id) {
            let sequence = self.waiting.remove(index);
            effects.extend(sequence.map(|sequence| finish(&sequence, FinishReason::Aborted, None)));
            self.counters.finished.aborted += 1;
        } else if let Ok(index) = self.running.binary_search_by_key(&id, |sequence| sequence.id) {
            if let Some(after) = self.in_flight {
                self.running[index].state = SequenceState::Ending { after };
            } else {
                let mut sequence = self.running.remove(index);
                sequence.release(&mut self.pool);
                effects.push(finish(&sequence, FinishReason::Aborted, None));
                self.counters.finished.aborted += 1;
            }
        }
    }

    /// Plans the next step; nothing exactly when there is no request left.
    ///
    /// # Panics
    /// When a step is in flight.
    pub(crate) fn schedule(&mut self, now: Duration) -> Option<StepPlan> {
        assert!(self.in_flight.is_none(), "at most one step is in flight");
        let mut plan = std::mem::take(&mut self.spare_plan);
        plan.clear(self.next_step);
        let mut budget = Budget {
            tokens: self.config.max_step_tokens,
            prompt_logit_rows: self.config.max_prompt_logit_rows,
        };
        self.plan_decodes(&mut plan, &mut budget);
        self.plan_prefills(&mut plan, &mut budget);
        self.admit(now, &mut plan, &mut budget);
        if plan.entries.is_empty() {
            self.spare_plan = plan;
            return None;
        }
        self.in_flight = Some(plan.step);
        self.next_step.0 += 1;
        Some(plan)
    }

    fn plan_decodes(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].remaining() == 1 && self.has_room_for_one(index) {
                plan.push(index, &self.running[index], 1);
                budget.tokens -= 1;
            }
            index += 1;
        }
    }

    /// Finds a place in the cache for the next token of a running sequence, at the cost of younger ones;
    /// false when there is none younger and the sequence itself was preempted.
    fn has_room_for_one(&mut self, index: usize) -> bool {
        let sequence = &self.running[index];
        if sequence.computed < sequence.blocks.len() * self.pool.block_size() {
            return true;
        }
        while index < self.running.len() {
            if let Some(block) = self.pool.allocate() {
                self.running[index].blocks.push(block);
                return true;
            }
            self.preempt_youngest();
        }
        false
    }

    fn preempt_youngest(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            sequence.release(&mut self.pool);
            sequence.state = SequenceState::Waiting;
            self.waiting.push_front(sequence);
            self.counters.preemptions += 1;
        }
    }

    fn plan_prefills(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        for (index, sequence) in self.running.iter().enumerate() {
            // Those with one token had it as a decode.
            if sequence.remaining() > 1 {
                plan_chunk(plan, index, sequence, self.config.max_prefill_chunk_tokens, budget);
            }
        }
    }

    fn admit(&mut self, now: Duration, plan: &mut StepPlan, budget: &mut Budget) {
        let most_running = self.config.max_running_sequences.min(self.config.max_step_tokens);
        while budget.tokens > 0 && self.running.len() < most_running {
            let Some(next) = self.waiting.front() else { return };
            if next.computable_within(budget.prompt_logit_rows) == 0 {
                return;
            }
            self.cached_prefix.clear();
            if self.config.prefix_caching && next.reads_cache() {
                // The last token is computed in any case: its logits are wanted.
                let known = &next.tokens()[..next.tokens().len() - 1];
                self.cached_prefix.extend(self.pool.cached_prefix(known));
            }
            let held_by_others = self.cached_prefix.iter().filter(|&&block| self.pool.holders(block) > 0);
            let blocks = next.tokens().len().div_ceil(self.pool.block_size()) - held_by_others.count();
            if blocks + self.running.len() > self.pool.available() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            sequence.occupy(&self.cached_prefix, &mut self.pool);
            if sequence.reads_cache() {
                self.counters.prefix_cache_queries += sequence.tokens().len() as u64;
                self.counters.prefix_cache_hits += sequence.computed as u64;
            }
            sequence.state = SequenceState::Running;
            if sequence.times.started.is_none() {
                sequence.times.started = Some(now);
                self.counters.queue_seconds.observe_between(sequence.times.submitted, now);
            }
            let running = self.running.len();
            plan_chunk(plan, running, &sequence, self.config.max_prefill_chunk_tokens, budget);
            self.running.push(sequence);
        }
    }

    /// Takes the outcome of the step in flight: appends tokens, ends what is over, frees blocks.
    ///
    /// # Panics
    /// When the output is not that of the step in flight.
    pub(crate) fn complete(&mut self, output: StepOutput, effects: &mut Vec<Effect>) {
        let StepOutput { plan, next_tokens, hidden_states, completed_at } = output;
        let width = hidden_states.len() / plan.batch.hidden_rows.len().max(1);
        assert_eq!(self.in_flight.take(), Some(plan.step), "the output of the step in flight");
        assert_eq!(next_tokens.len(), plan.batch.logit_rows.len(), "one outcome for each logit row");
        self.counters.steps += 1;
        self.counters.step_tokens.observe(plan.batch.token_ids.len() as f64);
        let (mut logit_row, mut hidden_row) = (0, 0);
        for planned in &plan.entries {
            let sequence = &mut self.running[planned.running];
            self.counters.prompt_tokens += sequence.advance(planned.tokens) as u64;
            if self.config.prefix_caching {
                sequence.name_full_blocks(&mut self.pool);
            }
            if sequence.state == SequenceState::Running {
                let outcome = Outcome {
                    next_tokens: &next_tokens[logit_row..logit_row + planned.logits],
                    scored: planned.scored(),
                    first_logit_row: logit_row,
                };
                take_outcome(sequence, &outcome, completed_at, &mut self.counters, effects);
                let hidden = &hidden_states[hidden_row * width..(hidden_row + planned.hidden) * width];
                if planned.hidden > 0
                    && let Some(embedding) = sequence.pool(planned.hidden, hidden)
                {
                    take_embedding(sequence, embedding, completed_at, &mut self.counters, effects);
                }
            }
            logit_row += planned.logits;
            hidden_row += planned.hidden;
        }
        self.running.retain_mut(|sequence| {
            if let SequenceState::Ending { .. } = sequence.state {
                effects.push(finish(sequence, FinishReason::Aborted, None));
                self.counters.finished.aborted += 1;
            } else if sequence.state != SequenceState::Ended {
                return true;
            }
            sequence.release(&mut self.pool);
            false
        });
        self.spare_plan = plan;
    }

    /// Running sequences, oldest first: what a plan's entries point into.
    pub(crate) fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// The running sequences whose next token is sampled after `plan` and restricted by a constraint.
    pub(crate) fn constrained(&mut self, plan: &StepPlan) -> Vec<&mut Sequence> {
        let entries = plan.entries.iter().filter(|planned| planned.samples);
        let indices = entries.map(|planned| planned.running);
        let mut indices: Vec<usize> = indices.filter(|&index| self.running[index].is_constrained()).collect();
        // A plan has decodes first, then prefills.
        indices.sort_unstable();
        let mut indices = indices.into_iter().peekable();
        let running = self.running.iter_mut().enumerate();
        running
            .filter(|(index, _)| indices.next_if_eq(index).is_some())
            .map(|(_, sequence)| sequence)
            .collect()
    }

    /// Whether every request has ended.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that have not had their first step. Preempted ones are older than these, so before them.
    pub(crate) fn not_started(&self) -> usize {
        self.waiting.len() - self.waiting.partition_point(|sequence| sequence.times.started.is_some())
    }

    /// The counters now.
    pub(crate) fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_blocks_used: self.pool.total() - self.pool.available(),
            ..self.counters.clone()
        }
    }
}

/// Plans as many of the next tokens of `sequence` as a chunk and the budget allow, if any.
fn plan_chunk(
    plan: &mut StepPlan,
    running: usize,
    sequence: &Sequence,
    max_chunk_tokens: usize,
    budget: &mut Budget,
) {
    let tokens =
        sequence.computable_within(budget.prompt_logit_rows).min(max_chunk_tokens).min(budget.tokens);
    if tokens > 0 {
        budget.tokens -= tokens;
        budget.prompt_logit_rows -= sequence.scored_within(tokens);
        plan.push(running, sequence, tokens);
    }
}

/// What came of the logit rows of one sequence.
struct Outcome<'a> {
    next_tokens: &'a [Result<u32, String>],
    /// Rows for log probabilities of the prompt; the one sampled from follows, if there is one.
    scored: usize,
    /// Their first in the step.
    first_logit_row: usize,
}

/// Applies what came of the logit rows of a sequence that nobody aborted.
fn take_outcome(
    sequence: &mut Sequence,
    outcome: &Outcome<'_>,
    now: Duration,
    counters: &mut EngineStats,
    effects: &mut Vec<Effect>,
) {
    let request = sequence.id;
    if let Some(message) = outcome.next_tokens.iter().find_map(|next| next.as_ref().err()) {
        sequence.state = SequenceState::Ended;
        counters.finished.failed += 1;
        effects.push(Effect { request, kind: EffectKind::Failed { message: message.clone() } });
        return;
    }
    let logit_row = outcome.first_logit_row + outcome.scored;
    if outcome.scored > 0 {
        sequence.score(outcome.scored);
        let logit_rows = outcome.first_logit_row..logit_row;
        effects.push(Effect { request, kind: EffectKind::PromptLogprobs { logit_rows } });
    }
    let Some(&Ok(token_id)) = outcome.next_tokens.get(outcome.scored) else { return };
    let first_token = observe_prefill(sequence, now, counters);
    if sequence.sampling.max_tokens == 0 {
        // The prompt was all that was wanted.
        sequence.state = SequenceState::Ended;
        effects.push(finish(sequence, FinishReason::Length, None));
        counters.finished.length += 1;
        return;
    }
    counters.generation_tokens += 1;
    let reason = sequence.append(token_id);
    if reason != Some(FinishReason::Stop) {
        effects.push(Effect { request, kind: EffectKind::Token { token_id, logit_row } });
    }
    if let Some(reason) = reason {
        sequence.state = SequenceState::Ended;
        effects.push(finish(sequence, reason, Some(logit_row)));
        counters.decode_seconds.observe_between(first_token, now);
        match reason {
            FinishReason::Stop => counters.finished.stop += 1,
            _ => counters.finished.length += 1,
        }
    }
}

/// Observes the time that the prompt took, once; returns when it was done.
fn observe_prefill(sequence: &mut Sequence, now: Duration, counters: &mut EngineStats) -> Duration {
    let started = sequence.times.started.unwrap_or(now);
    if sequence.times.first_token.is_none() {
        counters.prefill_seconds.observe_between(started, now);
    }
    *sequence.times.first_token.get_or_insert(now)
}

/// Ends a sequence that was to become an embedding.
fn take_embedding(
    sequence: &mut Sequence,
    embedding: Result<Vec<f32>, String>,
    now: Duration,
    counters: &mut EngineStats,
    effects: &mut Vec<Effect>,
) {
    let request = sequence.id;
    sequence.state = SequenceState::Ended;
    observe_prefill(sequence, now, counters);
    match embedding {
        Ok(values) => {
            effects.push(Effect { request, kind: EffectKind::Embedding { values } });
            effects.push(finish(sequence, FinishReason::Length, None));
            counters.finished.length += 1;
        }
        Err(message) => {
            effects.push(Effect { request, kind: EffectKind::Failed { message } });
            counters.finished.failed += 1;
        }
    }
}

/// The terminal effect of a sequence that ends without an error.
fn finish(sequence: &Sequence, reason: FinishReason, logit_row: Option<usize>) -> Effect {
    let completion = sequence.completion();
    let kind = EffectKind::Finished {
        reason,
        stop_token: completion.last().copied().zip(logit_row).filter(|_| reason == FinishReason::Stop),
        prompt_tokens: sequence.prompt().len(),
        completion_tokens: completion.len(),
    };
    Effect { request: sequence.id, kind }
}
