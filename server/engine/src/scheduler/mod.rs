//! Which sequences compute how many tokens in the next step: a pure state machine with five verbs.
//!
//! [`Scheduler::submit`], [`Scheduler::abort`] and [`Scheduler::reset_prefix_cache`] may come at any time;
//! [`Scheduler::schedule`] plans a step and [`Scheduler::complete`] takes its outcome, in turns. There is no clock, thread, input or randomness in
//! here: the same calls give the same plans.
//!
//! A step, within `max_step_tokens`:
//! 0. *Making way*: if whoever is next in the [queue] has priority over running sequences and does not fit beside
//!    them, those of the lowest priority are preempted for it, if that is enough: their blocks are freed, they go
//!    back to the queue, and will compute their tokens again.
//! 1. *Decode first*: every running sequence with one token to compute gets it. If it needs a block and none is
//!    free, the **last** running sequence is preempted: of the lowest priority the one admitted last. It may be the
//!    needy one itself.
//! 2. *Prefill*: running sequences with more to compute get chunks of it, in order. Rows whose logits are wanted for
//!    log probabilities of prompts have a budget of their own.
//! 3. *Admission*: sequences enter in the order of the queue and nobody overtakes, each with blocks for all tokens it
//!    knows, so that a prefill never waits for a block; one more block for each running sequence must stay free, so
//!    that the newcomer is not preempted at once. Full blocks of the sequence's prefix that the cache has already
//!    are shared, not computed, except for prompts whose tokens' logits are wanted.
//!
//! Why nothing starves within a priority: the first running sequence is never preempted but by a higher priority
//! (alone it fits the cache: `submit` demands it) and computes at least a token in every step: no more than
//! `max_step_tokens` sequences run, so decoding ones always leave a token to the first prefill, which has the first of
//! the logit rows, too. So running sequences end, and whoever is next in the queue gets in; the queue is fair. Under a
//! stream of higher priority lower ones do wait.
//!
//! Blocks go back when a sequence ends in `complete`, or in `schedule` and `abort` if no step is in flight:
//! never while a step that may write to them is.

#[cfg(test)]
mod invariants;
mod outcome;
mod plan;
mod queue;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use plan::{Effect, EffectKind, StepId, StepOutput, StepPlan};

use self::outcome::{Outcome, Record};
use self::queue::Queue;
use crate::blocks::{BlockId, BlockPool};
use crate::handle::EngineConfig;
use crate::request::{Request, RequestId};
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
    waiting: Queue,
    /// By priority, then in the order of admission; sequences admitted to the step in flight stand at the end.
    running: Vec<Sequence>,
    /// Tenants of requests that have started or ended since somebody asked.
    started: Vec<Arc<str>>,
    /// The last id that was submitted.
    last_id: Option<RequestId>,
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
            waiting: Queue::new(&config.tenant_weights),
            running: Vec::new(),
            started: Vec::new(),
            last_id: None,
            next_step: StepId(0),
            in_flight: None,
            spare_plan: StepPlan::default(),
            cached_prefix: Vec::new(),
            counters: EngineStats::new(limits, config),
        }
    }

    /// Queues a request that was submitted at `submitted` (since the start of the engine).
    ///
    /// # Panics
    /// When ids do not ascend, or the request could never fit the cache: [`crate::EngineHandle`] sees to both.
    pub(crate) fn submit(&mut self, id: RequestId, request: Request, submitted: Duration) {
        let seed = random::derived_seed(self.config.seed, id.0);
        let sequence = Sequence::new(id, request, &self.eos_token_ids, seed, submitted);
        assert!(self.last_id.replace(id) < Some(id), "requests arrive in the order of their ids");
        assert!(sequence.remaining() > 0, "a request has a prompt");
        assert!(
            sequence.maximum_cached_tokens() <= self.pool.total() * self.pool.block_size(),
            "an accepted request fits the cache"
        );
        self.waiting.push(sequence);
    }

    /// Ends a request: at once, or if a step is in flight and it is running, when that step completes.
    /// Nothing if it has ended already.
    pub(crate) fn abort(&mut self, id: RequestId, effects: &mut Vec<Effect>) {
        let mut record = Record { now: Duration::ZERO, counters: &mut self.counters, effects };
        if let Some(sequence) = self.waiting.remove(id) {
            if sequence.times.started.is_none() {
                self.started.push(Arc::clone(&sequence.tenant));
            }
            record.abort(&sequence);
        } else if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            if let Some(after) = self.in_flight {
                self.running[index].state = SequenceState::Ending { after };
            } else {
                let mut sequence = self.running.remove(index);
                sequence.release(&mut self.pool);
                record.abort(&sequence);
            }
        }
    }

    /// Forgets every cached block that no sequence holds; held ones serve others as before, and stay in the cache when
    /// their sequences have ended. May come at any time: a step writes to held blocks alone.
    pub(crate) fn reset_prefix_cache(&mut self) {
        self.pool.free_idle();
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
        self.make_way();
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
                self.draft(index, budget.tokens, plan.entries.len());
                plan.push(index, &self.running[index], 1);
                budget.tokens -= 1 + self.running[index].draft_tokens();
            }
            index += 1;
        }
    }

    /// Finds a place in the cache for the next token of a running sequence, at the cost of those after it; false when
    /// there is none and the sequence itself was preempted.
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
            self.preempt_last();
        }
        false
    }

    /// Gives a running sequence a draft, and places in the cache for it, as far as they cost nobody anything: all but the
    /// `planned` sequences need one of the `tokens` left of the step, and maybe a block.
    fn draft(&mut self, index: usize, tokens: usize, planned: usize) {
        let running = self.running.len();
        let spent = self.config.max_step_tokens - tokens;
        let left = tokens.min(self.config.max_step_tokens_with_drafts.saturating_sub(spent));
        let most = left.saturating_sub(running - planned);
        let sequence = &mut self.running[index];
        let places = sequence.blocks.len() * self.pool.block_size() - sequence.tokens().len();
        let spare_blocks = self.pool.available().saturating_sub(running);
        let most = most.min(places + spare_blocks * self.pool.block_size());
        sequence.draft(most.min(self.config.max_draft_tokens), self.config.max_draft_tokens);
        let blocks = sequence.tokens_and_draft().len().div_ceil(self.pool.block_size());
        while sequence.blocks.len() < blocks {
            let Some(block) = self.pool.allocate() else { break };
            sequence.blocks.push(block);
        }
    }

    fn preempt_last(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            sequence.release(&mut self.pool);
            self.waiting.put_back(sequence);
            self.counters.preemptions += 1;
        }
    }

    /// Preempts sequences for the next one in the queue if it has priority over them and their places are enough.
    fn make_way(&mut self) {
        let Some(priority) = self.waiting.front().map(|next| next.priority) else { return };
        let first = self.running.partition_point(|sequence| sequence.priority <= priority);
        let blocks = self.running[first..].iter().flat_map(|sequence| &sequence.blocks);
        let own_blocks = blocks.filter(|&&block| self.pool.holders(block) == 1).count();
        if first < self.most_running() && self.blocks_for_next() + first <= self.pool.available() + own_blocks
        {
            while self.running.len() > first && !self.has_room_for_next() {
                self.preempt_last();
            }
        }
    }

    fn most_running(&self) -> usize {
        self.config.max_running_sequences.min(self.config.max_step_tokens)
    }

    /// Looks the next sequence in the queue up in the cache, into `cached_prefix`, and counts the blocks it takes from
    /// those that are available.
    fn blocks_for_next(&mut self) -> usize {
        self.cached_prefix.clear();
        let Some(next) = self.waiting.front() else { return 0 };
        if self.config.prefix_caching && next.reads_cache() {
            // The last token is computed in any case: its logits are wanted.
            let known = &next.tokens()[..next.tokens().len() - 1];
            self.cached_prefix.extend(self.pool.cached_prefix(next.cache_salt(), known));
        }
        let held_by_others = self.cached_prefix.iter().filter(|&&block| self.pool.holders(block) > 0);
        next.tokens().len().div_ceil(self.pool.block_size()) - held_by_others.count()
    }

    /// Whether the next sequence in the queue can run beside those that do; looks it up in the cache.
    fn has_room_for_next(&mut self) -> bool {
        self.running.len() < self.most_running()
            && self.blocks_for_next() + self.running.len() <= self.pool.available()
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
        while budget.tokens > 0 {
            let Some(next) = self.waiting.front() else { return };
            if next.computable_within(budget.prompt_logit_rows) == 0 || !self.has_room_for_next() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let found = sequence.occupy(&self.cached_prefix, &mut self.pool) as u64;
            self.counters.prompt_tokens += found;
            self.counters.prompt_tokens_cached += found;
            if sequence.reads_cache() {
                self.counters.prefix_cache_queries += sequence.tokens().len() as u64;
                self.counters.prefix_cache_hits += sequence.computed as u64;
            }
            sequence.state = SequenceState::Running;
            if sequence.times.started.is_none() {
                sequence.times.started = Some(now);
                self.counters.queue_seconds.observe_between(sequence.times.submitted, now);
                self.started.push(Arc::clone(&sequence.tenant));
                self.waiting.charge_prompt(&sequence.tenant, sequence.remaining());
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
        let mut record = Record { now: completed_at, counters: &mut self.counters, effects };
        for planned in &plan.entries {
            let sequence = &mut self.running[planned.running];
            let draft = sequence.take_draft();
            let computed = sequence.advance(planned.tokens - planned.draft_tokens);
            record.counters.prompt_tokens += computed.first_time as u64;
            record.counters.prompt_tokens_recomputed += computed.again as u64;
            let mut sound = true;
            if sequence.state == SequenceState::Running {
                let before = sequence.completion().len();
                let outcome = Outcome {
                    next_tokens: &next_tokens[logit_row..logit_row + planned.logits],
                    scored: planned.scored(),
                    draft: &draft,
                    first_logit_row: logit_row,
                };
                sound = record.rows(sequence, &outcome);
                self.waiting.charge_completion(&sequence.tenant, sequence.completion().len() - before);
                let hidden = &hidden_states[hidden_row * width..(hidden_row + planned.hidden) * width];
                if planned.hidden > 0
                    && let Some(embedding) = sequence.pool(planned.hidden, hidden)
                {
                    sound = record.embedding(sequence, embedding);
                }
            }
            logit_row += planned.logits;
            hidden_row += planned.hidden;
            sequence.release_unused(&mut self.pool);
            // Keys and values of a sequence whose numbers are not finite must not serve another.
            if self.config.prefix_caching && sound {
                sequence.name_full_blocks(&mut self.pool);
            }
        }
        self.running.retain_mut(|sequence| {
            if let SequenceState::Ending { .. } = sequence.state {
                record.abort(sequence);
            } else if sequence.state != SequenceState::Ended {
                return true;
            }
            sequence.release(&mut self.pool);
            false
        });
        self.running.sort_by_key(|sequence| sequence.priority);
        self.spare_plan = plan;
    }

    /// Running sequences: what a plan's entries point into.
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

    /// The tenants of requests that had their first step, or ended without one, since the last call.
    pub(crate) fn take_started(&mut self) -> impl Iterator<Item = Arc<str>> {
        self.started.drain(..)
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
