//! RTN and GPTQ against plain loops, and against each other.

use faer::Mat;
use proptest::prelude::*;

use super::correction::{Drift, correct};
use super::gptq::{self, InverseFactor};
use super::{Weights, assemble, rtn};
use crate::grid::{Affine, Grid};
use crate::hessian::{Hessian, HessianSum};
use crate::settings::RangeSearch;
use crate::threads::Threads;

/// Reproducible values in -1.0..1.0.
pub(super) fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Inputs that share a few common causes, so that their Hessian has much off its diagonal.
fn correlated_inputs(tokens: usize, inputs: usize, seed: u64) -> Vec<f32> {
    let causes = 6;
    let (mixing, noise) = (random(causes * inputs, seed), random(tokens * inputs, seed + 1));
    let strength = random(tokens * causes, seed + 2);
    let value = |token: usize, input: usize| {
        let common: f32 =
            (0..causes).map(|cause| strength[token * causes + cause] * mixing[cause * inputs + input]).sum();
        common + 0.2 * noise[token * inputs + input]
    };
    (0..tokens * inputs).map(|index| value(index / inputs, index % inputs)).collect()
}

fn hessian(values: &[f32], inputs: usize, threads: &Threads) -> Hessian {
    let mut sum = HessianSum::new(inputs);
    for block in values.chunks(inputs * 100) {
        threads.run(|par| sum.add(block, par));
    }
    sum.finish()
}

/// `|(W - Wq) X|^2`, token by token in `f64`.
fn output_error(weights: Weights<'_>, quantized: &[f32], values: &[f32]) -> f64 {
    let inputs = weights.in_features;
    let mut error = 0.0;
    for token in values.chunks_exact(inputs) {
        for (row, quantized) in weights.values.chunks_exact(inputs).zip(quantized.chunks_exact(inputs)) {
            let outputs = row.iter().zip(quantized).zip(token);
            let output: f64 =
                outputs.map(|((w, q), x)| (f64::from(*w) - f64::from(*q)) * f64::from(*x)).sum();
            error += output * output;
        }
    }
    error
}

/// `U` with `U^T U = inverse of matrix`, by Gauss-Jordan elimination and Cholesky's recurrence, in `f64`.
fn textbook_inverse_factor(mut matrix: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let size = matrix.len();
    let mut inverse: Vec<Vec<f64>> =
        (0..size).map(|row| (0..size).map(|column| f64::from(u8::from(row == column))).collect()).collect();
    for pivot in 0..size {
        let divisor = matrix[pivot][pivot];
        for column in 0..size {
            matrix[pivot][column] /= divisor;
            inverse[pivot][column] /= divisor;
        }
        for row in (0..size).filter(|&row| row != pivot) {
            let factor = matrix[row][pivot];
            for column in 0..size {
                matrix[row][column] -= factor * matrix[pivot][column];
                inverse[row][column] -= factor * inverse[pivot][column];
            }
        }
    }
    let mut upper = vec![vec![0.0; size]; size];
    for row in 0..size {
        for column in row..size {
            let before: f64 = (0..row).map(|k| upper[k][row] * upper[k][column]).sum();
            let value = inverse[row][column] - before;
            upper[row][column] = if row == column { value.sqrt() } else { value / upper[row][row] };
        }
    }
    upper
}

/// GPTQ column by column, as in the paper, in `f64`.
fn textbook_gptq(
    weights: Weights<'_>,
    grid: Grid,
    group_size: usize,
    values: &[f32],
    activation_order: bool,
) -> (Vec<u8>, Vec<Affine>) {
    let (outputs, inputs) = (weights.out_features, weights.in_features);
    let groups = inputs.div_ceil(group_size);
    let mut hessian = vec![vec![0.0; inputs]; inputs];
    for token in values.chunks_exact(inputs) {
        for row in 0..inputs {
            for column in 0..inputs {
                hessian[row][column] += f64::from(token[row]) * f64::from(token[column]);
            }
        }
    }
    let mut order: Vec<usize> = (0..inputs).collect();
    if activation_order {
        order.sort_by(|&a, &b| hessian[b][b].total_cmp(&hessian[a][a]));
    }
    let mean = (0..inputs).map(|input| hessian[input][input]).sum::<f64>() / inputs as f64;
    let mut ordered: Vec<Vec<f64>> =
        order.iter().map(|&row| order.iter().map(|&column| hessian[row][column]).collect()).collect();
    for (index, row) in ordered.iter_mut().enumerate() {
        row[index] += 0.01 * mean;
    }
    let upper = textbook_inverse_factor(ordered);
    let mut importance = vec![0.0; inputs];
    for (index, &input) in order.iter().enumerate() {
        importance[input] = (1.0 / (upper[index][index] * upper[index][index])) as f32;
    }
    let mut codes = vec![0; outputs * inputs];
    let mut grids = Vec::new();
    for output in 0..outputs {
        let mut row: Vec<f64> =
            weights.values[output * inputs..][..inputs].iter().map(|&w| f64::from(w)).collect();
        let fit = |row: &[f64], group: usize| {
            let group = group * group_size..inputs.min((group + 1) * group_size);
            let weights: Vec<f32> = row[group.clone()].iter().map(|&weight| weight as f32).collect();
            grid.fit(&weights, &importance[group])
        };
        let mut of_row: Vec<Affine> = (0..groups).map(|group| fit(&row, group)).collect();
        for (index, &input) in order.iter().enumerate() {
            let group = input / group_size;
            if !activation_order && input % group_size == 0 {
                of_row[group] = fit(&row, group);
            }
            let code = of_row[group].code(row[input] as f32);
            codes[output * inputs + input] = code;
            let error = (row[input] - f64::from(of_row[group].value(code))) / upper[index][index];
            for (later, &input) in order.iter().enumerate().skip(index + 1) {
                row[input] -= error * upper[index][later];
            }
        }
        grids.extend(of_row);
    }
    (codes, grids)
}

#[test]
fn gptq_gives_the_codes_of_the_textbook_loop() {
    let threads = Threads::new(2).unwrap();
    // Inputs and group sizes on both sides of a block of 128 columns, and a partial last group.
    for (inputs, group_size) in [(48, 16), (160, 32), (200, 48), (256, 128), (300, 150), (144, 144)] {
        let values = correlated_inputs(400, inputs, inputs as u64);
        let (outputs, seed) = (12, 1 + inputs as u64);
        let weights = random(outputs * inputs, seed);
        let weights = Weights { out_features: outputs, in_features: inputs, values: &weights };
        let hessian = hessian(&values, inputs, &threads);
        for activation_order in [false, true] {
            for symmetric in [false, true] {
                for range in [RangeSearch::MinMax, RangeSearch::MeanSquare] {
                    let grid = Grid::new(4, symmetric, range);
                    let expected = textbook_gptq(weights, grid, group_size, &values, activation_order);
                    let factor =
                        threads.run(|par| InverseFactor::new(&hessian, 0.01, activation_order, par)).unwrap();
                    let found = threads.run(|par| gptq::quantize(weights, grid, group_size, &factor, par));
                    let case =
                        format!("{inputs} / {group_size}, order {activation_order}, {symmetric} {range:?}");
                    assert!(found.1 == expected.1, "grids of {case}");
                    assert_eq!(found.0, expected.0, "codes of {case}");
                }
            }
        }
    }
}

#[test]
fn gptq_has_a_smaller_output_error_than_rounding_on_correlated_inputs() {
    let threads = Threads::new(2).unwrap();
    let (outputs, inputs, group_size) = (24, 192, 32);
    for seed in 0..5 {
        let values = correlated_inputs(600, inputs, 10 * seed);
        let weights = random(outputs * inputs, 10 * seed + 5);
        let weights = Weights { out_features: outputs, in_features: inputs, values: &weights };
        let hessian = hessian(&values, inputs, &threads);
        let grid = Grid::new(4, false, RangeSearch::MinMax);
        let error = |(codes, grids): (Vec<u8>, Vec<Affine>)| {
            let matrix = assemble(weights, 4, group_size, codes, &grids).unwrap();
            output_error(weights, &matrix.dequantize(), &values)
        };
        let rounded = error(rtn::quantize(weights, grid, group_size, &[1.0; 192]));
        for activation_order in [false, true] {
            let factor =
                threads.run(|par| InverseFactor::new(&hessian, 0.01, activation_order, par)).unwrap();
            let found = error(threads.run(|par| gptq::quantize(weights, grid, group_size, &factor, par)));
            assert!(found < 0.5 * rounded, "{found} {rounded}"); // measured 0.1 to 0.2
        }
    }
}

#[test]
fn the_error_from_the_hessian_is_the_error_of_the_outputs() {
    let threads = Threads::new(2).unwrap();
    let (outputs, inputs) = (300, 40);
    let (values, weights) = (correlated_inputs(350, inputs, 3), random(outputs * inputs, 4));
    let weights = Weights { out_features: outputs, in_features: inputs, values: &weights };
    let hessian = hessian(&values, inputs, &threads);
    let expected = output_error(weights, &vec![0.0; outputs * inputs], &values);
    let found = threads.run(|par| hessian.energy_by_input(weights.values, par)).iter().sum::<f64>();
    assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
}

#[test]
fn one_thread_and_three_give_the_same_bits() {
    let (outputs, inputs, group_size) = (40, 320, 64);
    let (values, weights) = (correlated_inputs(700, inputs, 8), random(outputs * inputs, 9));
    let weights = Weights { out_features: outputs, in_features: inputs, values: &weights };
    let run = |count: usize| {
        let threads = Threads::new(count).unwrap();
        let hessian = hessian(&values, inputs, &threads);
        let grid = Grid::new(4, false, RangeSearch::MeanSquare);
        let factor = threads.run(|par| InverseFactor::new(&hessian, 0.01, true, par)).unwrap();
        let energy = threads.run(|par| hessian.energy_by_input(weights.values, par)).iter().sum::<f64>();
        (threads.run(|par| gptq::quantize(weights, grid, group_size, &factor, par)), energy)
    };
    assert!(run(1) == run(3));
}

#[test]
fn an_input_that_calibration_never_saw_is_rounded_to_nearest() {
    let threads = Threads::new(2).unwrap();
    let (outputs, inputs, group_size) = (8, 64, 16);
    let mut values = correlated_inputs(300, inputs, 1);
    for token in values.chunks_exact_mut(inputs) {
        token[20] = 0.0;
    }
    let weights = random(outputs * inputs, 2);
    let weights = Weights { out_features: outputs, in_features: inputs, values: &weights };
    let hessian = hessian(&values, inputs, &threads);
    let grid = Grid::new(4, false, RangeSearch::MinMax);
    let factor = threads.run(|par| InverseFactor::new(&hessian, 0.01, true, par)).unwrap();
    let (codes, grids) = threads.run(|par| gptq::quantize(weights, grid, group_size, &factor, par));
    for output in 0..outputs {
        let grid = grids[output * (inputs / group_size) + 20 / group_size];
        assert_eq!(codes[output * inputs + 20], grid.code(weights.values[output * inputs + 20]));
    }
}

#[test]
fn damping_is_raised_until_the_hessian_can_be_factored() {
    let threads = Threads::new(1).unwrap();
    let values = vec![1.0; 64];
    let rank_one = hessian(&values, 64, &threads);
    let factor = threads.run(|par| InverseFactor::new(&rank_one, 1e-24, true, par));
    assert!(
        factor.is_err_and(|largest| largest < 1e-18),
        "no damping up to 1e-19 makes this positive definite"
    );
    let factor = threads
        .run(|par| InverseFactor::new(&rank_one, 1e-16, true, par))
        .unwrap_or_else(|damping| panic!("not even {damping}"));
    assert!(factor.damping > 1e-16, "{}", factor.damping);
}

/// Min-max rounding, one weight after the other.
fn plain_rtn(row: &[f32], symmetric: bool) -> Vec<f32> {
    let low = row.iter().fold(0.0f32, |low, &weight| low.min(weight));
    let high = row.iter().fold(0.0f32, |high, &weight| high.max(weight));
    let (scale, zero) = if symmetric {
        (2.0 * high.max(-low) / 15.0, 8.0)
    } else {
        let zero = (-low / ((high - low) / 15.0)).round().max(1.0);
        let sides = [-low / zero, high / (15.0 - zero)];
        (sides.into_iter().filter(|side| side.is_finite()).fold((high - low) / 15.0, f32::max), zero)
    };
    let scale = half::f16::from_f32(scale).to_f32();
    let code = |weight: f32| ((weight / scale).round_ties_even() + zero).clamp(0.0, 15.0);
    row.iter().map(|&weight| (code(weight) - zero) * scale).collect()
}

proptest! {
    #[test]
    fn rtn_rounds_like_the_plain_loop(
        rows in 1usize..6, groups in 1usize..4, group_size in prop_oneof![Just(8usize), Just(16), Just(24)],
        seed in any::<u64>(), symmetric in any::<bool>(),
    ) {
        let inputs = groups * group_size;
        let values = random(rows * inputs, seed);
        let weights = Weights { out_features: rows, in_features: inputs, values: &values };
        let grid = Grid::new(4, symmetric, RangeSearch::MinMax);
        let (codes, grids) = rtn::quantize(weights, grid, group_size, &vec![1.0; inputs]);
        let found = assemble(weights, 4, group_size, codes, &grids).unwrap().dequantize();
        for (found, group) in found.chunks(group_size).zip(values.chunks(group_size)) {
            for ((found, expected), weight) in found.iter().zip(plain_rtn(group, symmetric)).zip(group) {
                // Multiplying by the inverse and dividing differ where a weight lies between two codes.
                let tie = ((found - weight).abs() - (expected - weight).abs()).abs() < 1e-6;
                prop_assert!(*found == expected || tie, "{found} {expected} {weight}");
            }
        }
    }

    #[test]
    fn every_grid_can_be_stored_and_the_search_never_loses(
        weights in prop::collection::vec(prop_oneof![-1e-9f32..1e-9, -3.0f32..3.0, 0.0f32..1.0, Just(0.0), Just(3e4f32)], 1..40),
        symmetric in any::<bool>(),
    ) {
        let importance = vec![1.0; weights.len()];
        let error = |range| {
            let grid = Grid::new(4, symmetric, range).fit(&weights, &importance);
            assert!(grid.scale != 0.0 && half::f16::from_f32(grid.scale).to_f32() == grid.scale);
            assert!((1..=15).contains(&grid.zero) && (!symmetric || grid.zero == 8));
            let value = |weight: f32| f64::from(grid.value(grid.code(weight)));
            weights.iter().map(|&weight| (value(weight) - f64::from(weight)).powi(2)).sum::<f64>()
        };
        let (covering, searched) = (error(RangeSearch::MinMax), error(RangeSearch::MeanSquare));
        prop_assert!(searched <= covering * 1.0001 + 1e-12, "{searched} {covering}");
    }
}

/// `left^T right` of tokens, in `f64`: `[left inputs, right inputs]`.
fn product(left: &[f32], rows: usize, right: &[f32], columns: usize) -> Mat<f32> {
    Mat::from_fn(rows, columns, |row, column| {
        let tokens = left.chunks_exact(rows).zip(right.chunks_exact(columns));
        tokens.map(|(left, right)| f64::from(left[row]) * f64::from(right[column])).sum::<f64>() as f32
    })
}

#[test]
fn corrected_weights_give_the_outputs_of_the_original_for_inputs_that_have_drifted() {
    let threads = Threads::new(2).unwrap();
    let (outputs, inputs, tokens) = (8, 48, 900);
    let original = correlated_inputs(tokens, inputs, 1);
    // The drift depends on the inputs, as rounding errors of earlier layers do, and has a part that does not.
    let noise = random(tokens * inputs, 7);
    let drifted: Vec<f32> = original
        .chunks_exact(inputs)
        .zip(noise.chunks_exact(inputs))
        .flat_map(|(token, noise)| {
            (0..inputs).map(move |input| {
                0.9 * token[input] + 0.3 * token[(input + 5) % inputs] + 0.05 * noise[input]
            })
        })
        .collect();
    let weights = random(outputs * inputs, 5);
    let hessian = hessian(&drifted, inputs, &threads);
    for activation_order in [false, true] {
        let factor = threads.run(|par| InverseFactor::new(&hessian, 1e-4, activation_order, par)).unwrap();
        let difference: Vec<f32> = original.iter().zip(&drifted).map(|(o, d)| o - d).collect();
        let wanted_outputs = outputs_of(&weights, &original, inputs);
        let errors: Vec<f32> =
            wanted_outputs.iter().zip(outputs_of(&weights, &drifted, inputs)).map(|(a, b)| a - b).collect();
        let mut found = Vec::new();
        for drift in [
            Drift::OfInputs(product(&difference, inputs, &drifted, inputs)),
            Drift::OfOutputs(product(&errors, outputs, &drifted, inputs)),
        ] {
            let mut corrected = weights.clone();
            threads.run(|par| correct(&mut corrected, &drift, &factor, par));
            let left = distance(&outputs_of(&corrected, &drifted, inputs), &wanted_outputs);
            let before = distance(&outputs_of(&weights, &drifted, inputs), &wanted_outputs);
            assert!(left < 0.05 * before, "{left} {before}");
            found.push(corrected);
        }
        assert!(distance(&found[0], &found[1]) < 1e-6 * distance(&found[0], &vec![0.0; weights.len()]));
    }
}

/// `W x` of each token, `[tokens, outputs]`.
fn outputs_of(weights: &[f32], values: &[f32], inputs: usize) -> Vec<f32> {
    let of_token = |token: &[f32]| -> Vec<f32> {
        weights.chunks_exact(inputs).map(|row| row.iter().zip(token).map(|(w, x)| w * x).sum()).collect()
    };
    values.chunks_exact(inputs).flat_map(of_token).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}
