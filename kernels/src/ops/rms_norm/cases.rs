//! What every device must show: the sum rounded once, the norm of either the rounded sum or the exact one.

use super::{Args, RmsNorm, reference};
use crate::check::{Checker, random};
use crate::error::KernelError;

const EPSILON: f32 = 1e-5;

pub(crate) fn check<D: RmsNorm>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for (rows, width) in [(1, 8192), (7, 4096), (64, 8192), (33, 128), (3, 576), (2, 16_384), (520, 128)] {
        for adds in [false, true] {
            let case = format!("{rows} x {width}{}", if adds { " + addend" } else { "" });
            let (mut residual, residuals) = checker.input(&random(rows * width, 1))?;
            let (addend, addends) = checker.input(&random(rows * width, 2))?;
            let (weight, weights) = checker.input(&random(width, 3))?;
            let mut output = checker.output(rows * width)?;
            checker.device.rms_norm(Args {
                residual: &mut residual,
                addend: adds.then_some(&addend),
                weight: &weight,
                output: &mut output,
                rows,
                width,
                epsilon: EPSILON,
            })?;
            let sums: Vec<f32> =
                residuals.iter().zip(&addends).map(|(a, b)| if adds { a + b } else { *a }).collect();
            let roundoff = checker.roundoff;
            let found = checker.values(&residual, rows * width)?;
            let allowed = |expected: f32| 1.01 * roundoff * expected.abs().max(6e-5);
            checker.compare("rms_norm", format!("{case}: residual"), (&found, &sums), allowed);
            let expected: Vec<f32> = sums
                .chunks_exact(width)
                .flat_map(|row| reference::rms_norm(row, &weights, EPSILON))
                .collect();
            let found = checker.values(&output, rows * width)?;
            let allowed = |expected: f32| (2.1 * roundoff + 1e-6) * expected.abs().max(6e-5);
            checker.compare("rms_norm", case, (&found, &expected), allowed);
        }
    }
    Ok(())
}
