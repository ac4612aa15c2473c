//! Correction: weights that make up for the errors of the layers before.
//!
//! The inputs of a layer are those of the quantized model, `x`; its outputs should be those of the original model,
//! whose inputs are `x'`. Before the weights are rounded they move to those of least squared error:
//!
//! ```text
//! W' = W + G (H + damping)^-1           H = sum x x^T, damped as for GPTQ
//! G  = W sum (x' - x) x^T               query, key, value, gate, up
//! G  = sum (r' - (r + W x)) x^T         attention output, down: r, r' are the residual streams before and
//!                                       after the layer's output is added, of the quantized and the original
//! ```
//!
//! With the second form the outputs that are added to the residual stream take away what went wrong anywhere
//! before, as far as `x` tells.
//!
//! Source: the first form is the asymmetric calibration of Li et al., "GPTAQ: Efficient Finetuning-Free
//! Quantization for Asymmetric Calibration", <https://arxiv.org/abs/2504.02692>, solved before the rounding instead of
//! within it; the second goes further.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::gptq::InverseFactor;

/// How far the quantized model has drifted from the original at an input of linear layers.
pub(crate) enum Drift {
    /// `sum (x' - x) x^T`, `[inputs, inputs]`.
    OfInputs(Mat<f32>),
    /// `G` itself, `[outputs, inputs]`.
    OfOutputs(Mat<f32>),
}

/// Moves `weights`, row-major `[outputs, inputs]`, to the ones that correct `drift`.
pub(crate) fn correct(weights: &mut [f32], drift: &Drift, factor: &InverseFactor, par: Par) {
    let inputs = factor.inputs();
    let outputs = weights.len() / inputs.max(1);
    let mut step = vec![0.0f32; weights.len()];
    let view = MatMut::from_row_major_slice_mut(&mut step, outputs, inputs);
    match drift {
        Drift::OfInputs(drift) => {
            let weights = MatRef::from_row_major_slice(weights, outputs, inputs);
            matmul(view, Accum::Replace, weights, drift.as_ref(), 1.0, par);
        }
        Drift::OfOutputs(gradient) => {
            let mut view = view;
            view.copy_from(gradient);
        }
    }
    factor.solve(&mut step, par);
    for (weight, step) in weights.iter_mut().zip(step) {
        *weight += step;
    }
}
