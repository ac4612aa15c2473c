//! One token from one row of logits: a pure function of the row, the request and its history.
//!
//! The order is vLLM's: logit_bias; repetition, frequency and presence penalty; end-of-sequence and stop
//! tokens masked before `min_tokens`; then at temperature 0 the largest logit, else division by the
//! temperature, min_p, top_k, top_p (of what these left, renormalized), and a draw by the inverse of the
//! cumulative distribution in the order of token ids.

use super::exponential::{finite_maximum, sum, weights};
use super::selection::{Buckets, Cut, cut};
use super::{SamplingParameters, TokenLogprob, TokenLogprobs, random};
use crate::sequence::Sequence;

/// What the token of one row depends on.
#[derive(Clone, Copy)]
pub(crate) struct SamplingRow<'a> {
    /// The model's logits, one for each token of the vocabulary.
    pub(crate) logits: &'a [f32],
    pub(crate) parameters: &'a SamplingParameters,
    pub(crate) seed: u64,
    pub(crate) prompt: &'a [u32],
    pub(crate) completion: &'a [u32],
    /// Tokens that end the sequence.
    pub(crate) stop_tokens: &'a [u32],
}

impl<'a> SamplingRow<'a> {
    /// The row of a sequence whose next token is to be sampled from `logits`.
    pub(crate) fn new(sequence: &'a Sequence, logits: &'a [f32]) -> Self {
        Self {
            logits,
            parameters: &sequence.sampling,
            seed: sequence.seed,
            prompt: sequence.prompt(),
            completion: sequence.completion(),
            stop_tokens: sequence.stop_tokens(),
        }
    }
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SampledToken {
    pub(crate) token_id: u32,
    /// If the request asked for them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// A row from which no token can be sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SamplingError {
    #[error(
        "the model's logits are not finite, expected numbers; the weights or the KV cache may be damaged"
    )]
    NotFinite,
    #[error(
        "logit_bias, penalties or min_tokens leave no finite logit to sample from, expected at least one token; \
         weaken them"
    )]
    NothingLeft,
}

/// Memory for sampling one row after the other.
#[derive(Default)]
pub(crate) struct Scratch {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    buckets: Buckets,
    /// Occurrences of each token in the completion, and [`IN_PROMPT`]; all zero between rows.
    occurrences: Vec<u32>,
    occurring: Vec<u32>,
}

/// Bit of [`Scratch::occurrences`] of tokens that occur in the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// Weights added at once while looking for the drawn token.
const DRAW_CHUNK: usize = 1024;

impl Scratch {
    /// Samples the next token of `row`.
    pub(crate) fn sample(&mut self, row: &SamplingRow<'_>) -> Result<SampledToken, SamplingError> {
        let model_maximum = finite_maximum(row.logits).ok_or(SamplingError::NotFinite)?;
        let token = if self.adjust(row) {
            let adjusted = std::mem::take(&mut self.adjusted);
            let maximum = finite_maximum(&adjusted).ok_or(SamplingError::NothingLeft);
            let token = maximum.map(|maximum| self.choose(row, &adjusted, maximum));
            self.adjusted = adjusted;
            token?
        } else {
            self.choose(row, row.logits, model_maximum)
        };
        let logprobs =
            row.parameters.logprobs.map(|top| self.logprobs(row.logits, model_maximum, token, top));
        Ok(SampledToken { token_id: token as u32, logprobs })
    }

    /// Writes the logits with bias, penalties and mask to `adjusted`; false if there are none.
    fn adjust(&mut self, row: &SamplingRow<'_>) -> bool {
        let parameters = row.parameters;
        let masks = row.completion.len() < parameters.min_tokens && !row.stop_tokens.is_empty();
        let repeats = parameters.repetition_penalty != 1.0;
        let counts = parameters.frequency_penalty != 0.0 || parameters.presence_penalty != 0.0;
        if !masks && !repeats && !counts && parameters.logit_bias.is_empty() {
            return false;
        }
        self.adjusted.clear();
        self.adjusted.extend_from_slice(row.logits);
        for &(token, bias) in &parameters.logit_bias {
            self.adjusted[token as usize] += bias;
        }
        if repeats || counts {
            self.penalize(row);
        }
        if masks {
            for &token in row.stop_tokens {
                self.adjusted[token as usize] = f32::NEG_INFINITY;
            }
        }
        true
    }

    fn penalize(&mut self, row: &SamplingRow<'_>) {
        let parameters = row.parameters;
        self.occurrences.resize(row.logits.len(), 0);
        for &token in row.completion {
            let occurrences = &mut self.occurrences[token as usize];
            if *occurrences == 0 {
                self.occurring.push(token);
            }
            *occurrences += 1;
        }
        // Only the repetition penalty looks at the prompt.
        let prompt = if parameters.repetition_penalty == 1.0 { &[] } else { row.prompt };
        for &token in prompt {
            let occurrences = &mut self.occurrences[token as usize];
            if *occurrences == 0 {
                self.occurring.push(token);
            }
            *occurrences |= IN_PROMPT;
        }
        for token in self.occurring.drain(..) {
            let logit = &mut self.adjusted[token as usize];
            let occurrences = std::mem::take(&mut self.occurrences[token as usize]) & !IN_PROMPT;
            let penalty = parameters.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            if occurrences > 0 {
                *logit -= parameters.frequency_penalty * occurrences as f32 + parameters.presence_penalty;
            }
        }
    }

    /// The token to take under the logits `values`, whose largest is `maximum`.
    fn choose(&mut self, row: &SamplingRow<'_>, values: &[f32], maximum: f32) -> usize {
        let parameters = row.parameters;
        if parameters.temperature == 0.0 {
            let first = values.iter().position(|&value| value == maximum);
            return first.expect("the maximum of a row is one of its values");
        }
        weights(values, maximum, parameters.temperature, &mut self.weights);
        self.filter(parameters, values, maximum);
        draw(&self.weights, random::uniform(row.seed, row.completion.len() as u64))
    }

    /// Sets the weights of tokens that min_p, top_k or top_p leave out to 0. Each keeps the most likely ones.
    fn filter(&mut self, parameters: &SamplingParameters, values: &[f32], maximum: f32) {
        let Self { weights, buckets, .. } = self;
        if parameters.min_p > 0.0 {
            // The most likely token has weight 1.
            weights.iter_mut().filter(|weight| **weight < parameters.min_p).for_each(|weight| *weight = 0.0);
        }
        let mut leave_out = |weights: &mut [f32], target: f64, count: bool| {
            let weight = |token: usize| if count { 1.0 } else { f64::from(weights[token]) };
            if let Some(cut) = cut(values, maximum, target, buckets, weight) {
                for (token, (weight, &value)) in weights.iter_mut().zip(values).enumerate() {
                    *weight = if cut.keeps(value, token) { *weight } else { 0.0 };
                }
            }
        };
        if let Some(top_k) = parameters.top_k.filter(|&top_k| top_k < values.len()) {
            leave_out(weights, top_k as f64, true);
        }
        if parameters.top_p < 1.0 {
            let target = f64::from(parameters.top_p) * sum(weights);
            leave_out(weights, target, false);
        }
    }

    fn logprobs(&mut self, logits: &[f32], maximum: f32, token: usize, top: usize) -> TokenLogprobs {
        weights(logits, maximum, 1.0, &mut self.weights);
        let normalizer = f64::from(maximum) + sum(&self.weights).ln();
        let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
        let mut most_likely = Vec::new();
        if top > 0 {
            let cut = cut(logits, maximum, top as f64, &mut self.buckets, |_| 1.0);
            let tokens = logits.iter().enumerate().map(|(token, &value)| Cut { value, token });
            most_likely
                .extend(tokens.filter(|token| cut.is_none_or(|cut| cut.keeps(token.value, token.token))));
            most_likely.sort_unstable_by(Cut::more_likely_first);
        }
        let top = most_likely.iter();
        let top = top.map(|top| TokenLogprob { token_id: top.token as u32, logprob: logprob(top.value) });
        TokenLogprobs { logprob: logprob(logits[token]), top: top.collect() }
    }
}

/// The token at which the cumulative weights, in the order of ids, exceed `uniform` times their sum. At least
/// one weight is positive.
fn draw(weights: &[f32], uniform: f64) -> usize {
    let chunk_sum = |chunk: &[f32]| sum(chunk);
    let mut missing = uniform * weights.chunks(DRAW_CHUNK).map(chunk_sum).sum::<f64>();
    let mut last_likely = 0;
    for (index, chunk) in weights.chunks(DRAW_CHUNK).enumerate() {
        let in_chunk = chunk_sum(chunk);
        if in_chunk <= missing {
            missing -= in_chunk;
            if in_chunk > 0.0 {
                last_likely = index;
            }
            continue;
        }
        return index * DRAW_CHUNK + draw_within(chunk, missing);
    }
    // Rounding used everything up: the last token that has a weight.
    let chunk = &weights[last_likely * DRAW_CHUNK..];
    last_likely * DRAW_CHUNK + draw_within(&chunk[..chunk.len().min(DRAW_CHUNK)], f64::INFINITY)
}

/// The first token at which the cumulative weights exceed `missing`, or the last one that has a weight.
fn draw_within(weights: &[f32], mut missing: f64) -> usize {
    let mut last_likely = 0;
    for (token, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            last_likely = token;
            missing -= f64::from(weight);
            if missing < 0.0 {
                break;
            }
        }
    }
    last_likely
}
