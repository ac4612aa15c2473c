//! What every device must show: the product with weights that may each be rounded once, and rows that do not depend on
//! others.

use super::{Args, Product, W4a16Matmul, reference};
use crate::check::{Checker, random};
use crate::error::KernelError;
use crate::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};

const NAME: &str = "w4a16_matmul";
/// Outputs that are compared: a few are enough of what takes the reference long.
const COMPARED: usize = 32;
/// Rows of the products, the largest first.
const ROWS: [usize; 12] = [300, 200, 128, 65, 64, 33, 32, 17, 16, 9, 8, 1];

struct Case {
    outputs: usize,
    inputs: usize,
    group_size: usize,
    symmetric: bool,
    permuted: bool,
}

const fn case(outputs: usize, inputs: usize, group_size: usize, symmetric: bool) -> Case {
    Case { outputs, inputs, group_size, symmetric, permuted: false }
}

const CASES: [Case; 9] = [
    case(256, 128, 128, true),
    case(256, 512, 128, false),
    case(1000, 1024, 64, true),
    case(520, 2048, 64, false),
    case(264, 608, 32, true),
    case(96, 576, 32, false),
    case(512, 1000, 1000, true),
    case(8192, 8192, 128, true),
    Case { permuted: true, ..case(512, 1024, 128, false) },
];

pub(crate) fn check<D: W4a16Matmul>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for case in &CASES {
        let Case { outputs, inputs, .. } = *case;
        let matrix = matrix(checker, case)?;
        let weight = checker.device.pack_quantized("weight", &matrix)?;
        let (input, values) = checker.input(&random(ROWS[0] * inputs, 2))?;
        let (bias, biases) = checker.input(&random(outputs, 3))?;
        let compared: Vec<usize> = (0..outputs).step_by(outputs.div_ceil(COMPARED)).collect();
        let some = select(&matrix, &compared)?;
        let some_biases: Vec<f32> = compared.iter().map(|&output| biases[output]).collect();
        let mut whole = Vec::new();
        for rows in ROWS {
            let with_bias = rows > 1 && rows % 8 == 1;
            let mut output = checker.output(rows * outputs)?;
            let bias = with_bias.then_some(&bias);
            let products = &mut [Product { weight: &weight, bias, output: &mut output }];
            checker.device.w4a16_matmul(Args { input: &input, products, rows })?;
            let found = checker.values(&output, rows * outputs)?;
            let name = format!(
                "{rows} x {outputs} x {inputs}, groups of {}{}{}",
                case.group_size,
                if case.symmetric { "" } else { ", zero points" },
                if case.permuted { ", permuted" } else { "" },
            );
            let biases = with_bias.then_some(&some_biases[..]);
            let expected = reference::w4a16_matmul(&values[..rows * inputs], &some, biases);
            let pick = |row: &[f32]| compared.iter().map(|&output| row[output]).collect::<Vec<_>>();
            let picked: Vec<f32> = found.chunks_exact(outputs).flat_map(pick).collect();
            // Terms have about the size 1 / sqrt(inputs) and random signs: their roundings add up to a part of one.
            let roundoff = checker.roundoff;
            let allowed = |expected: f32| 1.05 * roundoff * expected.abs() + 4.0 * roundoff + 1e-5;
            checker.compare(NAME, name.clone(), (&picked, &expected), allowed);
            match (rows, with_bias) {
                (300, _) => whole = found,
                (_, false) => {
                    checker.same_bits(NAME, format!("{name}: as of 300"), &found, &whole[..found.len()]);
                }
                _ => {}
            }
        }
    }
    check_together(checker)
}

/// Query, key and value of 8192 inputs, in one operation.
fn check_together<D: W4a16Matmul>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    const INPUTS: usize = 8192;
    const OUTPUTS: [usize; 3] = [8192, 1024, 1000];
    let mut matrices = Vec::new();
    let mut weights = Vec::new();
    for outputs in OUTPUTS {
        let matrix = matrix(checker, &case(outputs, INPUTS, 128, true))?;
        weights.push(checker.device.pack_quantized("weight", &matrix)?);
        let compared: Vec<usize> = (0..outputs).step_by(outputs.div_ceil(COMPARED)).collect();
        matrices.push((select(&matrix, &compared)?, compared));
    }
    let (input, values) = checker.input(&random(ROWS[0] * INPUTS, 2))?;
    let mut whole = [const { Vec::new() }; 3];
    for rows in [300, 65, 16, 1] {
        let outputs = OUTPUTS.map(|outputs| checker.output(rows * outputs));
        let mut outputs = outputs.into_iter().collect::<Result<Vec<_>, _>>()?;
        let products = weights.iter().zip(&mut outputs);
        let mut products: Vec<_> =
            products.map(|(weight, output)| Product { weight, bias: None, output }).collect();
        checker.device.w4a16_matmul(Args { input: &input, products: &mut products, rows })?;
        for (index, (some, compared)) in matrices.iter().enumerate() {
            let width = OUTPUTS[index];
            let found = checker.values(&outputs[index], rows * width)?;
            let name = format!("{rows} x {width} x {INPUTS}, with others");
            let expected = reference::w4a16_matmul(&values[..rows * INPUTS], some, None);
            let pick = |row: &[f32]| compared.iter().map(|&output| row[output]).collect::<Vec<_>>();
            let picked: Vec<f32> = found.chunks_exact(width).flat_map(pick).collect();
            let roundoff = checker.roundoff;
            let allowed = |expected: f32| 1.05 * roundoff * expected.abs() + 4.0 * roundoff + 1e-5;
            checker.compare(NAME, name.clone(), (&picked, &expected), allowed);
            if rows == ROWS[0] {
                whole[index] = found;
            } else {
                let same = &whole[index][..found.len()];
                checker.same_bits(NAME, format!("{name}: as of 300"), &found, same);
            }
        }
    }
    Ok(())
}

/// A matrix whose outputs are about as large as its inputs, with scales that the device holds exactly.
fn matrix<D: W4a16Matmul>(checker: &Checker<'_, D>, case: &Case) -> Result<QuantizedMatrix, KernelError> {
    let Case { outputs, inputs, group_size, symmetric, permuted } = *case;
    let groups = inputs.div_ceil(group_size);
    let code = |value: &f32| ((value + 1.0) * 8.0) as u8;
    let size = 0.25 / (inputs as f32).sqrt();
    let scales: Vec<f32> =
        random(outputs * groups, 9).iter().map(|value| size * (1.0 + 0.5 * value)).collect();
    let zero_points = random(outputs * groups, 8);
    QuantizedMatrix::new(QuantizedParts {
        out_features: outputs,
        in_features: inputs,
        bits: 4,
        group_size,
        codes: random(outputs * inputs, 7).iter().map(code).collect(),
        scales: checker.input(&scales)?.1,
        offsets: GroupOffsets::ZeroPoints(
            zero_points.iter().map(|value| if symmetric { 8 } else { code(value) }).collect(),
        ),
        // 7 divides no number of inputs above.
        input_permutation: permuted
            .then(|| (0..inputs as u32).map(|position| position * 7 % inputs as u32).collect()),
    })
}

/// The rows `outputs` of `matrix`.
fn select(matrix: &QuantizedMatrix, outputs: &[usize]) -> Result<QuantizedMatrix, KernelError> {
    fn rows_of<T: Copy>(values: &[T], width: usize, outputs: &[usize]) -> Vec<T> {
        outputs.iter().flat_map(|output| &values[output * width..][..width]).copied().collect()
    }
    let (inputs, groups) = (matrix.in_features(), matrix.groups());
    QuantizedMatrix::new(QuantizedParts {
        out_features: outputs.len(),
        in_features: inputs,
        bits: matrix.bits(),
        group_size: matrix.group_size(),
        codes: rows_of(matrix.codes(), inputs, outputs),
        scales: rows_of(matrix.scales(), groups, outputs),
        offsets: match matrix.offsets() {
            GroupOffsets::ZeroPoints(zero_points) => {
                GroupOffsets::ZeroPoints(rows_of(zero_points, groups, outputs))
            }
            GroupOffsets::Minimums(minimums) => GroupOffsets::Minimums(rows_of(minimums, groups, outputs)),
        },
        input_permutation: matrix.input_permutation().map(<[u32]>::to_vec),
    })
}
