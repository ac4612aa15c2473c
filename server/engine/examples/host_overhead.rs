//! What a step costs on the host: the engine over a device that does nothing.
//!
//! `cargo run --release -p nibble-engine --example host_overhead` prints microseconds for each step of
//! decoding sequences: once with a vocabulary of 8 tokens, which leaves scheduling, block tables and events,
//! and then with that of a large model and several ways of sampling.
#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nibble_engine::{
    Engine, EngineConfig, EventSink, Request, RequestEvent, RunnerLimits, SamplingParameters, SinkState,
    StepError, StepRunner, StepValues,
};
use nibble_model::forward::{Batch, Logits};

const PROMPT_TOKENS: usize = 512;
const LARGE_VOCABULARY: usize = 151_936;

/// Returns the same logits for every row, and measures the time between its calls.
struct NullRunner {
    vocabulary_size: usize,
    sequences: usize,
    row: Vec<f32>,
    returned: Option<Instant>,
    /// Receives the time since the last step returned, for steps in which all sequences decode.
    host_times: Sender<Duration>,
}

impl StepRunner for NullRunner {
    fn limits(&self) -> RunnerLimits {
        RunnerLimits {
            blocks: 65_536,
            block_size: 16,
            vocabulary_size: self.vocabulary_size,
            maximum_sequence_tokens: 65_536,
            eos_token_ids: vec![],
            hidden_size: None,
        }
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        let decodes = batch.token_ids.len() == self.sequences && batch.logit_rows.len() == self.sequences;
        if let (true, Some(returned)) = (decodes, self.returned) {
            // The receiver lives until the engine has ended.
            let _ = self.host_times.send(returned.elapsed());
        }
        let rows = batch.logit_rows.len();
        let values = self.row.repeat(rows);
        self.returned = Some(Instant::now());
        Ok(Logits { rows, vocabulary: self.vocabulary_size, values }.into())
    }
}

/// Forgets its events.
struct NullSink;

impl EventSink for NullSink {
    fn send(&mut self, _: RequestEvent) -> SinkState {
        SinkState::Open
    }
}

/// Median and 99th percentile of the host's time in a step, in microseconds.
fn measure(
    sequences: usize,
    vocabulary_size: usize,
    steps: usize,
    sampling: &SamplingParameters,
) -> (f64, f64) {
    // About normally distributed with deviation 3, as a model's logits are.
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let value = |_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 3.0;
    let (host_times, measured) = channel();
    let runner = NullRunner {
        vocabulary_size,
        sequences,
        row: (0..vocabulary_size).map(value).collect(),
        returned: None,
        host_times,
    };
    let config = EngineConfig {
        max_prefill_chunk_tokens: 2048,
        max_step_tokens: 8192,
        // The runner always says the same token: every guess would be right, and no step one of plain decoding.
        max_draft_tokens: 0,
        ..Default::default()
    };
    let engine = Engine::start(Box::new(runner), config).expect("a valid configuration");
    let handle = engine.handle();
    for _ in 0..sequences {
        let prompt = vec![1; PROMPT_TOKENS];
        let sampling = SamplingParameters { max_tokens: steps, ..sampling.clone() };
        handle.submit(Request::new(prompt, sampling), Box::new(NullSink)).expect("accepted");
    }
    drop(handle);
    engine.join().expect("an orderly end");
    let mut microseconds: Vec<f64> = measured.iter().map(|time| time.as_secs_f64() * 1e6).collect();
    microseconds.sort_by(f64::total_cmp);
    (microseconds[microseconds.len() / 2], microseconds[microseconds.len() * 99 / 100])
}

fn main() {
    let greedy = SamplingParameters { temperature: 0.0, ..Default::default() };
    let plain = SamplingParameters::default();
    let nucleus = SamplingParameters { temperature: 0.7, top_p: 0.9, ..Default::default() };
    let top_k = SamplingParameters { top_k: Some(50), ..nucleus.clone() };
    let penalized = SamplingParameters { repetition_penalty: 1.1, ..nucleus.clone() };
    let logprobs = SamplingParameters { logprobs: Some(5), ..greedy.clone() };
    println!("sequences  vocabulary  sampling              median us      p99 us");
    for (sequences, vocabulary, steps, name, sampling) in [
        (1, 8, 4000, "greedy", &greedy),
        (64, 8, 4000, "greedy", &greedy),
        (256, 8, 4000, "greedy", &greedy),
        (64, LARGE_VOCABULARY, 60, "greedy", &greedy),
        (64, LARGE_VOCABULARY, 60, "greedy, logprobs 5", &logprobs),
        (64, LARGE_VOCABULARY, 60, "temperature 1", &plain),
        (64, LARGE_VOCABULARY, 60, "0.7, top_p 0.9", &nucleus),
        (64, LARGE_VOCABULARY, 60, "0.7, top_p, top_k 50", &top_k),
        (64, LARGE_VOCABULARY, 60, "0.7, top_p, penalty", &penalized),
    ] {
        let (median, p99) = measure(sequences, vocabulary, steps, sampling);
        println!("{sequences:9}  {vocabulary:10}  {name:20}  {median:10.1}  {p99:10.1}");
    }
}
