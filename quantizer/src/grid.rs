//! The grid of a group: the scale and the zero point its weights are rounded to.
//!
//! ```text
//! code(w)     = clamp(round(w / scale) + zero, 0, 2^bits - 1)      ties to even
//! value(code) = (code - zero) * scale
//! ```
//!
//! A scale is rounded to F16 before any code is chosen: what is measured is what is stored. A zero point is at
//! least 1, because version 1 of the GPTQ format cannot express 0; a symmetric one is `2^(bits-1)`.
//!
//! The search of [`RangeSearch::MeanSquare`] shrinks the range step by step, tries the zero points around the
//! one the range implies (symmetric: both signs of the scale, because the grid reaches one step further below
//! zero than above), and then alternates between the best scale for the codes and the codes for that scale.

use half::f16;

use crate::settings::RangeSearch;

/// Adding and subtracting it rounds a small `f32` to an integer, ties to even, four at a time on any processor.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23
/// The smallest range tried, as a fraction of the whole, and the steps to it.
const SMALLEST_RANGE: f32 = 0.5;
const RANGE_STEPS: usize = 32;
/// Rounds of "best scale for the codes, codes for the scale".
const REFINEMENTS: usize = 4;

/// What all groups of a matrix have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    bits: u32,
    symmetric: bool,
    range: RangeSearch,
}

/// The grid of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Affine {
    /// Finite, not 0, exactly an F16.
    pub(crate) scale: f32,
    /// From 1 to the largest code.
    pub(crate) zero: u8,
    inverse: f32,
    largest: f32,
}

impl Affine {
    /// A grid that stands where none was fitted yet.
    pub(crate) const UNIT: Self = Self { scale: 1.0, zero: 1, inverse: 1.0, largest: 1.0 };

    fn new(scale: f32, zero: f32, largest: f32) -> Self {
        let scale = storable(scale);
        Self { scale, zero: zero as u8, inverse: 1.0 / scale, largest }
    }

    /// The weight's code, as a number.
    #[inline]
    fn level(&self, weight: f32) -> f32 {
        let zero = f32::from(self.zero);
        let steps = (weight * self.inverse).clamp(-zero, self.largest - zero);
        (steps + ROUNDER) - ROUNDER + zero
    }

    /// The code nearest to `weight`.
    #[inline]
    pub(crate) fn code(&self, weight: f32) -> u8 {
        self.level(weight) as u8
    }

    /// The weight a code stands for.
    #[inline]
    pub(crate) fn value(&self, code: u8) -> f32 {
        (f32::from(code) - f32::from(self.zero)) * self.scale
    }
}

/// The F16 nearest to `scale` that is neither 0 nor infinite.
fn storable(scale: f32) -> f32 {
    let rounded = f16::from_f32(scale);
    let rounded = if rounded.is_infinite() { f16::MAX.copysign(rounded) } else { rounded };
    if rounded == f16::ZERO { f16::MIN_POSITIVE_SUBNORMAL.to_f32().copysign(scale) } else { rounded.to_f32() }
}

/// Sum over a group of importance times squared rounding error.
fn squared_error(affine: &Affine, weights: &[f32], importance: &[f32]) -> f32 {
    let zero = f32::from(affine.zero);
    let mut lanes = [0.0f32; 8];
    let mut add = |lane: usize, weight: f32, importance: f32| {
        let error = weight - (affine.level(weight) - zero) * affine.scale;
        lanes[lane] += importance * error * error;
    };
    let (weight_chunks, importance_chunks) = (weights.chunks_exact(8), importance.chunks_exact(8));
    let tails = weight_chunks.remainder().iter().zip(importance_chunks.remainder());
    for (weights, importance) in weight_chunks.zip(importance_chunks) {
        for lane in 0..8 {
            add(lane, weights[lane], importance[lane]);
        }
    }
    for (&weight, &importance) in tails {
        add(0, weight, importance);
    }
    lanes.iter().sum()
}

/// The scale of least weighted squared error for the codes `affine` gives.
fn best_scale(affine: &Affine, weights: &[f32], importance: &[f32]) -> Option<f32> {
    let zero = f32::from(affine.zero);
    let (mut products, mut squares) = (0.0f64, 0.0f64);
    for (&weight, &importance) in weights.iter().zip(importance) {
        let steps = f64::from(affine.level(weight) - zero);
        products += f64::from(importance) * steps * f64::from(weight);
        squares += f64::from(importance) * steps * steps;
    }
    let scale = (products / squares) as f32;
    (squares > 0.0 && scale.is_finite() && scale != 0.0).then_some(scale)
}

impl Grid {
    pub(crate) fn new(bits: u32, symmetric: bool, range: RangeSearch) -> Self {
        Self { bits, symmetric, range }
    }

    /// The grid for a group of finite `weights`; `importance` says how much an error of each counts.
    pub(crate) fn fit(&self, weights: &[f32], importance: &[f32]) -> Affine {
        let low = weights.iter().copied().fold(0.0f32, f32::min);
        let high = weights.iter().copied().fold(0.0f32, f32::max);
        if low == high {
            return Affine::new(1.0, self.middle(), self.largest());
        }
        let whole = self.covering(low, high);
        match self.range {
            RangeSearch::MinMax => whole,
            RangeSearch::MeanSquare => self.search(whole, low, high, weights, importance),
        }
    }

    fn largest(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    fn middle(&self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }

    /// The smallest range that clips nothing (symmetric: up to half a step at the top).
    fn covering(&self, low: f32, high: f32) -> Affine {
        let largest = self.largest();
        if self.symmetric {
            return Affine::new(2.0 * high.max(-low) / largest, self.middle(), largest);
        }
        let scale = (high - low) / largest;
        let zero = (-low / scale).round().max(1.0);
        // The zero point is rounded: the longer side decides the scale, so that neither is clipped.
        let above = if zero < largest { high / (largest - zero) } else { 0.0 };
        let scale = scale.max(above).max(-low / zero);
        Affine::new(scale, zero, largest)
    }

    fn search(&self, whole: Affine, low: f32, high: f32, weights: &[f32], importance: &[f32]) -> Affine {
        let largest = self.largest();
        let (mut best, mut least) = (whole, squared_error(&whole, weights, importance));
        let mut consider = |candidate: Affine| {
            let error = squared_error(&candidate, weights, importance);
            if error < least {
                (best, least) = (candidate, error);
            }
            error
        };
        for step in 0..=RANGE_STEPS {
            let part = 1.0 - (1.0 - SMALLEST_RANGE) * step as f32 / RANGE_STEPS as f32;
            if self.symmetric {
                let scale = 2.0 * part * high.max(-low) / largest;
                consider(Affine::new(scale, self.middle(), largest));
                consider(Affine::new(-scale, self.middle(), largest));
            } else {
                let scale = part * (high - low) / largest;
                let zero = -low * part / scale;
                for zero in [zero.floor(), zero.ceil()] {
                    consider(Affine::new(scale, zero.clamp(1.0, largest), largest));
                }
            }
        }
        for _ in 0..REFINEMENTS {
            let Some(scale) = best_scale(&best, weights, importance) else { break };
            let refined = Affine::new(scale, f32::from(best.zero), largest);
            let error = squared_error(&refined, weights, importance);
            if error >= least {
                break;
            }
            (best, least) = (refined, error);
        }
        best
    }
}
