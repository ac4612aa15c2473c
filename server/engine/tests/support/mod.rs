//! Sinks that remember, and a runner whose logits are known in advance.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod requests;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nibble_engine::{
    EngineHandle, EventSink, FinishReason, Request, RequestEvent, RequestId, RunnerLimits,
    SamplingParameters, SinkState, StepError, StepRunner, StepValues, SubmitError, TokenLogprobs,
};
use nibble_model::forward::{Batch, Logits};

/// Long enough for any machine; only a hang reaches it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Passes events to a channel; closed when nobody holds the other end.
struct ChannelSink(Sender<RequestEvent>);

impl EventSink for ChannelSink {
    fn send(&mut self, event: RequestEvent) -> SinkState {
        if self.0.send(event).is_ok() { SinkState::Open } else { SinkState::Closed }
    }
}

/// The reader's end of one request.
pub(crate) struct Stream {
    pub(crate) id: RequestId,
    events: Receiver<RequestEvent>,
}

/// Everything a request was told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Completion {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<Option<TokenLogprobs>>,
    /// Of the prompt's tokens but the first, if asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) embedding: Option<Vec<f32>>,
    pub(crate) end: RequestEvent,
}

impl Completion {
    pub(crate) fn reason(&self) -> Option<FinishReason> {
        match self.end {
            RequestEvent::Finished { reason, .. } => Some(reason),
            _ => None,
        }
    }
}

impl Stream {
    /// Submits a request.
    pub(crate) fn submit(handle: &EngineHandle, request: Request) -> Result<Self, SubmitError> {
        let (sender, events) = channel();
        let id = handle.submit(request, Box::new(ChannelSink(sender)))?;
        Ok(Self { id, events })
    }

    /// The next event.
    pub(crate) fn next(&self) -> RequestEvent {
        self.events.recv_timeout(PATIENCE).expect("an event before patience ends")
    }

    /// Everything up to the terminal event, after which nothing may come.
    pub(crate) fn finish(self) -> Completion {
        let (mut token_ids, mut logprobs, mut prompt_logprobs) = (Vec::new(), Vec::new(), Vec::new());
        let mut embedding = None;
        loop {
            match self.next() {
                RequestEvent::PromptLogprobs { logprobs } => {
                    assert!(token_ids.is_empty(), "the prompt comes first");
                    prompt_logprobs.extend(logprobs);
                }
                RequestEvent::Embedding { values } => assert_eq!(embedding.replace(values), None),
                RequestEvent::Token { token_id, logprobs: of_token } => {
                    token_ids.push(token_id);
                    logprobs.push(of_token);
                }
                end => {
                    // The sink goes with its terminal event.
                    assert!(self.events.recv_timeout(PATIENCE).is_err(), "an event after {end:?}");
                    return Completion { token_ids, logprobs, prompt_logprobs, embedding, end };
                }
            }
        }
    }
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "{what}, but it does not");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A greedy request.
pub(crate) fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let sampling = SamplingParameters { max_tokens, temperature: 0.0, ..Default::default() };
    Request::new(prompt, sampling)
}

/// A reproducible 64-bit number (SplitMix64 of the sum).
pub(crate) fn mix(state: u64, value: u64) -> u64 {
    let mut z = state.wrapping_add(value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The logits after `history`: a pure function of every token in it, in order.
pub(crate) fn scripted_logits(history: &[u32], vocabulary: usize) -> Vec<f32> {
    let state = history.iter().fold(7, |state, &token| mix(state, u64::from(token)));
    (0..vocabulary).map(|token| (mix(state, 1 << 40 | token as u64) >> 40) as f32 / 1e6).collect()
}

/// The completion that a greedy request must get.
pub(crate) fn expected_greedy(request: &Request, vocabulary: usize, eos: &[u32]) -> (Vec<u32>, FinishReason) {
    let mut history = request.prompt.clone();
    let mut completion = Vec::new();
    loop {
        let logits = scripted_logits(&history, vocabulary);
        let best = (0..vocabulary).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        if eos.contains(&(best as u32)) {
            return (completion, FinishReason::Stop);
        }
        history.push(best as u32);
        completion.push(best as u32);
        if completion.len() == request.sampling.max_tokens {
            return (completion, FinishReason::Length);
        }
    }
}

/// Numbers in a hidden state of a [`ScriptedRunner`].
pub(crate) const HIDDEN_SIZE: usize = 3;

/// What a [`ScriptedRunner`] does instead of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Error,
    Panic,
    WrongShape,
    NotANumber,
}

/// Computes [`scripted_logits`] of what it finds in its cache: a token that was never written, or that
/// another sequence wrote over, changes every logit after it.
pub(crate) struct ScriptedRunner {
    limits: RunnerLimits,
    /// The token in each place of the cache.
    cache: Vec<u32>,
    steps: usize,
    fault: Option<(usize, Fault)>,
}

/// A runner whose every step waits for the gate; when the gate is dropped they run freely.
pub(crate) struct GatedRunner<R> {
    runner: R,
    say_waits: Sender<()>,
    permits: Receiver<()>,
}

/// Lets the steps of a gated runner through, one by one.
pub(crate) struct Gate {
    waits: Receiver<()>,
    permits: Sender<()>,
}

/// Puts a gate before a runner.
pub(crate) fn gated<R: StepRunner>(runner: R) -> (GatedRunner<R>, Gate) {
    let (say_waits, waits) = channel();
    let (give_permit, permits) = channel();
    (GatedRunner { runner, say_waits, permits }, Gate { waits, permits: give_permit })
}

impl<R: StepRunner> StepRunner for GatedRunner<R> {
    fn limits(&self) -> RunnerLimits {
        self.runner.limits()
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        if self.say_waits.send(()).is_ok() {
            // An error means that the gate has gone.
            let _ = self.permits.recv();
        }
        self.runner.execute(batch)
    }
}

impl Gate {
    /// Returns when a step has begun and waits.
    pub(crate) fn step_has_begun(&self) {
        self.waits.recv_timeout(PATIENCE).expect("a step begins");
    }

    /// Lets the waiting step go.
    pub(crate) fn let_go(&self) {
        self.permits.send(()).expect("the runner is there");
    }
}

impl ScriptedRunner {
    pub(crate) fn new(
        blocks: usize,
        block_size: usize,
        vocabulary_size: usize,
        eos_token_ids: &[u32],
    ) -> Self {
        let limits = RunnerLimits {
            blocks,
            block_size,
            vocabulary_size,
            maximum_sequence_tokens: 4096,
            eos_token_ids: eos_token_ids.to_vec(),
            hidden_size: Some(HIDDEN_SIZE),
        };
        Self { limits, cache: vec![u32::MAX; blocks * block_size], steps: 0, fault: None }
    }

    /// In step `step`, counted from 0, this happens instead.
    pub(crate) fn with_fault(mut self, step: usize, fault: Fault) -> Self {
        self.fault = Some((step, fault));
        self
    }
}

impl StepRunner for ScriptedRunner {
    fn limits(&self) -> RunnerLimits {
        self.limits.clone()
    }

    fn execute(&mut self, batch: &Batch) -> Result<StepValues, StepError> {
        let step = self.steps;
        self.steps += 1;
        let vocabulary = self.limits.vocabulary_size;
        let fault = self.fault.filter(|&(at, _)| at == step).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Error) => return Err(StepError::new("the device is gone")),
            Some(Fault::Panic) => panic!("the runner is broken"),
            Some(Fault::WrongShape) => {
                return Ok(Logits { rows: 1, vocabulary: 3, values: vec![0.0; 3] }.into());
            }
            Some(Fault::NotANumber) | None => {}
        }
        let block_size = self.limits.block_size;
        let (mut values, mut hidden_states) = (Vec::new(), Vec::new());
        for rows in &batch.sequences {
            let place = |position: usize| {
                rows.block_table[position / block_size] as usize * block_size + position % block_size
            };
            for row in rows.first_row..rows.first_row + rows.rows {
                let position = batch.positions[row] as usize;
                self.cache[place(position)] = batch.token_ids[row];
                let history = || -> Vec<u32> { (0..=position).map(|at| self.cache[place(at)]).collect() };
                if batch.hidden_rows.contains(&row) {
                    hidden_states.extend(scripted_logits(&history(), HIDDEN_SIZE));
                }
                if batch.logit_rows.contains(&row) {
                    let history = history();
                    values.extend(scripted_logits(&history, vocabulary));
                }
            }
        }
        if fault == Some(Fault::NotANumber) {
            values[..vocabulary].fill(f32::NAN);
        }
        let logits = Logits { rows: batch.logit_rows.len(), vocabulary, values };
        Ok(StepValues { logits, hidden_states })
    }
}
