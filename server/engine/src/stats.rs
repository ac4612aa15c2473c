//! What the engine counts, for metrics and health checks.

use std::time::Duration;

use crate::handle::EngineConfig;
use crate::runner::RunnerLimits;
use crate::sequence::Sequence;

/// Upper bounds of the buckets of times of a request, in seconds: those of vLLM's request histograms.
const SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// Upper bounds of the buckets of tokens in a step: those of vLLM's `iteration_tokens_total`.
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Upper bounds of the buckets of seconds between tokens: those of vLLM's `request_time_per_output_token_seconds`.
const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// What [`token_bounds`] takes its bounds from.
const ONE_TWO_FIVE: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6,
    2e6, 5e6, 1e7,
];

/// Upper bounds of the buckets of tokens of a request: 1, 2, 5, 10, ... up to the longest sequence that fits, as
/// vLLM has them.
pub fn token_bounds(maximum_tokens: usize) -> &'static [f64] {
    &ONE_TWO_FIVE[..ONE_TWO_FIVE.partition_point(|&bound| bound <= maximum_tokens as f64)]
}

/// Counts of observed values by bucket, as Prometheus wants them.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bounds (inclusive) of the buckets, ascending; values above the last are only in `count`.
    pub bounds: &'static [f64],
    /// Values in each bucket alone (not cumulative), as many as `bounds`.
    pub buckets: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
    /// Number of all values.
    pub count: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: vec![0; bounds.len()], sum: 0.0, count: 0 }
    }

    /// Adds one value.
    pub(crate) fn observe(&mut self, value: f64) {
        if let Some(bucket) = self.bounds.iter().position(|&bound| value <= bound) {
            self.buckets[bucket] += 1;
        }
        self.sum += value;
        self.count += 1;
    }

    /// Adds the seconds from `start` to `end`.
    pub(crate) fn observe_between(&mut self, start: Duration, end: Duration) {
        self.observe(end.saturating_sub(start).as_secs_f64());
    }
}

/// Ended requests by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FinishedCounts {
    /// By an end-of-sequence or stop token.
    pub stop: u64,
    /// By `max_tokens`.
    pub length: u64,
    /// By an abort, a closed sink or the drain deadline.
    pub aborted: u64,
    /// By an error.
    pub failed: u64,
}

/// The engine's counters at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineStats {
    /// Sequences that hold KV blocks.
    pub running: usize,
    /// Sequences that wait for KV blocks, preempted ones included.
    pub waiting: usize,
    /// KV blocks that sequences hold; blocks that only the prefix cache remembers are not among them.
    pub kv_blocks_used: usize,
    /// KV blocks in the cache.
    pub kv_blocks_total: usize,
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// Sequences put back to waiting because KV blocks ran out; each computes its tokens again.
    pub preemptions: u64,
    /// Prompt tokens computed or found in the prefix cache, each request's once (what preemption computes again
    /// is not counted).
    pub prompt_tokens: u64,
    /// Of these, the tokens that were found in the prefix cache.
    pub prompt_tokens_cached: u64,
    /// Prompt tokens computed again, because a preemption had thrown them away.
    pub prompt_tokens_recomputed: u64,
    /// Tokens of sequences at their admission, preempted ones' again: what could be found in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Of these, the tokens that were found and need not be computed.
    pub prefix_cache_hits: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Sequences in steps that were computed with a draft.
    pub drafts: u64,
    /// Tokens of these drafts.
    pub draft_tokens: u64,
    /// Of these drafts, by the number of their tokens, from 1.
    pub drafts_by_length: Vec<u64>,
    /// By place in a draft, from its first token: those that were right.
    pub accepted_draft_tokens: Vec<u64>,
    /// Steps completed.
    pub steps: u64,
    /// While there is work: time since the last step completed or since the work arrived, whichever is
    /// later. Absent when idle. A large value means that the runner hangs.
    pub last_step_age: Option<Duration>,
    /// Ended requests.
    pub finished: FinishedCounts,
    /// Tokens computed in a step, prompt and generated.
    pub step_tokens: Histogram,
    /// Seconds from submission to the first step, one value per started request.
    pub queue_seconds: Histogram,
    /// Seconds from the first step to the first token, one value per request that got one.
    pub prefill_seconds: Histogram,
    /// Seconds from the first to the last token, one value per ended request that got a token.
    pub decode_seconds: Histogram,
    /// Seconds from the first step to the last token, one value per ended request that got a token.
    pub inference_seconds: Histogram,
    /// Mean of the seconds between the tokens of a request, one value per ended request with two tokens or more.
    pub mean_token_seconds: Histogram,
    /// Tokens of the prompt, one value per ended request.
    pub request_prompt_tokens: Histogram,
    /// Tokens generated, one value per ended request.
    pub request_generation_tokens: Histogram,
    /// Tokens that the request allowed to generate, one value per ended request.
    pub request_max_tokens: Histogram,
    /// Prompt tokens that were computed, not found in the prefix cache, one value per ended request.
    pub request_computed_prompt_tokens: Histogram,
}

impl EngineStats {
    /// Counters of an engine that has done nothing yet.
    pub(crate) fn new(limits: &RunnerLimits, config: &EngineConfig) -> Self {
        let tokens = || Histogram::new(token_bounds(limits.maximum_tokens()));
        Self {
            running: 0,
            waiting: 0,
            kv_blocks_used: 0,
            kv_blocks_total: limits.blocks,
            block_size: limits.block_size,
            preemptions: 0,
            prompt_tokens: 0,
            prompt_tokens_cached: 0,
            prompt_tokens_recomputed: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            generation_tokens: 0,
            drafts: 0,
            draft_tokens: 0,
            drafts_by_length: vec![0; config.max_draft_tokens],
            accepted_draft_tokens: vec![0; config.max_draft_tokens],
            steps: 0,
            last_step_age: None,
            finished: FinishedCounts::default(),
            step_tokens: Histogram::new(STEP_TOKENS),
            queue_seconds: Histogram::new(SECONDS),
            prefill_seconds: Histogram::new(SECONDS),
            decode_seconds: Histogram::new(SECONDS),
            inference_seconds: Histogram::new(SECONDS),
            mean_token_seconds: Histogram::new(TOKEN_SECONDS),
            request_prompt_tokens: tokens(),
            request_generation_tokens: tokens(),
            request_max_tokens: tokens(),
            request_computed_prompt_tokens: tokens(),
        }
    }

    /// Observes what is known of a request when it ends, however it does: also a stop string that the reader of its
    /// tokens found looks like an abort from here.
    pub(crate) fn observe_end(&mut self, sequence: &Sequence) {
        let generated = sequence.completion().len();
        self.request_prompt_tokens.observe(sequence.prompt().len() as f64);
        self.request_generation_tokens.observe(generated as f64);
        self.request_max_tokens.observe(sequence.sampling.max_tokens as f64);
        self.request_computed_prompt_tokens.observe(sequence.computed_prompt_tokens() as f64);
        let times = sequence.times;
        if let (Some(started), Some(first), Some(last)) = (times.started, times.first_token, times.last_token)
        {
            self.decode_seconds.observe_between(first, last);
            self.inference_seconds.observe_between(started, last);
            if generated > 1 {
                let seconds = last.saturating_sub(first).as_secs_f64();
                self.mean_token_seconds.observe(seconds / (generated - 1) as f64);
            }
        }
    }
}
