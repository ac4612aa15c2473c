//! What every device must show: the formula, rounded once, with the error of a fast exponential.

use super::{Args, SiluMul};
use crate::check::{Checker, random};
use crate::error::KernelError;

pub(crate) fn check<D: SiluMul>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for elements in [8, 1000, 64 * 28_672] {
        let scaled = |seed, scale: f32| random(elements, seed).iter().map(|x| x * scale).collect::<Vec<_>>();
        let (gate, gates) = checker.input(&scaled(1, 12.0))?;
        let (up, ups) = checker.input(&scaled(2, 2.0))?;
        let mut output = checker.output(elements)?;
        checker.device.silu_mul(Args { gate: &gate, up: &up, output: &mut output, elements })?;
        let silu_mul = |(&gate, &up): (&f32, &f32)| {
            let x = f64::from(gate);
            (x / (1.0 + (-x).exp()) * f64::from(up)) as f32
        };
        let expected: Vec<f32> = gates.iter().zip(&ups).map(silu_mul).collect();
        let found = checker.values(&output, elements)?;
        let roundoff = checker.roundoff;
        // Below the smallest normal number of binary16 the error is that of the steps there.
        let allowed = |expected: f32| 1.05 * roundoff * expected.abs().max(6e-5) + 2e-6 * expected.abs();
        checker.compare("silu_mul", format!("{elements}"), (&found, &expected), allowed);
    }
    Ok(())
}
