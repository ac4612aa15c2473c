//! Requests and engines that several test files start.

use nibble_engine::{
    ConstraintError, Engine, EngineConfig, EngineHandle, Pooling, Request, SamplingParameters, StepRunner,
    TokenConstraint, TokenMask,
};

use super::{ScriptedRunner, mix};

pub(crate) const VOCABULARY: usize = 40;
pub(crate) const EOS: &[u32] = &[3];

pub(crate) fn start(runner: impl StepRunner + 'static, config: EngineConfig) -> (Engine, EngineHandle) {
    let engine = Engine::start(Box::new(runner), config).expect("a valid configuration");
    let handle = engine.handle();
    (engine, handle)
}

pub(crate) fn runner(blocks: usize) -> ScriptedRunner {
    ScriptedRunner::new(blocks, 4, VOCABULARY, EOS)
}

pub(crate) fn prompt(length: usize, seed: u64) -> Vec<u32> {
    (0..length as u64).map(|at| (mix(seed, at) % VOCABULARY as u64) as u32).collect()
}

/// Allows even tokens and odd tokens in turns, and an end of sequence after an even number of tokens.
#[derive(Clone, Default)]
pub(crate) struct Alternating {
    seen: Vec<u32>,
}

impl TokenConstraint for Alternating {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        assert!(completion.starts_with(&self.seen), "a completion grows at its end only");
        self.seen = completion.to_vec();
        let odd = completion.len() % 2 == 1;
        let is_allowed = |token: u32| if EOS.contains(&token) { !odd } else { (token % 2 == 1) == odd };
        let word = (0..u32::BITS).filter(|&token| is_allowed(token)).map(|token| 1 << token).sum();
        Ok(TokenMask::from_words(vec![word]))
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

/// A request with everything that sampling offers, chosen by `seed`.
pub(crate) fn sampled(seed: u64) -> Request {
    let pick = |at: u64, of: u64| mix(seed, 1000 + at) % of;
    let sampling = SamplingParameters {
        max_tokens: 1 + pick(0, 30) as usize,
        min_tokens: pick(1, 5) as usize,
        temperature: [0.0, 0.7, 1.3][pick(2, 3) as usize],
        top_p: [1.0, 0.9][pick(3, 2) as usize],
        top_k: [None, Some(10)][pick(4, 2) as usize],
        min_p: [0.0, 0.05][pick(5, 2) as usize],
        repetition_penalty: [1.0, 1.2][pick(6, 2) as usize],
        frequency_penalty: [0.0, 0.3][pick(7, 2) as usize],
        presence_penalty: [0.0, -0.2][pick(8, 2) as usize],
        logit_bias: vec![(pick(9, 40) as u32, 1.5)],
        seed: Some(seed),
        allowed_token_ids: [None, None, Some((0..36).collect())][pick(16, 3) as usize].clone(),
        bad_words: [vec![], vec![vec![4], vec![pick(18, 40) as u32, 6]]][pick(17, 2) as usize].clone(),
        stop_token_ids: vec![pick(10, 40) as u32],
        ignore_eos: pick(11, 2) == 0,
        logprobs: [None, Some(3)][pick(12, 2) as usize],
        prompt_logprobs: [None, None, Some(2)][pick(15, 3) as usize],
    };
    let constraint: Option<Box<dyn TokenConstraint>> = match pick(14, 3) {
        0 => Some(Box::new(Alternating::default())),
        _ => None,
    };
    let prompt = prompt(1 + pick(13, 40) as usize, seed);
    match pick(19, 10) {
        0 => Request::embedding(prompt, Pooling::Mean),
        1 => Request::embedding(prompt, Pooling::Last),
        _ => Request { constraint, ..Request::new(prompt, sampling) },
    }
}
