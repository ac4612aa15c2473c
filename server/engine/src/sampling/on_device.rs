//! Rows for a device that samples itself: what [`super::sampler`] does to a row, as the changes of its logits.

use std::collections::BTreeMap;

use nibble_kernels::ops::sample::{self, Adjustment, Choice, MOST_TOP, NoToken, Sampled, Wanted};

use super::sampler::{LogitRow, NextToken, SamplingError, SamplingRow, end};
use super::{TokenLogprob, TokenLogprobs, random};
use crate::constraint::TokenMask;
use crate::runner::{DeviceSampler, StepError};

/// Changes no logit.
const UNCHANGED: Adjustment = Adjustment { token_id: 0, bias: 0.0, penalty: 1.0, subtrahend: 0.0 };

/// Whether a device can do what is wanted of a row that asks for the log probabilities of `top` tokens.
pub(crate) fn is_possible(top: Option<usize>) -> bool {
    top.is_none_or(|top| top <= MOST_TOP)
}

/// The token that follows each row, in the order of the rows; their logits, on the device, have `vocabulary` values.
///
/// # Errors
/// When the device failed.
pub(crate) fn sample(
    sampler: &mut dyn DeviceSampler,
    rows: &[LogitRow<'_>],
    vocabulary: usize,
) -> Result<Vec<Result<NextToken, SamplingError>>, StepError> {
    let requests: Vec<_> = rows.iter().map(|row| request(row, vocabulary)).collect();
    // Rows that failed already are sampled as well, so that all stay in their places.
    let any_token = || sample::Row { wanted: Wanted::Known(0), logprobs: None };
    let wanted: Vec<_> =
        requests.iter().map(|row| row.as_ref().map_or_else(|_| any_token(), Clone::clone)).collect();
    let sampled = sampler.sample(&wanted)?;
    if sampled.len() != rows.len() {
        let message = format!("the device sampled {} rows, expected {}", sampled.len(), rows.len());
        return Err(StepError::new(message));
    }
    let outcomes = requests.into_iter().zip(sampled);
    Ok(outcomes.map(|(request, sampled)| request.and_then(|_| next_token(sampled))).collect())
}

fn next_token(sampled: Result<Sampled, NoToken>) -> Result<NextToken, SamplingError> {
    let Sampled { token_id, logprobs } = sampled.map_err(|none| match none {
        NoToken::NotFinite => SamplingError::NotFinite,
        NoToken::NothingLeft => SamplingError::NothingLeft,
    })?;
    let logprobs = logprobs.map(|found| {
        let top = found.top.into_iter().map(|(token_id, logprob)| TokenLogprob { token_id, logprob });
        TokenLogprobs { logprob: found.logprob, rank: found.rank, top: top.collect() }
    });
    Ok(NextToken { token_id, logprobs })
}

/// What a row asks of the device.
pub(super) fn request(row: &LogitRow<'_>, vocabulary: usize) -> Result<sample::Row, SamplingError> {
    match *row {
        LogitRow::Score { token_id, top, .. } => {
            Ok(sample::Row { wanted: Wanted::Known(token_id), logprobs: Some(top) })
        }
        LogitRow::Sample(ref row) => {
            let allowed = row.allowed.map(Result::as_ref).transpose();
            let allowed = allowed.map_err(|error| SamplingError::Constraint(error.clone()))?;
            let parameters = row.parameters;
            let (tokens, changes) = (allowed_tokens(row, allowed, vocabulary), adjustments(row, allowed));
            if let Some(end) = allowed.and_then(|allowed| end(row, allowed))
                && !leaves_any(tokens.as_deref().unwrap_or_default(), &changes, vocabulary)
            {
                return Ok(sample::Row { wanted: Wanted::Known(end), logprobs: parameters.logprobs });
            }
            Ok(sample::Row {
                wanted: Wanted::Choice(Choice {
                    temperature: parameters.temperature,
                    top_k: parameters.top_k,
                    top_p: parameters.top_p,
                    min_p: parameters.min_p,
                    uniform: random::uniform(row.seed, row.completion.len() as u64),
                    adjustments: changes,
                    allowed: tokens,
                }),
                logprobs: parameters.logprobs,
            })
        }
    }
}

/// The tokens that allowed_token_ids and the constraint leave, if there is either.
fn allowed_tokens(
    row: &SamplingRow<'_>,
    constraint: Option<&TokenMask>,
    vocabulary: usize,
) -> Option<Vec<u32>> {
    let words = vocabulary.div_ceil(u32::BITS as usize);
    let listed = row.parameters.allowed_token_ids.as_ref().map(|tokens| {
        let mut mask = TokenMask::default();
        tokens.iter().for_each(|&token| mask.allow(token));
        mask
    });
    let of = |mask: &TokenMask, word: usize| mask.words().get(word).copied().unwrap_or(0);
    match (listed, constraint) {
        (None, None) => None,
        (Some(mask), None) => Some((0..words).map(|word| of(&mask, word)).collect()),
        (None, Some(mask)) => Some((0..words).map(|word| of(mask, word)).collect()),
        (Some(listed), Some(mask)) => {
            Some((0..words).map(|word| of(&listed, word) & of(mask, word)).collect())
        }
    }
}

/// Whether a token below `vocabulary` of the mask `words` has a logit that `changes` leave finite.
fn leaves_any(words: &[u32], changes: &[Adjustment], vocabulary: usize) -> bool {
    let forbidden = changes.iter().filter(|change| change.bias == f32::NEG_INFINITY);
    let beyond = vocabulary as u32..words.len() as u32 * u32::BITS;
    let forbidden: Vec<u32> = forbidden.map(|change| change.token_id).chain(beyond).collect();
    TokenMask::from_words(words.to_vec()).allows_others_than(&forbidden)
}

/// The logits that bad words, bias, penalties and `min_tokens` change.
fn adjustments(row: &SamplingRow<'_>, allowed: Option<&TokenMask>) -> Vec<Adjustment> {
    let parameters = row.parameters;
    let mut changes = BTreeMap::new();
    let mut change = |token_id: u32, make: &dyn Fn(&mut Adjustment)| {
        make(changes.entry(token_id).or_insert(Adjustment { token_id, ..UNCHANGED }));
    };
    let forbid = |change: &mut Adjustment| change.bias = f32::NEG_INFINITY;
    for word in &parameters.bad_words {
        if let Some((&last, before)) = word.split_last()
            && row.completion.ends_with(before)
        {
            change(last, &forbid);
        }
    }
    for &(token, bias) in &parameters.logit_bias {
        change(token, &|change| change.bias += bias);
    }
    let repeats = parameters.repetition_penalty != 1.0;
    if repeats || parameters.frequency_penalty != 0.0 || parameters.presence_penalty != 0.0 {
        let mut occurrences = BTreeMap::<u32, u32>::new();
        for &token in row.completion {
            *occurrences.entry(token).or_default() += 1;
        }
        // Only the repetition penalty looks at the prompt.
        for &token in if repeats { row.prompt } else { &[] } {
            occurrences.entry(token).or_default();
        }
        for (&token, &occurrences) in &occurrences {
            change(token, &|change| {
                change.penalty = parameters.repetition_penalty;
                if occurrences > 0 {
                    change.subtrahend =
                        parameters.frequency_penalty * occurrences as f32 + parameters.presence_penalty;
                }
            });
        }
    }
    if row.completion.len() < parameters.min_tokens
        && !row.stop_tokens.is_empty()
        && allowed.is_none_or(|allowed| allowed.allows_others_than(row.stop_tokens))
    {
        for &token in row.stop_tokens {
            change(token, &forbid);
        }
    }
    changes.into_values().collect()
}
