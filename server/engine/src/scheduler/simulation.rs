//! Random lives of a scheduler: arrivals, aborts, stops, failures and preemptions in tiny pools, with every
//! invariant checked after every call.
//!
//! A seed that fails is in the panic's message; `SEED=n cargo test million` runs it alone.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::time::Duration;

use nibble_model::pooling_config::Pooling;
use proptest::prelude::{Strategy, any, prop, proptest};

use super::invariants::{check, check_forgotten, check_plan};
use super::{Effect, EffectKind, Scheduler, StepOutput, StepPlan};
use crate::handle::EngineConfig;
use crate::request::{Failure, FinishReason, Request, RequestId};
use crate::runner::RunnerLimits;
use crate::sampling::{SamplingParameters, random};
use crate::stats::EngineStats;

const EOS: u32 = 0;
const STOP: u32 = 1;
/// Different priorities, from 0.
const PRIORITIES: u64 = 3;

/// One thing that happens to a scheduler.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A request arrives; lengths are cut to what fits.
    Submit(Arrival),
    /// A request is aborted, counted back from the youngest; it may have ended already.
    Abort { back: u64 },
    /// The cache forgets what nobody holds.
    ResetPrefixCache,
    /// The step in flight completes, or the next one is planned.
    Turn,
    /// As `Turn`, and if a step completes, the first of its rows cannot be sampled.
    FailingTurn,
}

/// A request that arrives.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// Prompts of a family begin alike.
    family: u64,
    prompt_tokens: usize,
    max_tokens: usize,
    ignore_eos: bool,
    wants: Wants,
    tenant: u64,
    priority: i32,
}

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wants {
    /// A token at least.
    Completion,
    /// The log probabilities of the prompt, and perhaps tokens.
    Scores,
    Embedding(Pooling),
}

/// What the owner of a request has seen of it, and what it may see.
struct Owner {
    prompt_tokens: usize,
    max_tokens: usize,
    seen_tokens: usize,
    /// Tokens of the prompt whose log probabilities it still wants.
    unscored: Range<usize>,
    /// The embedding that it still wants.
    embedding: Option<f32>,
    /// The number of completed steps at which it must have ended.
    ends_by_step: u64,
}

/// A scheduler, and a world that knows what it must do.
struct World {
    scheduler: Scheduler,
    in_flight: Option<StepPlan>,
    /// Open requests.
    owners: BTreeMap<RequestId, Owner>,
    submitted: u64,
    ended: u64,
    completed_steps: u64,
    /// Whether all requests so far are of one tenant and priority.
    first_come_first_served: bool,
    /// Of the logit rows of the last step: the position of each.
    logit_positions: Vec<usize>,
    /// Of every plan and effect so far.
    digest: DefaultHasher,
    maximum_tokens: usize,
    block_size: usize,
    /// What the device has written to each place: a digest of the whole sequence up to there.
    cache: Vec<u64>,
}

/// The digest of a sequence that ends with `token`.
fn extend(before: u64, token: u32) -> u64 {
    random::derived_seed(before, u64::from(token))
}

/// The token that a request gets in a place of its completion, in whatever company.
fn token(request: RequestId, index: usize) -> u32 {
    // Some repeat themselves, so that drafts are right at times.
    let index = if request.0.is_multiple_of(3) { index % 7 } else { index };
    // One in 25 ends the sequence, unless end-of-sequence is ignored.
    (random::derived_seed(request.0, index as u64) % 50) as u32
}

impl World {
    fn new(blocks: usize, block_size: usize, config: &EngineConfig) -> Self {
        let limits = RunnerLimits {
            blocks,
            block_size,
            vocabulary_size: 50,
            maximum_sequence_tokens: usize::MAX,
            eos_token_ids: vec![EOS],
            hidden_size: Some(1),
        };
        Self {
            scheduler: Scheduler::new(&limits, config),
            in_flight: None,
            owners: BTreeMap::new(),
            submitted: 0,
            ended: 0,
            completed_steps: 0,
            first_come_first_served: true,
            logit_positions: Vec::new(),
            digest: DefaultHasher::new(),
            maximum_tokens: blocks * block_size + 1,
            block_size,
            cache: vec![0; blocks * block_size],
        }
    }

    fn apply(&mut self, event: Event) {
        let mut effects = Vec::new();
        match event {
            Event::Submit(arrival) => self.submit(arrival),
            Event::Abort { back } => {
                let id = RequestId(self.submitted.saturating_sub(1 + back));
                self.scheduler.abort(id, &mut effects);
            }
            Event::ResetPrefixCache => {
                self.scheduler.reset_prefix_cache();
                check_forgotten(&self.scheduler);
            }
            Event::Turn => self.turn(false, &mut effects),
            Event::FailingTurn => self.turn(true, &mut effects),
        }
        for effect in effects {
            self.see(&effect);
        }
        check(&self.scheduler);
        let in_time = self.owners.values().all(|owner| self.completed_steps < owner.ends_by_step);
        assert!(in_time, "every request ends in bounded steps");
        assert_eq!(
            self.scheduler.is_idle(),
            self.owners.is_empty(),
            "idle when every request was told its end"
        );
        if self.scheduler.is_idle() {
            assert_eq!(self.scheduler.stats().kv_blocks_used, 0, "nobody holds a block when all have ended");
        }
    }

    fn submit(&mut self, arrival: Arrival) {
        let Arrival { family, ignore_eos, wants, tenant, priority, .. } = arrival;
        let prompt_tokens = arrival.prompt_tokens.min(self.maximum_tokens - 1);
        let max_tokens = match wants {
            Wants::Completion => arrival.max_tokens + 1,
            Wants::Scores => arrival.max_tokens,
            Wants::Embedding(_) => 0,
        };
        let max_tokens = max_tokens.min(self.maximum_tokens - prompt_tokens);
        let id = RequestId(self.submitted);
        self.submitted += 1;
        // The last third is the request's own.
        let common = prompt_tokens - prompt_tokens / 3;
        let author = |at| if at < common { RequestId(1_000_000 + family) } else { id };
        let prompt = (0..prompt_tokens).map(|at| token(author(at), at + 1_000_000)).collect();
        let sampling = SamplingParameters {
            max_tokens,
            ignore_eos,
            stop_token_ids: vec![STOP],
            prompt_logprobs: (wants == Wants::Scores).then_some(0),
            ..Default::default()
        };
        let (request, embedding) = match wants {
            Wants::Completion | Wants::Scores => (Request::new(prompt, sampling), None),
            Wants::Embedding(pooling) => {
                // The hidden state of a token is its position, from 1.
                let last = prompt_tokens as f32;
                let embedding = if pooling == Pooling::Last { last } else { (last + 1.0) / 2.0 };
                (Request::embedding(prompt, pooling), Some(embedding))
            }
        };
        let request = Request {
            priority,
            tenant: format!("tenant {tenant}").into(),
            cache_salt: (family == 2).then(|| "salt".into()),
            ..request
        };
        self.scheduler.submit(id, request, Duration::ZERO);
        // Among equals the first gets on with every step, and never has to start again: each one ahead delays this
        // one by at most its own tokens. One step may be in flight already.
        self.first_come_first_served &= tenant == 0 && priority == 0;
        let ahead: usize = self.owners.values().map(|owner| owner.prompt_tokens + owner.max_tokens).sum();
        let everything = (ahead + prompt_tokens + max_tokens) as u64 + 1;
        let mut ends_by_step = self.completed_steps + everything;
        if !self.first_come_first_served {
            // Later arrivals may go first; without more of them all ends. What made way starts again, once for each
            // change of priority.
            ends_by_step = self.completed_steps + PRIORITIES * everything;
            self.owners.values_mut().for_each(|owner| owner.ends_by_step = ends_by_step);
        }
        let unscored = 0..if wants == Wants::Scores { prompt_tokens - 1 } else { 0 };
        self.owners.insert(
            id,
            Owner { prompt_tokens, max_tokens, seen_tokens: 0, unscored, embedding, ends_by_step },
        );
    }

    fn turn(&mut self, fails: bool, effects: &mut Vec<Effect>) {
        let now = Duration::from_millis(self.completed_steps);
        let Some(plan) = self.in_flight.take() else {
            self.in_flight = self.scheduler.schedule(now);
            assert_eq!(
                self.in_flight.is_none(),
                self.scheduler.is_idle(),
                "there is a step while there is work"
            );
            if let Some(plan) = &self.in_flight {
                check_plan(&self.scheduler, plan);
                (&plan.batch.token_ids, &plan.batch.positions, &plan.batch.logit_rows).hash(&mut self.digest);
                plan.batch.sequences.iter().for_each(|rows| rows.block_table.hash(&mut self.digest));
            }
            return;
        };
        self.run(&plan);
        let logit_rows = plan.batch.logit_rows.iter();
        self.logit_positions = logit_rows.map(|&row| plan.batch.positions[row] as usize).collect();
        let mut next_tokens = Vec::new();
        for (planned, rows) in plan.entries.iter().zip(&plan.batch.sequences) {
            let sequence = &self.scheduler.running()[planned.running];
            let end = rows.first_position + rows.rows;
            next_tokens.extend((end - planned.logits..end).map(|position| {
                let known = sequence.tokens().get(position + 1).copied();
                Ok(known.unwrap_or_else(|| token(sequence.id, position + 1 - sequence.prompt().len())))
            }));
        }
        if let (true, Some(first)) = (fails, next_tokens.first_mut()) {
            *first = Err(Failure::of_engine("not finite"));
        }
        let hidden_rows = plan.batch.hidden_rows.iter();
        let hidden_states = hidden_rows.map(|&row| plan.batch.positions[row] as f32 + 1.0).collect();
        self.scheduler.complete(StepOutput { plan, next_tokens, hidden_states, completed_at: now }, effects);
        self.completed_steps += 1;
    }

    /// Does what a device would: every row reads what lies before it, and writes to its own place. Then the
    /// cache must hold each sequence as if it had been alone.
    fn run(&mut self, plan: &StepPlan) {
        for (planned, rows) in plan.entries.iter().zip(&plan.batch.sequences) {
            let place = |position: usize| {
                rows.block_table[position / self.block_size] as usize * self.block_size
                    + position % self.block_size
            };
            for row in 0..rows.rows {
                let position = rows.first_position + row;
                let before = position.checked_sub(1).map_or(0, |before| self.cache[place(before)]);
                self.cache[place(position)] = extend(before, plan.batch.token_ids[rows.first_row + row]);
            }
            let end = rows.first_position + rows.rows;
            let tokens = &self.scheduler.running()[planned.running].tokens_and_draft()[..end];
            let alone = tokens.iter().fold(0, |before, &token| extend(before, token));
            assert_eq!(self.cache[place(end - 1)], alone, "the cache holds the sequence");
        }
    }

    /// Checks an effect against what its request may see next.
    fn see(&mut self, effect: &Effect) {
        format!("{effect:?}").hash(&mut self.digest);
        let id = effect.request;
        let owner = self.owners.get_mut(&id).expect("effects are of open requests");
        match &effect.kind {
            EffectKind::PromptLogprobs { logit_rows } => {
                for &position in &self.logit_positions[logit_rows.clone()] {
                    assert_eq!(Some(position), owner.unscored.next(), "the prompt is scored in order, once");
                }
                return;
            }
            EffectKind::Embedding { values } => {
                assert_eq!(Some(values[0]), owner.embedding.take(), "every token is pooled once");
                assert_eq!(values.len(), 1);
                return;
            }
            EffectKind::Token { token_id, .. } => {
                assert_eq!(*token_id, token(id, owner.seen_tokens), "tokens come in order, each once");
                owner.seen_tokens += 1;
                return;
            }
            EffectKind::Finished { reason, stop_token, prompt_tokens, completion_tokens } => {
                assert_eq!(*prompt_tokens, owner.prompt_tokens);
                let stopped = usize::from(*reason == FinishReason::Stop);
                assert_eq!(*completion_tokens, owner.seen_tokens + stopped);
                assert!(*completion_tokens <= owner.max_tokens);
                assert_eq!(stop_token.is_some(), stopped == 1);
                let aborted = *reason == FinishReason::Aborted;
                assert!(owner.unscored.is_empty() || aborted, "the whole prompt is scored");
                assert!(owner.embedding.is_none() || aborted, "the embedding comes before the end");
                match reason {
                    FinishReason::Stop => {
                        let stop_token = stop_token.map(|(token_id, _)| token_id);
                        assert_eq!(stop_token, Some(token(id, owner.seen_tokens)));
                    }
                    FinishReason::Length => assert_eq!(*completion_tokens, owner.max_tokens),
                    FinishReason::Aborted => {}
                }
            }
            EffectKind::Failed(failure) => assert_eq!(failure.message, "not finite"),
        }
        self.owners.remove(&id);
        self.ended += 1;
    }

    /// Lets everything end; returns a digest of the whole life, and the last counters.
    fn finish(mut self) -> (u64, EngineStats) {
        while !self.scheduler.is_idle() || self.in_flight.is_some() {
            self.apply(Event::Turn);
        }
        let stats = self.scheduler.stats();
        let finished = stats.finished;
        assert_eq!(finished.stop + finished.length + finished.aborted + finished.failed, self.submitted);
        assert_eq!(self.ended, self.submitted, "each request got one terminal event");
        assert_eq!(stats.steps, self.completed_steps);
        (self.digest.finish(), stats)
    }
}

/// A reproducible life; small numbers of everything, so that everything runs short.
fn live(seed: u64, events: usize) -> (u64, EngineStats) {
    let mut drawn = 0;
    let mut below = |bound: u64| {
        drawn += 1;
        random::derived_seed(seed, drawn) % bound
    };
    let config = EngineConfig {
        max_running_sequences: 1 + below(12) as usize,
        max_step_tokens: 1 + below(40) as usize,
        max_prefill_chunk_tokens: 1 + below(20) as usize,
        prefix_caching: below(4) > 0,
        max_prompt_logit_rows: 1 + below(10) as usize,
        max_draft_tokens: below(2) as usize * below(6) as usize,
        max_step_tokens_with_drafts: below(30) as usize,
        ..EngineConfig::default()
    };
    let (blocks, block_size) = (1 + below(24) as usize, 1 + below(5) as usize);
    let (arrivals, aborts) = (1 + below(30), below(12));
    let (tenants, priorities) = (1 + below(3), 1 + below(PRIORITIES));
    let mut world = World::new(blocks, block_size, &config);
    for _ in 0..events {
        let event = match below(100) {
            at if at < arrivals => Event::Submit(Arrival {
                family: below(3),
                prompt_tokens: 1 + below(30) as usize,
                max_tokens: below(30) as usize,
                ignore_eos: below(2) == 0,
                wants: match below(8) {
                    0 => Wants::Embedding(Pooling::Mean),
                    1 => Wants::Embedding(Pooling::Last),
                    2 | 3 => Wants::Scores,
                    _ => Wants::Completion,
                },
                tenant: below(tenants),
                priority: below(priorities) as i32,
            }),
            at if at < arrivals + aborts => Event::Abort { back: below(20) },
            98 if below(4) == 0 => Event::ResetPrefixCache,
            99 => Event::FailingTurn,
            _ => Event::Turn,
        };
        world.apply(event);
    }
    world.finish()
}

/// Runs `life`; a panic names the seed.
fn named<T>(seed: u64, life: impl FnOnce() -> T) -> T {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(life))
        .unwrap_or_else(|_| panic!("the simulation fails with SEED={seed}; see the panic above"))
}

#[test]
fn a_million_random_steps_keep_every_invariant() {
    if let Ok(seed) = std::env::var("SEED") {
        live(seed.parse().expect("SEED is a number"), 1000);
        return;
    }
    let (mut steps, mut preemptions, mut hits, mut drafts, mut right, mut seed) = (0, 0, 0, 0, 0, 0);
    while steps < 1_000_000 {
        let (_, stats) = named(seed, || live(seed, 1000));
        steps += stats.steps;
        preemptions += stats.preemptions;
        hits += stats.prefix_cache_hits;
        drafts += stats.draft_tokens;
        right += stats.accepted_draft_tokens.iter().sum::<u64>();
        seed += 1;
    }
    assert!(preemptions > 10_000, "the pools are tiny enough: {preemptions} preemptions");
    assert!(hits > 100_000, "prefixes are found: {hits} tokens");
    assert!(right > 10_000 && drafts > right + 5_000, "drafts are right and wrong: {right} of {drafts}");
}

#[test]
fn the_same_calls_give_the_same_plans_and_effects() {
    let digests: Vec<u64> = (0..40).map(|seed| live(seed, 500).0).collect();
    let again: Vec<u64> = (0..40).map(|seed| live(seed, 500).0).collect();
    assert_eq!(digests, again);
    let mut distinct = digests;
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 40, "the digest sees what happens");
}

fn event() -> impl Strategy<Value = Event> {
    const WANTS: [Wants; 4] =
        [Wants::Completion, Wants::Scores, Wants::Embedding(Pooling::Mean), Wants::Embedding(Pooling::Last)];
    let lengths = (1..20usize, 0..20usize);
    let wants = prop::sample::select(&WANTS[..]);
    let submit = (0..3u64, lengths, any::<bool>(), wants, 0..2u64, 0..PRIORITIES as i32);
    proptest::prop_oneof![
        2 => submit.prop_map(|(family, (prompt_tokens, max_tokens), ignore_eos, wants, tenant, priority)| {
            Event::Submit(Arrival { family, prompt_tokens, max_tokens, ignore_eos, wants, tenant, priority })
        }),
        1 => (0..10u64).prop_map(|back| Event::Abort { back }),
        1 => proptest::strategy::Just(Event::ResetPrefixCache),
        6 => proptest::strategy::Just(Event::Turn),
        1 => proptest::strategy::Just(Event::FailingTurn),
    ]
}

proptest! {
    /// As the simulation, with events that shrink to the few that matter.
    #[test]
    fn any_short_life_keeps_every_invariant(
        events in prop::collection::vec(event(), 0..120),
        (blocks, block_size) in (1..10usize, 1..4usize),
        (max_running_sequences, max_step_tokens, max_prefill_chunk_tokens) in (1..6usize, 1..12usize, 1..8usize),
        (prefix_caching, max_prompt_logit_rows, max_draft_tokens) in (any::<bool>(), 1..6usize, 0..5usize),
    ) {
        let config = EngineConfig {
            max_running_sequences,
            max_step_tokens,
            max_prefill_chunk_tokens,
            prefix_caching,
            max_prompt_logit_rows,
            max_draft_tokens,
            ..EngineConfig::default()
        };
        let mut world = World::new(blocks, block_size, &config);
        for event in events {
            world.apply(event);
        }
        world.finish();
    }
}
