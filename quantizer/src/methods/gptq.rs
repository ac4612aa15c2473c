//! GPTQ: inputs are quantized one after the other, and the inputs still to come make up for each rounding error.
//!
//! ```text
//! U^T U = (H + damping)^-1                                U upper triangular
//! for j in order:  e      = (w[j] - value(code(w[j]))) / U[j, j]
//!                  w[k]  -= e * U[j, k]                   for every k after j
//! ```
//!
//! for each output row of `w`, all rows alike. Columns are taken in blocks of 128: within a block each row is
//! updated on its own, then all later columns by one matrix product.
//!
//! In order of activation, the inputs with the largest `H[j, j]` come first, while there is most freedom left to
//! make up for their errors. Groups stay consecutive inputs of the original matrix, so their grids are fitted
//! before the first input, each error weighted by `1 / U[j, j]^2`, what it costs once all later inputs have
//! done what they can. In the inputs' own order a group's grid is fitted when its first input comes.
//!
//! An input that calibration never saw has only the damping in its row of `H`: it is rounded to nearest.
//!
//! Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
//! <https://arxiv.org/abs/2210.17323>.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::Weights;
use crate::grid::{Affine, Grid};
use crate::hessian::Hessian;

/// Columns between two matrix products.
const BLOCK: usize = 128;
/// How often damping is multiplied by [`DAMPING_FACTOR`] before a Hessian is given up.
const DAMPING_ATTEMPTS: u32 = 6;
const DAMPING_FACTOR: f64 = 10.0;

/// What GPTQ needs to know about the inputs of a linear layer; layers with the same input share it.
pub(crate) struct InverseFactor {
    /// `order[j]` is the input quantized as number `j`.
    order: Vec<usize>,
    in_own_order: bool,
    /// `U`, row-major, rows and columns in `order`.
    upper: Vec<f32>,
    /// The damping it took.
    pub(crate) damping: f64,
}

impl InverseFactor {
    /// Factors `hessian` with `damping`, or with more where that is not enough; its inputs in order of activation
    /// or in their own.
    ///
    /// # Errors
    /// The largest damping tried, when none was enough.
    pub(crate) fn new(
        hessian: &Hessian,
        mut damping: f64,
        activation_order: bool,
        par: Par,
    ) -> Result<Self, f64> {
        let mut order: Vec<usize> = (0..hessian.inputs()).collect();
        if activation_order {
            order.sort_by(|&a, &b| hessian.diagonal(b).total_cmp(&hessian.diagonal(a)));
        }
        for _ in 0..DAMPING_ATTEMPTS {
            if let Some(upper) = hessian.inverse_factor(&order, damping, par) {
                return Ok(Self { order, in_own_order: !activation_order, upper, damping });
            }
            damping *= DAMPING_FACTOR;
        }
        Err(damping / DAMPING_FACTOR)
    }

    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.order.len()
    }

    /// Multiplies each of `rows`, row-major `[any, inputs]`, inputs in their own order, by `(H + damping)^-1`.
    pub(crate) fn solve(&self, rows: &mut [f32], par: Par) {
        let inputs = self.inputs();
        let count = rows.len() / inputs.max(1);
        let mut ordered: Vec<f32> = rows
            .par_chunks_exact(inputs)
            .flat_map_iter(|row| self.order.iter().map(|&input| row[input]))
            .collect();
        let mut half = vec![0.0f32; rows.len()];
        let upper = MatRef::from_row_major_slice(&self.upper, inputs, inputs);
        let multiply = |from: &[f32], by: MatRef<'_, f32>, structure, to: &mut [f32]| {
            triangular::matmul(
                MatMut::from_row_major_slice_mut(to, count, inputs),
                BlockStructure::Rectangular,
                Accum::Replace,
                MatRef::from_row_major_slice(from, count, inputs),
                BlockStructure::Rectangular,
                by,
                structure,
                1.0,
                par,
            );
        };
        multiply(&ordered, upper.transpose(), BlockStructure::TriangularLower, &mut half);
        multiply(&half, upper, BlockStructure::TriangularUpper, &mut ordered);
        rows.par_chunks_exact_mut(inputs).zip(ordered.par_chunks_exact(inputs)).for_each(|(row, ordered)| {
            for (&input, &value) in self.order.iter().zip(ordered) {
                row[input] = value;
            }
        });
    }

    fn diagonal(&self, index: usize) -> f32 {
        self.upper[index * self.order.len() + index]
    }

    /// `1 / U[j, j]^2` of each input, in the inputs' own order.
    pub(crate) fn importance(&self) -> Vec<f32> {
        let mut importance = vec![0.0; self.order.len()];
        for (index, &input) in self.order.iter().enumerate() {
            importance[input] = self.diagonal(index).powi(-2);
        }
        importance
    }
}

/// Codes `[out_features, in_features]` and grids `[out_features, groups]`.
pub(crate) fn quantize(
    weights: Weights<'_>,
    grid: Grid,
    group_size: usize,
    factor: &InverseFactor,
    par: Par,
) -> (Vec<u8>, Vec<Affine>) {
    let (outputs, inputs) = (weights.out_features, weights.in_features);
    let groups = inputs.div_ceil(group_size);
    let importance = factor.importance();
    let fit = |weights: &[f32], group: usize| {
        let first = group * group_size;
        grid.fit(weights, &importance[first..first + weights.len()])
    };
    let mut grids: Vec<Affine> = if factor.in_own_order {
        vec![Affine::UNIT; outputs * groups]
    } else {
        let groups = weights.values.par_chunks_exact(inputs).flat_map_iter(|row| {
            row.chunks(group_size).enumerate().map(|(group, weights)| fit(weights, group))
        });
        groups.collect()
    };
    // Columns in the order of quantization.
    let mut rest: Vec<f32> = weights
        .values
        .par_chunks_exact(inputs)
        .flat_map_iter(|row| factor.order.iter().map(|&input| row[input]))
        .collect();
    let mut codes = vec![0u8; outputs * inputs];
    let mut errors = vec![0.0f32; outputs * BLOCK];
    let mut first = 0;
    while first < inputs {
        let end = block_end(first, inputs, group_size);
        let rows = rest.par_chunks_exact_mut(inputs).zip(codes.par_chunks_exact_mut(inputs));
        let rows = rows.zip(grids.par_chunks_exact_mut(groups)).zip(errors.par_chunks_exact_mut(BLOCK));
        rows.for_each(|(((row, codes), grids), errors)| {
            for index in first..end {
                let input = factor.order[index];
                let group = input / group_size;
                if factor.in_own_order && input.is_multiple_of(group_size) {
                    grids[group] = fit(&row[input..inputs.min(input + group_size)], group);
                }
                let weight = row[index];
                let code = grids[group].code(weight);
                codes[input] = code;
                let error = (weight - grids[group].value(code)) / factor.diagonal(index);
                errors[index - first] = error;
                let upper = &factor.upper[index * inputs..][index + 1..end];
                for (weight, upper) in row[index + 1..end].iter_mut().zip(upper) {
                    *weight -= error * upper;
                }
            }
        });
        if end < inputs {
            let rest = MatMut::from_row_major_slice_mut(&mut rest, outputs, inputs);
            let errors = MatRef::from_row_major_slice(&errors, outputs, BLOCK).subcols(0, end - first);
            let upper = MatRef::from_row_major_slice(&factor.upper, inputs, inputs);
            let upper = upper.submatrix(first, end, end - first, inputs - end);
            matmul(rest.subcols_mut(end, inputs - end), Accum::Add, errors, upper, -1.0, par);
        }
        first = end;
    }
    (codes, grids)
}

/// Where the block that begins at `first` ends: a group that begins inside a block also ends in it, or begins
/// with it, because its grid is fitted to weights that every column before has updated.
fn block_end(first: usize, inputs: usize, group_size: usize) -> usize {
    let end = if group_size <= BLOCK {
        first + BLOCK / group_size * group_size
    } else {
        (first + BLOCK).min((first / group_size + 1) * group_size)
    };
    end.min(inputs)
}
