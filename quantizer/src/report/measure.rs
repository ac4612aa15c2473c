//! The error of one quantized matrix, and which inputs carry it.
//!
//! ```text
//! D = Wq - W                     [outputs, inputs]
//! H = sum over tokens of x x^T   [inputs, inputs], the identity where there is no calibration data
//! error = sum over outputs of d H d^T / sum over outputs of w H w^T
//! share of input i = sum over outputs of d[i] (H d^T)[i] / sum over outputs of d H d^T
//! ```

use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::self_test::Checksum;

use super::{InputShare, MatrixReport};
use crate::hessian::Hessian;
use crate::threads::Threads;

/// Output rows that an error is measured on, evenly spaced: all of a small matrix; of the largest matrices of a 70B
/// model the products with the Hessian would take longer than the quantization.
const MEASURED_ROWS: usize = 1024;
/// Inputs that are named.
const NAMED_INPUTS: usize = 5;

/// Measures `matrix` against the `weights` it stands for, row-major `[outputs, inputs]`.
pub(crate) fn measure(
    name: &str,
    matrix: &QuantizedMatrix,
    weights: &[f32],
    hessian: Option<&Hessian>,
    threads: &Threads,
) -> MatrixReport {
    let (inputs, outputs) = (matrix.in_features(), matrix.out_features());
    let energies = |rows: &[f32]| match hessian {
        Some(hessian) => threads.run(|par| hessian.energy_by_input(rows, par)),
        None => squares_by_input(rows, inputs),
    };
    let measured = outputs.min(MEASURED_ROWS);
    let sample = |values: &[f32]| -> Vec<f32> {
        let rows = (0..measured).map(|index| index * outputs / measured);
        rows.flat_map(|row| &values[row * inputs..(row + 1) * inputs]).copied().collect()
    };
    let (sampled, mut difference) = (sample(weights), sample(&matrix.dequantize()));
    for (difference, weight) in difference.iter_mut().zip(&sampled) {
        *difference -= weight;
    }
    let errors = energies(&difference);
    let (error, whole): (f64, f64) = (errors.iter().sum(), energies(&sampled).iter().sum());
    let activations: Vec<f64> = hessian.map_or_else(Vec::new, |hessian| {
        (0..hessian.inputs()).map(|input| f64::from(hessian.diagonal(input))).collect()
    });
    MatrixReport {
        name: name.to_owned(),
        bits: matrix.bits(),
        group_size: matrix.group_size(),
        weights: weights.len(),
        bits_per_weight: matrix.bits_per_weight(),
        relative_error: if whole > 0.0 { error / whole } else { 0.0 },
        largest_error_inputs: largest(&errors),
        largest_activation_inputs: largest(&activations),
        checksum: Checksum::of(matrix),
    }
}

fn squares_by_input(rows: &[f32], inputs: usize) -> Vec<f64> {
    let mut squares = vec![0.0; inputs];
    for row in rows.chunks_exact(inputs.max(1)) {
        for (square, &value) in squares.iter_mut().zip(row) {
            *square += f64::from(value).powi(2);
        }
    }
    squares
}

/// The inputs of largest energy, largest first; none where there is no energy.
fn largest(energies: &[f64]) -> Vec<InputShare> {
    let whole: f64 = energies.iter().sum();
    if whole.is_nan() || whole <= 0.0 {
        return Vec::new();
    }
    let mut shares: Vec<InputShare> = energies
        .iter()
        .enumerate()
        .map(|(input, energy)| InputShare { input, share: energy / whole })
        .collect();
    shares.sort_by(|a, b| b.share.total_cmp(&a.share));
    shares.truncate(NAMED_INPUTS);
    shares
}
