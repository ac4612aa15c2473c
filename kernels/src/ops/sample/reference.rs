//! The definition in `f64`, by sorting.

use std::cmp::Ordering;

use super::{Choice, NoToken};

/// A token that may be drawn, and the uniform numbers that draw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// The token.
    pub token_id: u32,
    /// The first number.
    pub from: f64,
    /// The first number that draws another token.
    pub to: f64,
}

/// The values of a row: its logits with masks, bias and penalties.
pub fn values(logits: &[f32], choice: &Choice) -> Vec<f64> {
    let mut values: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    for change in &choice.adjustments {
        let value = &mut values[change.token_id as usize];
        *value += f64::from(change.bias);
        let penalty = f64::from(change.penalty);
        *value = if *value > 0.0 { *value / penalty } else { *value * penalty };
        *value -= f64::from(change.subtrahend);
    }
    if let Some(allowed) = &choice.allowed {
        for (token, value) in values.iter_mut().enumerate() {
            if allowed[token / 32] >> (token % 32) & 1 == 0 {
                *value = f64::NEG_INFINITY;
            }
        }
    }
    values
}

/// The tokens that may be drawn, in the order of their ids; at temperature 0 the one.
///
/// # Errors
/// When there is none.
pub fn intervals(logits: &[f32], choice: &Choice) -> Result<Vec<Interval>, NoToken> {
    let values = values(logits, choice);
    if values.iter().any(|value| value.is_nan() || *value == f64::INFINITY) {
        return Err(NoToken::NotFinite);
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| more_likely_first(values[a], values[b]).then(a.cmp(&b)));
    let largest = values[order[0]];
    if largest == f64::NEG_INFINITY {
        return Err(NoToken::NothingLeft);
    }
    if choice.temperature == 0.0 {
        return Ok(vec![Interval { token_id: order[0] as u32, from: 0.0, to: 1.0 }]);
    }
    let weight = |token: usize| ((values[token] - largest) / f64::from(choice.temperature)).exp();
    order.retain(|&token| weight(token) >= f64::from(choice.min_p));
    order.truncate(choice.top_k.unwrap_or(usize::MAX));
    let target = f64::from(choice.top_p) * order.iter().map(|&token| weight(token)).sum::<f64>();
    let mut reached = 0.0;
    if choice.top_p < 1.0 {
        let kept = order.iter().take_while(|&&token| {
            let is_needed = reached < target;
            reached += weight(token);
            is_needed
        });
        let count = kept.count();
        order.truncate(count.max(1));
    }
    order.sort_unstable();
    let sum: f64 = order.iter().map(|&token| weight(token)).sum();
    let mut from = 0.0;
    let interval = |token: usize| {
        let interval = Interval { token_id: token as u32, from, to: from + weight(token) / sum };
        from = interval.to;
        interval
    };
    Ok(order.into_iter().map(interval).collect())
}

/// The order of two values, neither of which is NaN: a zero of either sign is one value.
pub(super) fn more_likely_first<T: PartialOrd>(a: T, b: T) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

/// The log probability of each token.
pub fn logprobs(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, &logit| largest.max(f64::from(logit)));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}
