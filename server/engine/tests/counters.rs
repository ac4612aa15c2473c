//! What the statistics of requests say after workloads whose numbers are known.

mod support;

use nibble_engine::{EngineConfig, EngineHandle, Histogram};
use support::requests::{prompt, start};
use support::{Gate, ScriptedRunner, Stream, eventually, gated, greedy};

/// An engine whose sequences end by their length only.
fn gated_engine(blocks: usize) -> (EngineHandle, Gate) {
    let (runner, gate) = gated(ScriptedRunner::new(blocks, 4, 40, &[]));
    let (_, handle) = start(runner, EngineConfig::default());
    (handle, gate)
}

fn count_and_sum(histogram: &Histogram) -> (u64, f64) {
    (histogram.count, histogram.sum)
}

#[test]
fn every_ended_request_is_observed_once_aborted_ones_too() {
    let (handle, gate) = gated_engine(100);
    let finished = Stream::submit(&handle, greedy(prompt(10, 1), 3)).unwrap();
    gate.step_has_begun();
    let aborted = Stream::submit(&handle, greedy(prompt(7, 2), 50)).unwrap();
    for _ in 0..3 {
        gate.let_go();
        gate.step_has_begun();
    }
    // The aborted one has two tokens; the step that runs gives it none.
    handle.abort(aborted.id);
    gate.let_go();
    finished.finish();
    aborted.finish();
    let stats = handle.stats();
    assert_eq!(count_and_sum(&stats.request_prompt_tokens), (2, 17.0));
    assert_eq!(count_and_sum(&stats.request_generation_tokens), (2, 5.0));
    assert_eq!(count_and_sum(&stats.request_max_tokens), (2, 53.0));
    assert_eq!(count_and_sum(&stats.request_computed_prompt_tokens), (2, 17.0));
    for histogram in [&stats.decode_seconds, &stats.inference_seconds, &stats.mean_token_seconds] {
        assert_eq!(histogram.count, 2);
    }
    assert!(stats.decode_seconds.sum <= stats.inference_seconds.sum);
    assert!(stats.mean_token_seconds.sum <= stats.decode_seconds.sum);
}

#[test]
fn a_request_that_never_started_has_no_times() {
    let (handle, gate) = gated_engine(100);
    let running = Stream::submit(&handle, greedy(prompt(4, 1), 1)).unwrap();
    gate.step_has_begun();
    let waiting = Stream::submit(&handle, greedy(prompt(5, 2), 9)).unwrap();
    handle.abort(waiting.id);
    gate.let_go();
    running.finish();
    waiting.finish();
    let stats = handle.stats();
    assert_eq!(count_and_sum(&stats.request_prompt_tokens), (2, 9.0));
    assert_eq!(count_and_sum(&stats.request_computed_prompt_tokens), (2, 4.0));
    assert_eq!((stats.inference_seconds.count, stats.mean_token_seconds.count), (1, 0));
}

#[test]
fn cached_and_computed_prompt_tokens_are_the_prompt() {
    let (handle, gate) = gated_engine(100);
    drop(gate);
    for _ in 0..2 {
        Stream::submit(&handle, greedy(prompt(10, 1), 1)).unwrap().finish();
    }
    let stats = handle.stats();
    // The second finds two blocks of four.
    assert_eq!((stats.prompt_tokens, stats.prompt_tokens_cached, stats.prompt_tokens_recomputed), (20, 8, 0));
    assert_eq!(count_and_sum(&stats.request_computed_prompt_tokens), (2, 12.0));
}

#[test]
fn what_a_preemption_throws_away_is_counted_as_computed_again() {
    let (runner, gate) = gated(ScriptedRunner::new(4, 4, 40, &[]));
    let (_, handle) = start(runner, EngineConfig { prefix_caching: false, ..EngineConfig::default() });
    let first = Stream::submit(&handle, greedy(prompt(4, 1), 8)).unwrap();
    let second = Stream::submit(&handle, greedy(prompt(4, 2), 8)).unwrap();
    eventually("both are there", || handle.stats().running + handle.stats().waiting == 2);
    drop(gate);
    first.finish();
    second.finish();
    let stats = handle.stats();
    assert!(stats.preemptions > 0);
    assert_eq!((stats.prompt_tokens, stats.prompt_tokens_cached), (8, 0), "each prompt once");
    assert_eq!(stats.prompt_tokens_recomputed, 4 * stats.preemptions);
    assert_eq!(count_and_sum(&stats.request_computed_prompt_tokens), (2, 8.0));
    assert_eq!(count_and_sum(&stats.request_generation_tokens), (2, 16.0));
}

#[test]
fn buckets_of_tokens_end_at_the_longest_sequence() {
    assert_eq!(nibble_engine::token_bounds(256), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
    assert_eq!(nibble_engine::token_bounds(5), [1.0, 2.0, 5.0]);
    assert_eq!(nibble_engine::token_bounds(131_072).last(), Some(&100_000.0));
}
