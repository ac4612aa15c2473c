//! The distribution over the tokens of one row of logits, and its most likely part, without sorting the row.
//!
//! A token's *weight* is `exp((value - maximum) / temperature)`, from 0 to 1. Tokens are in order of their
//! value, larger first, and of their id, lower first, among equals. What a filter keeps is always a prefix of
//! this order, named by its last token, the *cut*. Cuts are found with the largest value of each chunk of the
//! row, so that only chunks that reach a threshold are looked at again.

use std::cmp::Ordering;

use super::exponential::exp_of_negative;

/// Values in a chunk.
const CHUNK: usize = 256;

/// Reductions run over this many lanes, for the compiler to vectorize; it also fixes their order.
const LANES: usize = 16;

/// How far below the maximum, in units of the temperature, the tokens of a top-p set are looked for: at a
/// distance of 4 they have a weight of 0.018. A peaked distribution has few near the top; if these are not
/// enough the next distance is tried, and in the end all.
const DISTANCES: [f32; 4] = [2.0, 4.0, 8.0, f32::INFINITY];

/// A token and its value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) value: f32,
    pub(crate) token: u32,
}

impl Candidate {
    /// The order of tokens. Values are never NaN.
    pub(crate) fn more_likely_first(&self, other: &Self) -> Ordering {
        let by_value = other.value.partial_cmp(&self.value).unwrap_or(Ordering::Equal);
        by_value.then(self.token.cmp(&other.token))
    }

    /// Whether this is the cut or before it.
    fn is_kept_by(&self, cut: Self) -> bool {
        self.value > cut.value || (self.value == cut.value && self.token <= cut.token)
    }
}

/// Memory for one distribution after the other.
#[derive(Default)]
pub(crate) struct Workspace {
    maxima: Vec<f32>,
    sorted_maxima: Vec<f32>,
    sums: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// A row of values, none of which is NaN and the largest of which is finite.
pub(crate) struct Distribution<'a> {
    values: &'a [f32],
    temperature: f32,
    maximum: f32,
    /// The largest value of each chunk.
    maxima: &'a [f32],
    sorted_maxima: &'a mut Vec<f32>,
    /// The weights of the kept tokens of each chunk, added up.
    sums: &'a mut Vec<f64>,
    candidates: &'a mut Vec<Candidate>,
}

impl<'a> Distribution<'a> {
    /// The distribution of `values`; `None` if there is a NaN among them or the largest is infinite.
    pub(crate) fn new(values: &'a [f32], temperature: f32, workspace: &'a mut Workspace) -> Option<Self> {
        let Workspace { maxima, sorted_maxima, sums, candidates } = workspace;
        let maximum = chunk_maxima(values, maxima)?;
        Some(Self { values, temperature, maximum, maxima, sorted_maxima, sums, candidates })
    }

    /// The most likely token.
    pub(crate) fn most_likely_token(&self) -> usize {
        let is_maximum = |value: &f32| *value == self.maximum;
        let chunk = self.maxima.iter().position(is_maximum).unwrap_or_default();
        let within = self.chunk(chunk).iter().position(is_maximum);
        chunk * CHUNK + within.expect("the maximum of a chunk is one of its values")
    }

    /// Natural logarithm of the sum of the exponentials of the values, at temperature 1.
    pub(crate) fn log_normalizer(&mut self) -> f64 {
        f64::from(self.maximum) + self.kept_weight(None).ln()
    }

    /// Place of `token` in the order of tokens, from 1.
    pub(crate) fn rank(&self, token: usize) -> usize {
        let value = self.values[token];
        let larger = self.values.iter().filter(|&&other| other > value).count();
        let equal_before = self.values[..token].iter().filter(|&&other| other == value).count();
        1 + larger + equal_before
    }

    /// The `count` most likely tokens, most likely first.
    pub(crate) fn most_likely(&mut self, count: usize) -> &[Candidate] {
        self.collect_most_likely(count);
        self.candidates.sort_unstable_by(Candidate::more_likely_first);
        self.candidates
    }

    /// The cut of tokens whose weight is at least `min_p`, above 0: a value, no matter whose.
    pub(crate) fn min_p_cut(&self, min_p: f32) -> Candidate {
        let value = f64::from(self.maximum) + f64::from(self.temperature) * f64::from(min_p).ln();
        Candidate { value: (value as f32).min(self.maximum), token: u32::MAX }
    }

    /// The cut of the `top_k` most likely tokens; all if there are no more.
    pub(crate) fn top_k_cut(&mut self, top_k: usize) -> Option<Candidate> {
        if top_k >= self.values.len() {
            return None;
        }
        self.collect_most_likely(top_k);
        self.candidates.iter().copied().max_by(Candidate::more_likely_first)
    }

    /// The cut of the shortest prefix that has at least the part `top_p` of the weight that `cut` keeps.
    pub(crate) fn top_p_cut(&mut self, top_p: f32, cut: Option<Candidate>) -> Option<Candidate> {
        let target = f64::from(top_p) * self.kept_weight(cut);
        let (maximum, temperature) = (self.maximum, self.temperature);
        let weight = |candidate: &Candidate| weight_of(candidate.value, maximum, temperature);
        for distance in DISTANCES {
            self.collect_from(maximum - distance * temperature);
            if let Some(cut) = cut {
                self.candidates.retain(|candidate| candidate.is_kept_by(cut));
            }
            let reached: f64 = self.candidates.iter().map(weight).sum();
            if reached >= target {
                return last_of_shortest_prefix(self.candidates, target, weight);
            }
        }
        // Rounding left a little missing where everything that is kept is meant.
        cut
    }

    /// The token at which the weights of kept tokens, added up in the order of ids, exceed `uniform`, in
    /// `[0, 1)`, times their sum.
    pub(crate) fn draw(&mut self, uniform: f64, cut: Option<Candidate>) -> usize {
        let mut missing = uniform * self.kept_weight(cut);
        let mut last_likely = self.most_likely_token();
        for (chunk, &sum) in self.sums.iter().enumerate() {
            if sum <= missing {
                missing -= sum;
                continue;
            }
            for candidate in self.kept(chunk, cut) {
                let weight = weight_of(candidate.value, self.maximum, self.temperature);
                if weight > 0.0 {
                    last_likely = candidate.token as usize;
                    missing -= weight;
                    if missing < 0.0 {
                        return last_likely;
                    }
                }
            }
        }
        // Rounding used everything up.
        last_likely
    }

    fn chunk(&self, chunk: usize) -> &'a [f32] {
        let start = chunk * CHUNK;
        &self.values[start..self.values.len().min(start + CHUNK)]
    }

    /// The tokens of a chunk.
    fn tokens(&self, chunk: usize) -> impl Iterator<Item = Candidate> + use<'a> {
        let first = (chunk * CHUNK) as u32;
        (first..).zip(self.chunk(chunk)).map(|(token, &value)| Candidate { value, token })
    }

    /// The tokens of a chunk that `cut` keeps.
    fn kept(&self, chunk: usize, cut: Option<Candidate>) -> impl Iterator<Item = Candidate> + use<'a> {
        self.tokens(chunk).filter(move |candidate| cut.is_none_or(|cut| candidate.is_kept_by(cut)))
    }

    /// The weight of all tokens that `cut` keeps; leaves the sum of each chunk in `sums`.
    fn kept_weight(&mut self, cut: Option<Candidate>) -> f64 {
        let mut sums = std::mem::take(self.sums);
        sums.clear();
        sums.extend(self.maxima.iter().enumerate().map(|(chunk, &largest)| match cut {
            None => sum_of_weights(self.chunk(chunk), self.maximum, self.temperature),
            Some(cut) if largest < cut.value => 0.0,
            cut @ Some(_) => {
                let kept = self.kept(chunk, cut);
                kept.map(|candidate| weight_of(candidate.value, self.maximum, self.temperature)).sum()
            }
        }));
        *self.sums = sums;
        self.sums.iter().sum()
    }

    /// Collects every token whose value is at least `threshold`.
    fn collect_from(&mut self, threshold: f32) {
        let mut candidates = std::mem::take(self.candidates);
        candidates.clear();
        for (chunk, &largest) in self.maxima.iter().enumerate() {
            if largest >= threshold {
                candidates.extend(self.tokens(chunk).filter(|candidate| candidate.value >= threshold));
            }
        }
        *self.candidates = candidates;
    }

    /// Collects the `count` most likely tokens, in no particular order.
    fn collect_most_likely(&mut self, count: usize) {
        if count == 0 {
            self.candidates.clear();
            return;
        }
        // If `count` chunks have a value of at least this, `count` tokens do.
        let mut threshold = f32::NEG_INFINITY;
        if count <= self.maxima.len() {
            self.sorted_maxima.clear();
            self.sorted_maxima.extend_from_slice(self.maxima);
            let larger_first = |a: &f32, b: &f32| b.total_cmp(a);
            threshold = *self.sorted_maxima.select_nth_unstable_by(count - 1, larger_first).1;
        }
        self.collect_from(threshold);
        if count < self.candidates.len() {
            self.candidates.select_nth_unstable_by(count, Candidate::more_likely_first);
            self.candidates.truncate(count);
        }
    }
}

#[inline]
fn weight_of(value: f32, maximum: f32, temperature: f32) -> f64 {
    f64::from(exp_of_negative((value - maximum) / temperature))
}

/// Writes the largest value of each chunk to `maxima` and returns the largest of all; `None` if it is
/// infinite or if there is a NaN.
fn chunk_maxima(values: &[f32], maxima: &mut Vec<f32>) -> Option<f32> {
    maxima.clear();
    let mut has_nan = [false; LANES];
    maxima.extend(values.chunks(CHUNK).map(|chunk| {
        let mut largest = [f32::NEG_INFINITY; LANES];
        let (groups, rest) = chunk.as_chunks::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                let value = group[lane];
                largest[lane] = if value > largest[lane] { value } else { largest[lane] };
                has_nan[lane] |= value.is_nan();
            }
        }
        has_nan[0] |= rest.iter().any(|value| value.is_nan());
        largest.iter().chain(rest).fold(f32::NEG_INFINITY, |largest, &value| largest.max(value))
    }));
    let maximum = maxima.iter().fold(f32::NEG_INFINITY, |maximum, &value| maximum.max(value));
    (maximum.is_finite() && !has_nan.contains(&true)).then_some(maximum)
}

fn sum_of_weights(values: &[f32], maximum: f32, temperature: f32) -> f64 {
    let mut sums = [0.0f64; LANES];
    let (groups, rest) = values.as_chunks::<LANES>();
    for group in groups {
        // Two loops: that over single precision is vectorized only when it is alone.
        let mut weights = [0.0f32; LANES];
        for lane in 0..LANES {
            weights[lane] = exp_of_negative((group[lane] - maximum) / temperature);
        }
        for lane in 0..LANES {
            sums[lane] += f64::from(weights[lane]);
        }
    }
    let rest = rest.iter().map(|&value| weight_of(value, maximum, temperature));
    sums.into_iter().chain(rest).sum()
}

/// The last token of the shortest prefix whose weights reach `target`, of candidates that together do: by
/// bisection, so in time proportional to their number.
fn last_of_shortest_prefix(
    candidates: &mut [Candidate],
    target: f64,
    weight: impl Fn(&Candidate) -> f64,
) -> Option<Candidate> {
    let (mut from, mut to, mut reached) = (0, candidates.len(), 0.0);
    while to - from > 1 {
        let middle = (to - from) / 2;
        let part = &mut candidates[from..to];
        part.select_nth_unstable_by(middle, Candidate::more_likely_first);
        let with_half = reached + part[..middle].iter().map(&weight).sum::<f64>();
        if with_half >= target {
            to = from + middle;
        } else {
            reached = with_half;
            from += middle;
        }
    }
    candidates.get(from).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maximum_is_found_in_every_place_and_nonsense_is_refused() {
        let mut workspace = Workspace::default();
        for length in [1, 15, 16, 17, CHUNK, CHUNK + 1, 2 * CHUNK + 20] {
            for place in 0..length {
                let mut values = vec![-2.5; length];
                values[place] = 7.0;
                let distribution = Distribution::new(&values, 1.0, &mut workspace).expect("numbers");
                assert_eq!(distribution.most_likely_token(), place);
                values[place] = f32::NEG_INFINITY;
                assert_eq!(Distribution::new(&values, 1.0, &mut workspace).is_some(), length > 1);
                for nonsense in [f32::NAN, f32::INFINITY] {
                    values[place] = nonsense;
                    assert!(Distribution::new(&values, 1.0, &mut workspace).is_none());
                }
            }
        }
        assert!(Distribution::new(&[], 1.0, &mut workspace).is_none());
    }
}
