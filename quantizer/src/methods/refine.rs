//! Refinement: lowers the output error of codes and scales that GPTQ has chosen, one at a time.
//!
//! GPTQ never comes back to an input. Here every code, and the scale of every group, is set again to its best
//! value while all others stay, several times over. With `d = w - wq` and `g = d H` for one output row:
//!
//! ```text
//! code i:   wq[i] moves to the grid value nearest to wq[i] + g[i] / H[i, i]
//! scale s:  c = code - zero of the group;   s += (g . c) / (c H c), rounded to F16
//! ```
//!
//! A move of `wq` by `m` takes `m H` from `g` and changes the error by `m H m - 2 g . m`; only moves that lower
//! it are made, so the error never rises. `H` carries the damping that GPTQ used. Blocks of inputs are whole
//! groups, about 128 wide: inside a block each row is worked on alone, then one matrix product brings `g` up
//! to date.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::Weights;
use crate::grid::Affine;
use crate::hessian::Hessian;

/// Inputs of a block, about.
const BLOCK: usize = 128;

/// What codes and scales are to come near to.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) weights: Weights<'a>,
    pub(crate) group_size: usize,
    pub(crate) hessian: &'a Hessian,
    /// Fraction of the Hessian's mean diagonal that is added to its diagonal.
    pub(crate) damping: f64,
}

/// Improves `codes` `[out_features, in_features]` and `grids` `[out_features, groups]` in `sweeps` sweeps.
pub(crate) fn refine(target: Target<'_>, sweeps: usize, codes: &mut [u8], grids: &mut [Affine], par: Par) {
    let Target { weights, group_size, hessian, damping } = target;
    let (outputs, inputs) = (weights.out_features, weights.in_features);
    let groups = inputs.div_ceil(group_size);
    let added = (damping * hessian.mean_diagonal()) as f32;
    let mut gradient = gradient(target, added, codes, grids, par);
    let width = (BLOCK / group_size).max(1) * group_size;
    let mut moves = vec![0.0f32; outputs * width];
    for _ in 0..sweeps {
        for first in (0..inputs).step_by(width) {
            let end = inputs.min(first + width);
            let local = hessian.block(first, end, added);
            let of_block = first / group_size..end.div_ceil(group_size);
            let rows = gradient.par_chunks_exact(inputs).zip(codes.par_chunks_exact_mut(inputs));
            let rows = rows.zip(grids.par_chunks_exact_mut(groups)).zip(moves.par_chunks_exact_mut(width));
            rows.for_each(|(((gradient, codes), grids), moves)| {
                let mut row = Row {
                    gradient: gradient[first..end].to_vec(),
                    codes: &mut codes[first..end],
                    moves: &mut moves[..end - first],
                    hessian: &local,
                };
                row.moves.fill(0.0);
                for (group, grid) in grids[of_block.clone()].iter_mut().enumerate() {
                    let inputs = group * group_size..(end - first).min((group + 1) * group_size);
                    for input in inputs.clone() {
                        row.choose_code(input, grid);
                    }
                    row.choose_scale(inputs, grid);
                }
            });
            let made = MatRef::from_row_major_slice(&moves, outputs, width).subcols(0, end - first);
            let all = MatMut::from_row_major_slice_mut(&mut gradient, outputs, inputs);
            matmul(all, Accum::Add, made, hessian.rows(first, end), -1.0, par);
            for (gradient, moves) in gradient.chunks_exact_mut(inputs).zip(moves.chunks_exact(width)) {
                for (gradient, made) in gradient[first..end].iter_mut().zip(moves) {
                    *gradient -= added * made;
                }
            }
        }
    }
}

/// `(W - Wq) (H + added * I)`, row-major.
fn gradient(target: Target<'_>, added: f32, codes: &[u8], grids: &[Affine], par: Par) -> Vec<f32> {
    let Target { weights, group_size, hessian, .. } = target;
    let (outputs, inputs) = (weights.out_features, weights.in_features);
    let groups = inputs.div_ceil(group_size);
    let mut difference = weights.values.to_vec();
    let rows = difference.par_chunks_exact_mut(inputs).zip(codes.par_chunks_exact(inputs));
    rows.zip(grids.par_chunks_exact(groups)).for_each(|((difference, codes), grids)| {
        for (input, (difference, &code)) in difference.iter_mut().zip(codes).enumerate() {
            *difference -= grids[input / group_size].value(code);
        }
    });
    let mut gradient: Vec<f32> = difference.iter().map(|difference| added * difference).collect();
    matmul(
        MatMut::from_row_major_slice_mut(&mut gradient, outputs, inputs),
        Accum::Add,
        MatRef::from_row_major_slice(&difference, outputs, inputs),
        hessian.rows(0, inputs),
        1.0,
        par,
    );
    gradient
}

/// One output row inside a block.
struct Row<'a> {
    /// `g` of the block's inputs, up to date with `moves`.
    gradient: Vec<f32>,
    codes: &'a mut [u8],
    /// How far each `wq` of the block has moved.
    moves: &'a mut [f32],
    /// The block of the damped Hessian, row-major.
    hessian: &'a [f32],
}

impl Row<'_> {
    fn choose_code(&mut self, input: usize, grid: &Affine) {
        let width = self.gradient.len();
        let curvature = self.hessian[input * width + input];
        let now = grid.value(self.codes[input]);
        let code = grid.code(now + self.gradient[input] / curvature);
        let step = grid.value(code) - now;
        if step * (step * curvature - 2.0 * self.gradient[input]) < 0.0 {
            self.codes[input] = code;
            self.moves[input] += step;
            for (gradient, hessian) in self.gradient.iter_mut().zip(&self.hessian[input * width..][..width]) {
                *gradient -= step * hessian;
            }
        }
    }

    fn choose_scale(&mut self, inputs: std::ops::Range<usize>, grid: &mut Affine) {
        let width = self.gradient.len();
        let steps: Vec<f32> =
            self.codes[inputs.clone()].iter().map(|&code| f32::from(code) - f32::from(grid.zero)).collect();
        let mut change = vec![0.0f32; width];
        for (input, &steps) in inputs.clone().zip(&steps) {
            for (change, hessian) in change.iter_mut().zip(&self.hessian[input * width..][..width]) {
                *change += steps * hessian;
            }
        }
        let with_steps = |values: &[f32]| -> f32 {
            values[inputs.clone()].iter().zip(&steps).map(|(value, steps)| value * steps).sum()
        };
        let (slope, curvature) = (with_steps(&self.gradient), with_steps(&change));
        let rescaled = grid.rescaled(grid.scale + slope / curvature);
        let step = rescaled.scale - grid.scale;
        if step * (step * curvature - 2.0 * slope) < 0.0 {
            *grid = rescaled;
            for (input, steps) in inputs.zip(steps) {
                self.moves[input] += step * steps;
            }
            for (gradient, change) in self.gradient.iter_mut().zip(change) {
                *gradient -= step * change;
            }
        }
    }
}
