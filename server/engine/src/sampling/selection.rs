//! The most likely tokens of a row, without sorting it.
//!
//! Tokens are in order of their value, larger first, and of their id, lower first, among equals. A
//! [`Cut`] is the last token of the shortest prefix of that order whose weights reach a target. It is found
//! by adding weights up in buckets of values; only the bucket in which the target is reached is sorted.

use std::cmp::Ordering;

/// Buckets over the distance from the maximum: 1/64 wide up to 32, and the rest in the last one.
const BUCKETS: usize = 2048;
const BUCKETS_PER_UNIT: f32 = 64.0;

/// Memory of [`cut`].
#[derive(Default)]
pub(crate) struct Buckets {
    weights: Vec<f64>,
    candidates: Vec<Cut>,
}

/// A token and its value; as a cut, the last one that is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cut {
    pub(crate) value: f32,
    pub(crate) token: usize,
}

impl Cut {
    /// Whether a token is kept: it is the last one or before it.
    pub(crate) fn keeps(self, value: f32, token: usize) -> bool {
        value > self.value || (value == self.value && token <= self.token)
    }

    /// The order of tokens. Values are never NaN.
    pub(crate) fn more_likely_first(&self, other: &Self) -> Ordering {
        let by_value = other.value.partial_cmp(&self.value).unwrap_or(Ordering::Equal);
        by_value.then(self.token.cmp(&other.token))
    }
}

/// The shortest prefix of tokens whose weights, each `weight(token)` and at least 0, add up to `target`, at
/// least one token; `None` if it takes all of them. `maximum` is the largest of `values`, none of which is
/// NaN.
pub(crate) fn cut(
    values: &[f32],
    maximum: f32,
    target: f64,
    buckets: &mut Buckets,
    weight: impl Fn(usize) -> f64,
) -> Option<Cut> {
    let Buckets { weights, candidates } = buckets;
    weights.clear();
    weights.resize(BUCKETS, 0.0);
    for (token, &value) in values.iter().enumerate() {
        weights[bucket(value, maximum)] += weight(token);
    }
    let mut missing = target;
    let crossing = weights.iter().position(|&weight| {
        let reached = weight > 0.0 && weight >= missing;
        if !reached {
            missing -= weight;
        }
        reached
    })?;
    candidates.clear();
    candidates.extend(
        values
            .iter()
            .enumerate()
            .filter(|&(_, &value)| bucket(value, maximum) == crossing)
            .map(|(token, &value)| Cut { value, token }),
    );
    candidates.sort_unstable_by(Cut::more_likely_first);
    let last = candidates.iter().find(|candidate| {
        missing -= weight(candidate.token);
        missing <= 0.0
    });
    // Rounding may leave a little missing where the whole bucket is meant.
    last.or(candidates.last()).copied()
}

/// Does not fall where `value` falls.
fn bucket(value: f32, maximum: f32) -> usize {
    // A cast from a number too large, infinity included, gives the largest integer.
    (((maximum - value) * BUCKETS_PER_UNIT) as usize).min(BUCKETS - 1)
}
