//! What every device must show: the products summed in 32 bits and rounded once, and rows that do not depend on others.

use std::borrow::Cow;

use super::{Args, DenseMatmul, reference};
use crate::check::{Checker, random};
use crate::error::KernelError;
use crate::tensor::{DenseMatrix, DenseValues};

const NAME: &str = "dense_matmul";
/// Outputs that are compared: a few are enough of what takes the reference long.
const COMPARED: usize = 48;

pub(crate) fn check<D: DenseMatmul>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for (outputs, inputs) in [(64, 64), (1000, 576), (4096, 4096), (1024, 8192)] {
        let size = (3.0 / inputs as f32).sqrt();
        let weights: Vec<f32> = random(outputs * inputs, 1).iter().map(|weight| weight * size).collect();
        let (_, weights) = checker.input(&weights)?;
        let matrix = DenseMatrix::new(outputs, inputs, DenseValues::F32(Cow::from(&weights)))?;
        let weight = checker.device.pack_dense("weight", &matrix)?;
        let (input, values) = checker.input(&random(200 * inputs, 2))?;
        let (bias, biases) = checker.input(&random(outputs, 3))?;
        let compared: Vec<usize> = (0..outputs).step_by(outputs.div_ceil(COMPARED)).collect();
        let some_weights: Vec<f32> =
            compared.iter().flat_map(|output| &weights[output * inputs..][..inputs]).copied().collect();
        let some_biases: Vec<f32> = compared.iter().map(|&output| biases[output]).collect();
        let mut whole = Vec::new();
        for rows in [200, 65, 64, 17, 8, 3, 1] {
            let with_bias = rows > 1 && rows % 8 == 1;
            let mut output = checker.output(rows * outputs)?;
            let bias = with_bias.then_some(&bias);
            checker.device.dense_matmul(Args {
                input: &input,
                weight: &weight,
                bias,
                output: &mut output,
                rows,
            })?;
            let found = checker.values(&output, rows * outputs)?;
            let case = format!("{rows} x {outputs} x {inputs}");
            let biases = with_bias.then_some(&some_biases[..]);
            let expected = reference::matmul(&values[..rows * inputs], &some_weights, biases, inputs);
            let pick = |row: &[f32]| compared.iter().map(|&output| row[output]).collect::<Vec<_>>();
            let picked: Vec<f32> = found.chunks_exact(outputs).flat_map(pick).collect();
            let roundoff = checker.roundoff;
            // Terms have about the size 1 / sqrt(inputs); tensor cores cut off sums in 32 bits rather than rounding them.
            let allowed = |expected: f32| 1.05 * roundoff * expected.abs() + 1e-5 + 2e-9 * inputs as f32;
            checker.compare(NAME, case.clone(), (&picked, &expected), allowed);
            match (rows, with_bias) {
                (200, _) => whole = found,
                (_, false) => {
                    checker.same_bits(NAME, format!("{case}: as of 200"), &found, &whole[..found.len()]);
                }
                _ => {}
            }
        }
    }
    Ok(())
}
