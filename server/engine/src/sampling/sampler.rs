//! One token from one row of logits: a pure function of the row, the request and its history.
//!
//! The order is vLLM's: tokens masked that allowed_token_ids, the constraint or bad_words do not allow; logit_bias; repetition, frequency and
//! presence penalty; end-of-sequence and stop tokens masked before `min_tokens`, unless the constraint allows
//! nothing else; where nothing is left but the constraint lets the completion end, its end; then at temperature 0 the largest logit, else division by the
//! temperature, min_p, top_k, top_p (of what these left, renormalized), and a draw by the inverse of the
//! cumulative distribution in the order of token ids.

use super::distribution::{Candidate, Distribution, Workspace};
use super::{SamplingParameters, TokenLogprob, TokenLogprobs, random};
use crate::constraint::{ConstraintError, TokenMask};
use crate::request::{Blame, Failure};
use crate::sequence::Sequence;

/// A row of logits, and what is wanted of it.
#[derive(Clone, Copy)]
pub(crate) enum LogitRow<'a> {
    /// The next token.
    Sample(SamplingRow<'a>),
    /// Log probabilities of a token that is known, and of the `top` most likely ones.
    Score { logits: &'a [f32], token_id: u32, top: usize },
}

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
    /// The tokens that the request's constraint allows; all if it has none.
    pub(crate) allowed: Option<&'a Result<TokenMask, ConstraintError>>,
}

impl<'a> SamplingRow<'a> {
    /// The row of a sequence whose next token is to be sampled from `logits`, after the first `drafted` tokens of its
    /// draft.
    pub(crate) fn new(sequence: &'a Sequence, drafted: usize, logits: &'a [f32]) -> Self {
        Self {
            logits,
            parameters: &sequence.sampling,
            seed: sequence.seed,
            prompt: sequence.prompt(),
            completion: sequence.completion_with(drafted),
            stop_tokens: sequence.stop_tokens(),
            allowed: sequence.allowed(drafted),
        }
    }
}

impl From<SamplingError> for Failure {
    fn from(error: SamplingError) -> Self {
        let blame = match error {
            SamplingError::Constraint(_) | SamplingError::NothingLeft => Blame::Request,
            SamplingError::NotFinite => Blame::Engine,
        };
        Self { message: error.to_string(), blame }
    }
}

impl LogitRow<'_> {
    /// The model's logits, one for each token of the vocabulary.
    pub(crate) fn logits(&self) -> &[f32] {
        match self {
            Self::Sample(row) => row.logits,
            Self::Score { logits, .. } => logits,
        }
    }
}

/// The token that follows a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NextToken {
    pub(crate) token_id: u32,
    /// If the request asked for them.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// A row from which no token can be sampled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SamplingError {
    #[error(transparent)]
    Constraint(ConstraintError),
    #[error(
        "the model's logits are not finite, expected numbers; the weights or the KV cache may be damaged"
    )]
    NotFinite,
    #[error(
        "allowed_token_ids, bad_words, logit_bias, penalties, min_tokens and the structured output together leave no \
         token to sample, expected at least one; weaken them"
    )]
    NothingLeft,
}

/// Memory for sampling one row after the other.
#[derive(Default)]
pub(crate) struct Scratch {
    adjusted: Vec<f32>,
    workspace: Workspace,
    /// Occurrences of each token in the completion, and [`IN_PROMPT`]; all zero between rows.
    occurrences: Vec<u32>,
    occurring: Vec<u32>,
}

/// Bit of [`Scratch::occurrences`] of tokens that occur in the prompt.
const IN_PROMPT: u32 = 1 << 31;

impl Scratch {
    /// Does what is wanted of a row.
    pub(crate) fn run(&mut self, row: &LogitRow<'_>) -> Result<NextToken, SamplingError> {
        match *row {
            LogitRow::Sample(ref row) => self.sample(row),
            LogitRow::Score { logits, token_id, top } => {
                let logprobs = logprobs(logits, token_id as usize, top, &mut self.workspace)?;
                Ok(NextToken { token_id, logprobs: Some(logprobs) })
            }
        }
    }

    /// Samples the next token of `row`.
    pub(crate) fn sample(&mut self, row: &SamplingRow<'_>) -> Result<NextToken, SamplingError> {
        let allowed = row.allowed.map(Result::as_ref).transpose();
        let allowed = allowed.map_err(|error| SamplingError::Constraint(error.clone()))?;
        let adjusts = self.adjust(row, allowed);
        let Self { adjusted, workspace, .. } = self;
        let values = if adjusts { adjusted } else { row.logits };
        let distribution = Distribution::new(values, row.parameters.temperature, workspace);
        let token = match distribution.map(|distribution| choose(row, distribution)) {
            Some(token) => token,
            None if adjusts && Distribution::new(row.logits, 1.0, workspace).is_some() => {
                allowed.and_then(|allowed| end(row, allowed)).ok_or(SamplingError::NothingLeft)? as usize
            }
            None => return Err(SamplingError::NotFinite),
        };
        let logprobs = match row.parameters.logprobs {
            Some(top) => Some(logprobs(row.logits, token, top, workspace)?),
            None => None,
        };
        Ok(NextToken { token_id: token as u32, logprobs })
    }

    /// Writes the logits with masks, bias and penalties to `adjusted`; false if there are none.
    fn adjust(&mut self, row: &SamplingRow<'_>, allowed: Option<&TokenMask>) -> bool {
        let parameters = row.parameters;
        let masks = row.completion.len() < parameters.min_tokens
            && !row.stop_tokens.is_empty()
            && allowed.is_none_or(|allowed| allowed.allows_others_than(row.stop_tokens));
        let repeats = parameters.repetition_penalty != 1.0;
        let counts = parameters.frequency_penalty != 0.0 || parameters.presence_penalty != 0.0;
        let bans = !parameters.bad_words.is_empty();
        let biases = !parameters.logit_bias.is_empty();
        let allowed_tokens = parameters.allowed_token_ids.as_ref();
        if allowed.is_none() && allowed_tokens.is_none() && !(masks || repeats || counts || bans || biases) {
            return false;
        }
        self.adjusted.clear();
        if let Some(allowed_tokens) = allowed_tokens {
            self.adjusted.resize(row.logits.len(), f32::NEG_INFINITY);
            for &token in allowed_tokens {
                self.adjusted[token as usize] = row.logits[token as usize];
            }
        } else {
            self.adjusted.extend_from_slice(row.logits);
        }
        for word in &parameters.bad_words {
            if let Some((&last, before)) = word.split_last()
                && row.completion.ends_with(before)
            {
                self.adjusted[last as usize] = f32::NEG_INFINITY;
            }
        }
        if let Some(allowed) = allowed {
            allowed.apply(&mut self.adjusted);
        }
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
}

/// The first end-of-sequence token of a completion that `allowed` lets end, when nothing else may follow.
pub(super) fn end(row: &SamplingRow<'_>, allowed: &TokenMask) -> Option<u32> {
    let mut ends = row.stop_tokens.iter().copied();
    ends.find(|&token| allowed.allows(token) && !row.parameters.stop_token_ids.contains(&token))
}

/// The token to take from a distribution.
fn choose(row: &SamplingRow<'_>, mut distribution: Distribution<'_>) -> usize {
    let parameters = row.parameters;
    if parameters.temperature == 0.0 {
        return distribution.most_likely_token();
    }
    let min_p = (parameters.min_p > 0.0).then(|| distribution.min_p_cut(parameters.min_p));
    let top_k = parameters.top_k.and_then(|top_k| distribution.top_k_cut(top_k));
    // Both keep a prefix of the same order: together they keep the shorter one.
    let mut cut = min_p.into_iter().chain(top_k).min_by(Candidate::more_likely_first);
    if parameters.top_p < 1.0 {
        cut = distribution.top_p_cut(parameters.top_p, cut);
    }
    distribution.draw(random::uniform(row.seed, row.completion.len() as u64), cut)
}

/// The log probabilities of `token` and of the `top` most likely tokens under the model's own distribution.
fn logprobs(
    logits: &[f32],
    token: usize,
    top: usize,
    workspace: &mut Workspace,
) -> Result<TokenLogprobs, SamplingError> {
    let mut distribution = Distribution::new(logits, 1.0, workspace).ok_or(SamplingError::NotFinite)?;
    let normalizer = distribution.log_normalizer();
    let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
    let rank = distribution.rank(token);
    let top = distribution.most_likely(top).iter();
    let top = top.map(|top| TokenLogprob { token_id: top.token, logprob: logprob(top.value) }).collect();
    Ok(TokenLogprobs { logprob: logprob(logits[token]), rank, top })
}
