//! AWQ: inputs with large activations get finer steps.
//!
//! An input of a linear layer is divided by `s`, in the operation before, and the weights that multiply it are
//! multiplied by `s`: nothing changes until they are rounded, and then the error of input `i` is `1 / s[i]` of what
//! it was, as long as its group's range does not grow. Of all candidates
//!
//! ```text
//! s[i] = x[i]^a / w[i]^b        x[i]: root mean square of the input's activations
//!                               w[i]: mean over outputs of |W[n, i]| / (largest |W[n, .]| of its group)
//! ```
//!
//! with `b` either 0 or `1 - a`, those of least squared output error after rounding are taken; it is measured on a
//! sample of the output rows with the whole Hessian.
//!
//! Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
//! <https://arxiv.org/abs/2306.00978>; the weight term is that of the authors' AutoAWQ.

use faer::Par;

use super::{Weights, rtn};
use crate::grid::Grid;
use crate::hessian::Hessian;

/// Exponents tried, from 0 to 1.
const STEPS: usize = 20;
/// Output rows of each matrix that candidates are measured on.
const SAMPLED_ROWS: usize = 128;
/// The range of a scale before all are brought to a common middle.
const SMALLEST_SCALE: f32 = 1e-4;

/// An input and the matrices that multiply it.
pub(crate) struct SharedInput<'a> {
    /// The matrices, of equal width.
    pub(crate) matrices: &'a [Weights<'a>],
    pub(crate) hessian: &'a Hessian,
    /// For each input which scale it has: several inputs share one where the operation before computes them from
    /// the same channel.
    pub(crate) scale_of_input: &'a [usize],
    /// Number of scales.
    pub(crate) scales: usize,
    pub(crate) group_size: usize,
    pub(crate) grid: Grid,
}

/// The scales of least error, all 1 where none lower it.
pub(crate) fn search(shared: &SharedInput<'_>, par: Par) -> Vec<f32> {
    let rows = sample(shared.matrices);
    let inputs = shared.scale_of_input.len();
    let sampled = Weights { out_features: rows.len() / inputs.max(1), in_features: inputs, values: &rows };
    let activations = activation_sizes(shared);
    let weights = weight_sizes(shared);
    let mut best = vec![1.0; shared.scales];
    let mut least = error(shared, sampled, &best, par);
    for step in 1..=STEPS {
        let activation_power = step as f32 / STEPS as f32;
        for weight_power in [0.0, 1.0 - activation_power] {
            let candidate = scales(&activations, &weights, activation_power, weight_power);
            let error = error(shared, sampled, &candidate, par);
            if error < least {
                (best, least) = (candidate, error);
            }
        }
    }
    best
}

/// Output rows from every matrix, evenly spaced.
fn sample(matrices: &[Weights<'_>]) -> Vec<f32> {
    let rows_of = |matrix: &Weights<'_>| -> Vec<f32> {
        let count = matrix.out_features.min(SAMPLED_ROWS);
        let row = |index: usize| index * matrix.out_features / count;
        let inputs = matrix.in_features;
        (0..count).flat_map(|index| &matrix.values[row(index) * inputs..][..inputs]).copied().collect()
    };
    matrices.iter().flat_map(rows_of).collect()
}

/// Root of the mean square of each scale's activations, up to a common factor.
fn activation_sizes(shared: &SharedInput<'_>) -> Vec<f32> {
    let mut sums = vec![0.0f32; shared.scales];
    for (input, &scale) in shared.scale_of_input.iter().enumerate() {
        sums[scale] += shared.hessian.diagonal(input);
    }
    sums.into_iter().map(f32::sqrt).collect()
}

/// How large the weights of each scale are within their groups, in the mean.
fn weight_sizes(shared: &SharedInput<'_>) -> Vec<f32> {
    let mut sums = vec![0.0f32; shared.scales];
    for matrix in shared.matrices {
        for row in matrix.values.chunks_exact(matrix.in_features) {
            let groups = row.chunks(shared.group_size).zip(shared.scale_of_input.chunks(shared.group_size));
            for (group, scale_of_input) in groups {
                let largest = group.iter().fold(0.0f32, |largest, weight| largest.max(weight.abs()));
                if largest > 0.0 {
                    for (weight, &scale) in group.iter().zip(scale_of_input) {
                        sums[scale] += weight.abs() / largest;
                    }
                }
            }
        }
    }
    let outputs: usize = shared.matrices.iter().map(|matrix| matrix.out_features).sum();
    let inputs_of_scale = shared.scale_of_input.len() / shared.scales.max(1);
    sums.into_iter().map(|sum| sum / (outputs * inputs_of_scale).max(1) as f32).collect()
}

/// Candidates, brought to where the smallest and the largest have the geometric mean 1.
fn scales(activations: &[f32], weights: &[f32], activation_power: f32, weight_power: f32) -> Vec<f32> {
    let scale = |(activation, weight): (&f32, &f32)| {
        let scale = activation.powf(activation_power) / (weight + SMALLEST_SCALE).powf(weight_power);
        if scale.is_finite() { scale.max(SMALLEST_SCALE) } else { 1.0 }
    };
    let mut scales: Vec<f32> = activations.iter().zip(weights).map(scale).collect();
    // Inputs that are always 0, such as padding, would move the middle away from all others.
    let seen = || scales.iter().zip(activations).filter(|&(_, &size)| size > 0.0).map(|(&scale, _)| scale);
    let (smallest, largest) = (seen().fold(f32::INFINITY, f32::min), seen().fold(0.0, f32::max));
    let middle = (smallest * largest).sqrt();
    if middle > 0.0 && middle.is_finite() {
        scales.iter_mut().for_each(|scale| *scale /= middle);
    }
    scales
}

/// The squared output error of rounding `rows` with these scales.
fn error(shared: &SharedInput<'_>, rows: Weights<'_>, scales: &[f32], par: Par) -> f64 {
    let inputs = rows.in_features;
    let scale = |index: usize| scales[shared.scale_of_input[index % inputs]];
    let scaled: Vec<f32> =
        rows.values.iter().enumerate().map(|(index, weight)| weight * scale(index)).collect();
    let scaled = Weights { values: &scaled, ..rows };
    let (codes, grids) = rtn::quantize(scaled, shared.grid, shared.group_size, &vec![1.0; inputs]);
    let groups = inputs.div_ceil(shared.group_size);
    let difference: Vec<f32> = codes
        .iter()
        .enumerate()
        .map(|(index, &code)| {
            let grid = &grids[index / inputs * groups + index % inputs / shared.group_size];
            grid.value(code) / scale(index) - rows.values[index]
        })
        .collect();
    shared.hessian.energy_by_input(&difference, par).iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::HessianSum;
    use crate::methods::tests::random;
    use crate::settings::RangeSearch;
    use crate::threads::Threads;

    #[test]
    fn inputs_with_outliers_get_larger_scales_and_the_error_falls() {
        let threads = Threads::new(2).unwrap();
        let (outputs, inputs) = (40, 64);
        let mut values = random(200 * inputs, 1);
        for token in values.chunks_exact_mut(inputs) {
            token[9] *= 30.0;
            token[41] *= 50.0;
        }
        let mut sum = HessianSum::new(inputs);
        threads.run(|par| sum.add(&values, par));
        let hessian = sum.finish();
        let weights = random(outputs * inputs, 2);
        let matrix = Weights { out_features: outputs, in_features: inputs, values: &weights };
        let own: Vec<usize> = (0..inputs).collect();
        let shared = SharedInput {
            matrices: &[matrix],
            hessian: &hessian,
            scale_of_input: &own,
            scales: inputs,
            group_size: 32,
            grid: Grid::new(4, false, RangeSearch::MinMax),
        };
        let scales = threads.run(|par| search(&shared, par));
        let mut sorted = own.clone();
        sorted.sort_by(|&a, &b| scales[b].total_cmp(&scales[a]));
        assert_eq!([sorted[0].min(sorted[1]), sorted[0].max(sorted[1])], [9, 41]);
        let error = |scales: &[f32]| threads.run(|par| error(&shared, matrix, scales, par));
        let (before, after) = (error(&vec![1.0; inputs]), error(&scales));
        assert!(after < 0.5 * before, "{after} {before}");

        // Two inputs for each scale: the tied ones share it.
        let tied: Vec<usize> = (0..inputs).map(|input| input % (inputs / 2)).collect();
        let shared = SharedInput { scale_of_input: &tied, scales: inputs / 2, ..shared };
        let scales = threads.run(|par| search(&shared, par));
        assert_eq!(scales.len(), inputs / 2);
        assert!(scales.iter().enumerate().all(|(index, &scale)| index == 9 || scale < 0.5 * scales[9]));
    }
}
