//! The scheduler's rules, one by one.

mod sharing;

use std::time::Duration;

use nibble_model::pooling_config::Pooling;

use super::invariants::{check, check_forgotten, check_plan};
use super::{Effect, EffectKind, Scheduler, StepOutput, StepPlan};
use crate::handle::EngineConfig;
use crate::request::{Failure, FinishReason, Request, RequestId};
use crate::runner::RunnerLimits;
use crate::sampling::SamplingParameters;

const BLOCK_SIZE: usize = 4;
const TOKEN: u32 = 7;

fn scheduler(blocks: usize, config: EngineConfig) -> Scheduler {
    let limits = RunnerLimits {
        blocks,
        block_size: BLOCK_SIZE,
        vocabulary_size: 10,
        maximum_sequence_tokens: 1000,
        eos_token_ids: vec![0],
        hidden_size: Some(1),
    };
    Scheduler::new(&limits, &config)
}

/// Submits a request whose prompt has nothing in common with another's.
fn submit(scheduler: &mut Scheduler, id: u64, prompt_tokens: usize, max_tokens: usize) {
    let first = 1000 * (id as u32 + 1);
    submit_prompt(scheduler, id, (first..first + prompt_tokens as u32).collect(), max_tokens);
}

fn submit_prompt(scheduler: &mut Scheduler, id: u64, prompt: Vec<u32>, max_tokens: usize) {
    let sampling = SamplingParameters { max_tokens, ..Default::default() };
    scheduler.submit(RequestId(id), Request::new(prompt, sampling), Duration::from_secs(id));
}

fn schedule(scheduler: &mut Scheduler) -> StepPlan {
    let plan = scheduler.schedule(Duration::from_secs(100)).expect("there is work");
    check(scheduler);
    check_plan(scheduler, &plan);
    plan
}

/// The request and the number of tokens of each entry.
fn entries(scheduler: &Scheduler, plan: &StepPlan) -> Vec<(u64, usize)> {
    plan.entries.iter().map(|planned| (scheduler.running()[planned.running].id.0, planned.tokens)).collect()
}

fn complete(scheduler: &mut Scheduler, plan: StepPlan, token_id: u32) -> Vec<Effect> {
    let next_tokens = plan.batch.logit_rows.iter().map(|_| Ok(token_id)).collect();
    let mut effects = Vec::new();
    let hidden_states = plan.batch.hidden_rows.iter().map(|&row| plan.batch.token_ids[row] as f32).collect();
    let completed_at = Duration::from_secs(200);
    scheduler.complete(StepOutput { plan, next_tokens, hidden_states, completed_at }, &mut effects);
    check(scheduler);
    effects
}

/// One whole step; its entries.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
    let plan = schedule(scheduler);
    let entries = entries(scheduler, &plan);
    complete(scheduler, plan, TOKEN);
    entries
}

fn config(max_step_tokens: usize, max_prefill_chunk_tokens: usize) -> EngineConfig {
    EngineConfig { max_step_tokens, max_prefill_chunk_tokens, ..Default::default() }
}

#[test]
fn decodes_come_first_and_prefill_chunks_share_the_rest_of_the_budget() {
    let mut scheduler = scheduler(100, config(10, 6));
    submit(&mut scheduler, 0, 2, 50);
    submit(&mut scheduler, 1, 3, 50);
    assert_eq!(step(&mut scheduler), [(0, 2), (1, 3)]);
    submit(&mut scheduler, 2, 20, 50);
    submit(&mut scheduler, 3, 8, 50);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 6), (3, 2)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 6), (3, 2)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 6), (3, 2)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 2), (3, 2)]);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 1), (3, 1)]);
}

#[test]
fn admission_is_first_come_first_served_even_if_a_later_request_would_fit() {
    let mut scheduler = scheduler(10, config(100, 100));
    submit(&mut scheduler, 0, 24, 4);
    submit(&mut scheduler, 1, 20, 4);
    submit(&mut scheduler, 2, 1, 4);
    assert_eq!(step(&mut scheduler), [(0, 24)], "5 blocks do not fit beside 6 of 10, 1 block would");
    for _ in 0..3 {
        assert_eq!(step(&mut scheduler), [(0, 1)]);
    }
    assert_eq!(step(&mut scheduler), [(1, 20), (2, 1)]);
}

#[test]
fn a_newcomer_leaves_one_block_free_for_each_running_sequence() {
    let mut scheduler = scheduler(4, config(100, 100));
    submit(&mut scheduler, 0, 4, 5);
    submit(&mut scheduler, 1, 12, 1);
    assert_eq!(step(&mut scheduler), [(0, 4)], "3 blocks are free and wanted, but the first soon needs one");
    let mut scheduler = self::scheduler(5, config(100, 100));
    submit(&mut scheduler, 0, 4, 5);
    submit(&mut scheduler, 1, 12, 1);
    assert_eq!(step(&mut scheduler), [(0, 4), (1, 12)]);
}

#[test]
fn the_youngest_is_preempted_and_computes_prompt_and_completion_again() {
    let mut scheduler = scheduler(6, config(100, 100));
    submit(&mut scheduler, 0, 8, 17);
    submit(&mut scheduler, 1, 6, 12);
    assert_eq!(step(&mut scheduler), [(0, 8), (1, 6)]);
    // 0 has 2 blocks and takes a third at 9 and a fourth at 13 tokens; 1 takes its third at 9.
    for _ in 0..4 {
        assert_eq!(step(&mut scheduler), [(0, 1), (1, 1)]);
    }
    assert_eq!(scheduler.stats().kv_blocks_used, 6);
    assert_eq!(step(&mut scheduler), [(0, 1)], "0 needs a fourth block: 1 gives its three");
    let stats = scheduler.stats();
    assert_eq!((stats.preemptions, stats.running, stats.waiting), (1, 1, 1));
    for _ in 0..11 {
        assert_eq!(step(&mut scheduler), [(0, 1)]);
    }
    // 6 of the prompt and the 5 generated before.
    assert_eq!(step(&mut scheduler), [(1, 11)]);
    let stats = scheduler.stats();
    assert_eq!((stats.prompt_tokens, stats.generation_tokens), (14, 17 + 6), "each counted once");
    assert_eq!(stats.queue_seconds.count, 2);
    assert_eq!(stats.prefill_seconds.count, 2);
}

#[test]
fn a_youngest_sequence_that_needs_a_block_preempts_itself() {
    let mut scheduler = scheduler(5, config(100, 100));
    submit(&mut scheduler, 0, 9, 4);
    submit(&mut scheduler, 1, 4, 9);
    assert_eq!(step(&mut scheduler), [(0, 9), (1, 4)]);
    for _ in 0..3 {
        assert_eq!(step(&mut scheduler), [(0, 1), (1, 1)]);
    }
    assert_eq!(scheduler.stats().finished.length, 1);
    submit(&mut scheduler, 2, 8, 8);
    assert_eq!(step(&mut scheduler), [(1, 1), (2, 8)]);
    let mut preempted = false;
    for _ in 0..4 {
        preempted |= step(&mut scheduler).iter().all(|&(id, _)| id == 1);
    }
    assert!(preempted, "2 needs its third block while 1 holds the others");
    assert_eq!(scheduler.stats().preemptions, 1);
}

#[test]
fn an_abort_in_flight_keeps_the_blocks_until_the_step_completes_and_drops_its_token() {
    let mut scheduler = scheduler(10, config(100, 100));
    submit(&mut scheduler, 0, 6, 5);
    submit(&mut scheduler, 1, 6, 5);
    let plan = schedule(&mut scheduler);
    let mut effects = Vec::new();
    scheduler.abort(RequestId(0), &mut effects);
    scheduler.abort(RequestId(0), &mut effects);
    check(&scheduler);
    assert!(effects.is_empty());
    assert_eq!(scheduler.stats().kv_blocks_used, 4);
    let effects = complete(&mut scheduler, plan, TOKEN);
    let finished = EffectKind::Finished {
        reason: FinishReason::Aborted,
        stop_token: None,
        prompt_tokens: 6,
        completion_tokens: 0,
    };
    let token = EffectKind::Token { token_id: TOKEN, logit_row: 1 };
    let expected = [(1, token), (0, finished)].map(|(id, kind)| Effect { request: RequestId(id), kind });
    assert_eq!(effects, expected);
    assert_eq!(scheduler.stats().kv_blocks_used, 2);
}

#[test]
fn an_abort_between_steps_or_in_the_queue_ends_the_request_at_once() {
    let mut scheduler = scheduler(10, EngineConfig { max_running_sequences: 1, ..config(100, 100) });
    submit(&mut scheduler, 0, 6, 5);
    submit(&mut scheduler, 1, 3, 5);
    step(&mut scheduler);
    let mut effects = Vec::new();
    for id in [1, 0, 0, 9] {
        scheduler.abort(RequestId(id), &mut effects);
        check(&scheduler);
    }
    let ended: Vec<u64> = effects.iter().map(|effect| effect.request.0).collect();
    assert_eq!(ended, [1, 0]);
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.stats().kv_blocks_used, 0);
    assert_eq!(scheduler.stats().finished.aborted, 2);
    assert_eq!(scheduler.take_started().count(), 2, "each leaves the ranks of those not started once");
    assert!(scheduler.schedule(Duration::ZERO).is_none());
}

#[test]
fn a_stop_token_ends_a_sequence_and_is_told_with_the_end_only() {
    let mut scheduler = scheduler(10, config(100, 100));
    submit(&mut scheduler, 0, 2, 1);
    let plan = schedule(&mut scheduler);
    let effects = complete(&mut scheduler, plan, 0);
    let kind = EffectKind::Finished {
        reason: FinishReason::Stop,
        stop_token: Some((0, 0)),
        prompt_tokens: 2,
        completion_tokens: 1,
    };
    assert_eq!(effects, [Effect { request: RequestId(0), kind }]);
    let stats = scheduler.stats();
    assert_eq!((stats.finished.stop, stats.finished.length, stats.generation_tokens), (1, 0, 1));
}

#[test]
fn times_are_observed_once_for_each_request() {
    let mut scheduler = scheduler(10, config(100, 100));
    submit(&mut scheduler, 3, 2, 2);
    step(&mut scheduler);
    step(&mut scheduler);
    let stats = scheduler.stats();
    assert_eq!((stats.queue_seconds.count, stats.queue_seconds.sum), (1, 97.0));
    assert_eq!((stats.prefill_seconds.count, stats.prefill_seconds.sum), (1, 100.0));
    assert_eq!((stats.decode_seconds.count, stats.decode_seconds.sum), (1, 0.0));
    assert_eq!(stats.step_tokens.count, 2);
    assert_eq!(stats.step_tokens.sum, 3.0);
}

#[test]
fn a_prefix_in_the_cache_is_shared_while_it_is_held_and_found_when_it_is_idle() {
    let mut scheduler = scheduler(10, config(100, 100));
    let prompt: Vec<u32> = (0..11).collect();
    submit_prompt(&mut scheduler, 0, prompt.clone(), 3);
    assert_eq!(step(&mut scheduler), [(0, 11)]);
    submit_prompt(&mut scheduler, 1, prompt.clone(), 1);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 3)], "two full blocks are shared, the third is computed");
    let stats = scheduler.stats();
    assert_eq!(stats.kv_blocks_used, 3, "the second has ended");
    assert_eq!((stats.prefix_cache_queries, stats.prefix_cache_hits, stats.prompt_tokens), (22, 8, 22));
    assert_eq!(step(&mut scheduler), [(0, 1)]);
    assert_eq!(scheduler.stats().kv_blocks_used, 0, "remembered blocks are not in use");
    // The first computed 13 tokens, two of them generated: three full blocks.
    let longer = prompt.iter().copied().chain([TOKEN, TOKEN, TOKEN]).collect();
    submit_prompt(&mut scheduler, 2, longer, 1);
    submit_prompt(&mut scheduler, 3, prompt[..8].to_vec(), 1);
    assert_eq!(step(&mut scheduler), [(2, 2), (3, 4)], "the last token is computed even if the cache has it");
}

#[test]
fn equal_prompts_in_one_step_end_up_on_the_same_blocks() {
    let mut scheduler = scheduler(10, config(100, 100));
    for id in 0..3 {
        submit_prompt(&mut scheduler, id, (0..8).collect(), 3);
    }
    assert_eq!(step(&mut scheduler), [(0, 8), (1, 8), (2, 8)], "nothing to share yet");
    assert_eq!(scheduler.stats().kv_blocks_used, 2);
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(scheduler.stats().kv_blocks_used, 5, "what follows is their own");
}

#[test]
fn a_reset_of_the_cache_forgets_what_nobody_holds_even_while_a_step_is_in_flight() {
    let mut scheduler = scheduler(20, config(100, 100));
    let [ended, running]: [Vec<u32>; 2] = [0, 100].map(|first| (first..first + 9).collect());
    submit_prompt(&mut scheduler, 0, ended.clone(), 1);
    submit_prompt(&mut scheduler, 1, running.clone(), 9);
    assert_eq!(step(&mut scheduler), [(0, 9), (1, 9)]);
    submit_prompt(&mut scheduler, 2, ended.clone(), 1);
    assert_eq!(step(&mut scheduler), [(1, 1), (2, 1)], "found before");
    let plan = schedule(&mut scheduler);
    scheduler.reset_prefix_cache();
    check_forgotten(&scheduler);
    check(&scheduler);
    complete(&mut scheduler, plan, TOKEN);
    submit_prompt(&mut scheduler, 3, ended.clone(), 1);
    submit_prompt(&mut scheduler, 4, running, 1);
    assert_eq!(
        step(&mut scheduler),
        [(1, 1), (3, 9), (4, 1)],
        "what a running sequence holds is found still"
    );
    submit_prompt(&mut scheduler, 5, ended, 1);
    assert_eq!(step(&mut scheduler), [(1, 1), (5, 1)], "and the cache fills again");
}

#[test]
fn the_least_recently_used_prefix_goes_first_from_its_end() {
    let mut scheduler = scheduler(5, config(100, 100));
    let [old, new] = [0, 100].map(|first| (first..first + 8).collect::<Vec<u32>>());
    submit_prompt(&mut scheduler, 0, old.clone(), 1);
    submit_prompt(&mut scheduler, 1, new.clone(), 1);
    assert_eq!(step(&mut scheduler), [(0, 8), (1, 8)]);
    // Takes the free block and the last one of the older prefix.
    submit(&mut scheduler, 2, 7, 1);
    assert_eq!(step(&mut scheduler), [(2, 7)]);
    let with_more = |prefix: &[u32]| prefix.iter().copied().chain([999]).collect::<Vec<u32>>();
    submit_prompt(&mut scheduler, 3, with_more(&new), 1);
    assert_eq!(step(&mut scheduler), [(3, 1)]);
    submit_prompt(&mut scheduler, 4, with_more(&old), 1);
    assert_eq!(step(&mut scheduler), [(4, 5)]);
}

#[test]
fn a_preempted_sequence_finds_what_nobody_needed_meanwhile() {
    let mut scheduler = scheduler(6, config(100, 100));
    submit(&mut scheduler, 0, 8, 6);
    submit(&mut scheduler, 1, 6, 12);
    for _ in 0..5 {
        step(&mut scheduler);
    }
    assert_eq!(step(&mut scheduler), [(0, 1)]);
    assert_eq!(scheduler.stats().preemptions, 1);
    assert!(scheduler.is_idle() || scheduler.running().is_empty(), "the first has ended");
    // 11 tokens known, 8 of them in two blocks that are idle still.
    assert_eq!(step(&mut scheduler), [(1, 3)]);
    let stats = scheduler.stats();
    assert_eq!((stats.prefix_cache_queries, stats.prefix_cache_hits), (8 + 6 + 11, 8));
    assert_eq!(stats.prompt_tokens, 14, "counted once");
}

#[test]
fn without_prefix_caching_nothing_is_shared_or_kept() {
    let mut scheduler = scheduler(10, EngineConfig { prefix_caching: false, ..config(100, 100) });
    for id in 0..2 {
        submit_prompt(&mut scheduler, id, (0..8).collect(), 1);
    }
    assert_eq!(step(&mut scheduler), [(0, 8), (1, 8)]);
    submit_prompt(&mut scheduler, 2, (0..8).collect(), 1);
    assert_eq!(step(&mut scheduler), [(2, 8)]);
    assert_eq!(scheduler.stats().prefix_cache_hits, 0);
}

/// Submits a request that wants the log probabilities of its prompt.
fn submit_scored(scheduler: &mut Scheduler, id: u64, prompt: Vec<u32>, max_tokens: usize) {
    let sampling = SamplingParameters { max_tokens, prompt_logprobs: Some(1), ..Default::default() };
    scheduler.submit(RequestId(id), Request::new(prompt, sampling), Duration::from_secs(id));
}

#[test]
fn logits_of_prompts_have_a_budget_of_their_own_which_cuts_chunks() {
    let mut scheduler = scheduler(100, EngineConfig { max_prompt_logit_rows: 5, ..config(100, 8) });
    submit_scored(&mut scheduler, 0, (100..108).collect(), 1);
    submit_scored(&mut scheduler, 1, (200..206).collect(), 1);
    submit(&mut scheduler, 2, 20, 1);
    assert_eq!(step(&mut scheduler), [(0, 5)], "nobody overtakes whoever waits for a budget");
    // The last row of a prompt is sampled from: of 3 rows 2 are scored.
    assert_eq!(step(&mut scheduler), [(0, 3), (1, 3), (2, 8)]);
    assert_eq!(step(&mut scheduler), [(1, 3), (2, 8)]);
    assert_eq!(step(&mut scheduler), [(2, 4)]);
    assert!(scheduler.is_idle());
}

#[test]
fn a_prompt_that_is_only_scored_ends_with_its_last_row_and_leaves_the_cache_to_others() {
    let mut scheduler = scheduler(100, config(100, 100));
    for id in 0..2 {
        submit_scored(&mut scheduler, id, (0..9).collect(), 0);
        let plan = schedule(&mut scheduler);
        assert_eq!(plan.batch.logit_rows, (0..9).collect::<Vec<_>>());
        assert_eq!(plan.batch.token_ids.len(), 9, "what is in the cache is computed again");
        let effects = complete(&mut scheduler, plan, TOKEN);
        let scored = EffectKind::PromptLogprobs { logit_rows: 0..8 };
        let finished = EffectKind::Finished {
            reason: FinishReason::Length,
            stop_token: None,
            prompt_tokens: 9,
            completion_tokens: 0,
        };
        let expected = [scored, finished].map(|kind| Effect { request: RequestId(id), kind });
        assert_eq!(effects, expected);
    }
    let stats = scheduler.stats();
    assert_eq!((stats.prefix_cache_queries, stats.prefix_cache_hits), (0, 0), "the cache was not asked");
    submit_prompt(&mut scheduler, 2, (0..9).collect(), 1);
    assert_eq!(step(&mut scheduler), [(2, 1)], "the blocks of a scored prompt serve others");
    assert_eq!(scheduler.stats().prefix_cache_hits, 8);
}

#[test]
fn an_embedding_is_made_of_the_last_token_or_of_all_and_only_the_latter_needs_them_computed() {
    let mut scheduler = scheduler(100, config(100, 5));
    submit_prompt(&mut scheduler, 0, (1..10).collect(), 1);
    step(&mut scheduler);
    step(&mut scheduler);
    for (id, pooling, steps, value) in [(1, Pooling::Last, vec![1], 9.0), (2, Pooling::Mean, vec![5, 4], 5.0)]
    {
        scheduler.submit(RequestId(id), Request::embedding((1..10).collect(), pooling), Duration::ZERO);
        let mut effects = Vec::new();
        for tokens in steps {
            let plan = schedule(&mut scheduler);
            assert_eq!((plan.batch.token_ids.len(), plan.batch.logit_rows.len()), (tokens, 0), "{pooling:?}");
            effects = complete(&mut scheduler, plan, TOKEN);
        }
        let finished = EffectKind::Finished {
            reason: FinishReason::Length,
            stop_token: None,
            prompt_tokens: 9,
            completion_tokens: 0,
        };
        let expected = [EffectKind::Embedding { values: vec![value] }, finished];
        assert_eq!(effects, expected.map(|kind| Effect { request: RequestId(id), kind }));
    }
    assert_eq!(scheduler.stats().kv_blocks_used, 0);
}

#[test]
fn what_a_sequence_computed_serves_others_unless_its_numbers_were_of_no_use() {
    for sound in [true, false] {
        let mut scheduler = scheduler(10, config(100, 100));
        submit_prompt(&mut scheduler, 0, (0..9).collect(), 1);
        let plan = schedule(&mut scheduler);
        let next_tokens = vec![if sound { Ok(TOKEN) } else { Err(Failure::of_engine("not finite")) }];
        let mut effects = Vec::new();
        let completed_at = Duration::from_secs(200);
        let output = StepOutput { plan, next_tokens, hidden_states: Vec::new(), completed_at };
        scheduler.complete(output, &mut effects);
        check(&scheduler);
        submit_prompt(&mut scheduler, 1, (0..9).collect(), 1);
        assert_eq!(step(&mut scheduler), [(1, if sound { 1 } else { 9 })]);
    }
}
