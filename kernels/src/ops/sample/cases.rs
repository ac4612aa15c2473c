//! What every device that samples must show: the tokens and log probabilities of the reference.

use super::reference::{Interval, intervals, logprobs, more_likely_first};
use super::{Adjustment, Args, Choice, NoToken, Row, Sampled, Wanted};
use crate::backend::Device;
use crate::check::{Checker, random};
use crate::error::KernelError;

const NAME: &str = "sample";
/// How far a uniform number may be from the border of a token's interval and draw the token beside it.
const NEAR: f64 = 1e-4;

/// A choice among all tokens at temperature 1.
const PLAIN: Choice = Choice {
    temperature: 1.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.5,
    adjustments: Vec::new(),
    allowed: None,
};

/// Rows of all kinds over a vocabulary.
pub fn rows(vocabulary: usize) -> Vec<Row> {
    let changed = |count: usize, bias: f32| -> Vec<Adjustment> {
        let change = |index: usize| Adjustment {
            token_id: (index * vocabulary / count) as u32,
            bias: if index % 5 == 4 { f32::NEG_INFINITY } else { bias },
            penalty: 1.0 + index as f32 / count as f32,
            subtrahend: if index.is_multiple_of(2) { 0.5 } else { 0.0 },
        };
        (0..count).map(change).collect()
    };
    // All logits are below zero then, where a penalty below one raises them.
    let raised = |vocabulary: usize| -> Vec<Adjustment> {
        let penalty = |token: usize| if token == vocabulary / 2 { 0.01 } else { 1.0 };
        let change = |token: usize| Adjustment {
            token_id: token as u32,
            bias: -20.0,
            penalty: penalty(token),
            subtrahend: 0.0,
        };
        (0..vocabulary).map(change).collect()
    };
    let some = |step: usize| -> Option<Vec<u32>> {
        let mut words = vec![0u32; vocabulary.div_ceil(32)];
        (0..vocabulary).step_by(step).for_each(|token| words[token / 32] |= 1 << (token % 32));
        Some(words)
    };
    let choices = [
        Choice { temperature: 0.0, ..PLAIN },
        Choice { temperature: 0.0, adjustments: changed(vocabulary / 3, 0.25), ..PLAIN },
        Choice { temperature: 0.0, allowed: some(7), ..PLAIN },
        PLAIN,
        Choice { uniform: 0.0, ..PLAIN },
        Choice { uniform: 1.0 - 1e-12, ..PLAIN },
        Choice { temperature: 0.3, uniform: 0.71, ..PLAIN },
        Choice { temperature: 1e-12, uniform: 0.99, ..PLAIN },
        Choice { top_k: Some(1), uniform: 0.9, ..PLAIN },
        Choice { top_k: Some(40), uniform: 0.93, ..PLAIN },
        Choice { top_k: Some(vocabulary), uniform: 0.2, ..PLAIN },
        Choice { top_p: 0.001, uniform: 0.9, ..PLAIN },
        Choice { top_p: 0.83, uniform: 0.97, ..PLAIN },
        Choice { min_p: 0.1, uniform: 0.6, ..PLAIN },
        Choice { min_p: 1.0, uniform: 0.6, ..PLAIN },
        Choice { top_k: Some(100), top_p: 0.7, min_p: 0.02, temperature: 1.7, uniform: 0.95, ..PLAIN },
        Choice { adjustments: changed(1, 12.0), ..PLAIN },
        Choice { temperature: 0.0, adjustments: raised(vocabulary), ..PLAIN },
        Choice { adjustments: changed(vocabulary / 3, 0.5), allowed: some(3), uniform: 0.4, ..PLAIN },
        Choice { adjustments: changed(vocabulary, 0.5), top_k: Some(9), uniform: 0.8, ..PLAIN },
        Choice { allowed: Some(vec![0; vocabulary.div_ceil(32)]), ..PLAIN },
    ];
    let logprobs = [None, Some(0), Some(5), Some(32)];
    let choices = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| Row { wanted: Wanted::Choice(choice), logprobs: logprobs[index % 4] });
    let known = [0, vocabulary as u32 / 2, vocabulary as u32 - 1];
    let known = known.into_iter().map(|token| Row { wanted: Wanted::Known(token), logprobs: Some(3) });
    choices.chain(known).collect()
}

/// Says what is wrong with what was found of a row.
pub fn problem(logits: &[f32], row: &Row, found: &Result<Sampled, NoToken>) -> Option<String> {
    let expected = match &row.wanted {
        Wanted::Known(token) => Ok(vec![Interval { token_id: *token, from: 0.0, to: 1.0 }]),
        Wanted::Choice(choice) => intervals(logits, choice),
    };
    let uniform = if let Wanted::Choice(choice) = &row.wanted { choice.uniform } else { 0.5 };
    let (intervals, found) = match (expected, found) {
        (Ok(intervals), Ok(found)) => (intervals, found),
        (Err(expected), Err(found)) if expected == *found => return None,
        (expected, found) => return Some(format!("{found:?} instead of {:?}", expected.map(|_| "a token"))),
    };
    let of_found = intervals.iter().find(|interval| interval.token_id == found.token_id);
    if !of_found.is_some_and(|interval| (interval.from - NEAR..interval.to + NEAR).contains(&uniform)) {
        let drawn = intervals.iter().find(|interval| uniform < interval.to);
        return Some(format!("token {} at {of_found:?} instead of {drawn:?} for {uniform}", found.token_id));
    }
    match (&found.logprobs, row.logprobs) {
        (None, None) => None,
        (Some(found_logprobs), Some(top)) => {
            let expected = logprobs(logits);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| more_likely_first(logits[a], logits[b]).then(a.cmp(&b)));
            let is_close = |token: usize, logprob: f32| (f64::from(logprob) - expected[token]).abs() < 1e-4;
            let token = found.token_id as usize;
            let sound = is_close(token, found_logprobs.logprob)
                && order[found_logprobs.rank - 1] == token
                && found_logprobs.top.iter().map(|top| top.0 as usize).eq(order[..top].iter().copied())
                && found_logprobs.top.iter().all(|&(token, logprob)| is_close(token as usize, logprob));
            (!sound).then(|| format!("{found_logprobs:?}, expected {} first", order[0]))
        }
        (found, expected) => Some(format!("{found:?} for {expected:?} log probabilities")),
    }
}

pub(crate) fn check<D: Device>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    let Some(sampler) = checker.device.sampler() else { return Ok(()) };
    for vocabulary in [1000, 1003, 49_152, 128_256] {
        let rows = rows(vocabulary);
        let (logits, values) = checker.input(
            &random(rows.len() * vocabulary, 3).iter().map(|value| 12.0 * value.powi(3)).collect::<Vec<_>>(),
        )?;
        let found = sampler.sample(Args { logits: &logits, vocabulary, rows: &rows })?;
        for (index, ((row, found), logits)) in
            rows.iter().zip(&found).zip(values.chunks_exact(vocabulary)).enumerate()
        {
            let problem = problem(logits, row, found);
            let case = problem.as_ref().map_or_else(String::new, |problem| format!(": {problem}"));
            checker.verdict(NAME, format!("row {index} of {vocabulary}{case}"), problem.is_none());
        }
    }
    Ok(())
}
