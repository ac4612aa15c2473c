//! Operations against their references, on whatever device there is: `ops/*/cases.rs` holds the cases.
//!
//! Inputs are rounded to the device's activations before both see them, and outputs are not numbers before they are
//! written.

use crate::backend::{Backend, Device};
use crate::error::KernelError;
use crate::ops;

/// What came of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The operation.
    pub operation: &'static str,
    /// The case.
    pub case: String,
    /// The largest error as a part of what is allowed; not a number when an output is none.
    pub error: f64,
}

impl Outcome {
    /// Whether every output is within its tolerance.
    pub fn passed(&self) -> bool {
        self.error <= 1.0
    }
}

/// Checks every case of every operation, and calls `report` after each. `roundoff` is the relative error of one rounding
/// to an activation, such as 2^-11.
///
/// # Errors
/// When the device refuses a case.
pub fn check<B: Backend>(
    device: &B,
    roundoff: f32,
    report: &mut dyn FnMut(Outcome),
) -> Result<(), KernelError> {
    let mut checker = Checker { device, roundoff, report };
    ops::embedding::cases::check(&mut checker)?;
    ops::gather_rows::cases::check(&mut checker)?;
    ops::silu_mul::cases::check(&mut checker)?;
    ops::rms_norm::cases::check(&mut checker)?;
    ops::rotary_embedding::cases::check(&mut checker)?;
    ops::dense_matmul::cases::check(&mut checker)?;
    ops::w4a16_matmul::cases::check(&mut checker)?;
    ops::paged_attention::cases::check(&mut checker)?;
    ops::sample::cases::check(&mut checker)
}

/// A device under test.
pub(crate) struct Checker<'a, D> {
    pub(crate) device: &'a D,
    pub(crate) roundoff: f32,
    report: &'a mut dyn FnMut(Outcome),
}

impl<D: Device> Checker<'_, D> {
    /// A buffer of `values`, and what they became in it.
    pub(crate) fn input(&self, values: &[f32]) -> Result<(D::Buffer, Vec<f32>), KernelError> {
        let mut buffer = self.device.buffer(values.len())?;
        self.device.write(values, &mut buffer)?;
        let values = self.values(&buffer, values.len())?;
        Ok((buffer, values))
    }

    /// Indices.
    pub(crate) fn indices(&self, values: &[u32]) -> Result<D::Indices, KernelError> {
        let mut indices = self.device.indices(values.len())?;
        self.device.write_indices(values, &mut indices)?;
        Ok(indices)
    }

    /// A buffer of `elements` values that are no numbers.
    pub(crate) fn output(&self, elements: usize) -> Result<D::Buffer, KernelError> {
        Ok(self.input(&vec![f32::NAN; elements])?.0)
    }

    /// A cache of `elements` values that are no numbers.
    pub(crate) fn unwritten_cache(&self, elements: usize) -> Result<D::Cache, KernelError> {
        let mut cache = self.device.cache(elements)?;
        self.device.write_cache(&vec![f32::NAN; elements], &mut cache)?;
        Ok(cache)
    }

    /// The first `elements` values of `buffer`.
    pub(crate) fn values(&self, buffer: &D::Buffer, elements: usize) -> Result<Vec<f32>, KernelError> {
        let mut values = vec![0.0; elements];
        self.device.read(buffer, 0..elements, &mut values)?;
        Ok(values)
    }

    /// Compares `found` with `expected`, which differ by at most `allowed` of an expected value.
    pub(crate) fn compare(
        &mut self,
        operation: &'static str,
        case: String,
        (found, expected): (&[f32], &[f32]),
        allowed: impl Fn(f32) -> f32,
    ) {
        let of_allowed = |(&found, &expected): (&f32, &f32)| {
            if found == expected { 0.0 } else { f64::from((found - expected).abs() / allowed(expected)) }
        };
        let error = found.iter().zip(expected).map(of_allowed).fold(0.0, largest);
        let error = if found.len() == expected.len() { error } else { f64::NAN };
        (self.report)(Outcome { operation, case, error });
    }

    /// Demands that `found` and `expected` have the same bits.
    pub(crate) fn same_bits(
        &mut self,
        operation: &'static str,
        case: String,
        found: &[f32],
        expected: &[f32],
    ) {
        let same = found.iter().map(|value| value.to_bits()).eq(expected.iter().map(|value| value.to_bits()));
        self.verdict(operation, case, same);
    }

    /// Reports a case that was compared elsewhere.
    pub(crate) fn verdict(&mut self, operation: &'static str, case: String, passed: bool) {
        (self.report)(Outcome { operation, case, error: if passed { 0.0 } else { f64::INFINITY } });
    }
}

/// The larger one; not a number if one is none.
fn largest(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// `count` reproducible values in -1.0..1.0.
pub(crate) fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Cpu;

    #[test]
    fn the_cpu_passes_every_case() {
        let mut outcomes = Vec::new();
        check(&Cpu::new(2), f32::EPSILON / 2.0, &mut |outcome| outcomes.push(outcome)).unwrap();
        let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed()).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        assert!(outcomes.len() > 50);
    }

    #[test]
    fn a_wrong_or_missing_output_fails() {
        let (cpu, mut errors) = (Cpu::new(1), Vec::new());
        let mut report = |outcome: Outcome| errors.push(outcome.passed());
        let mut checker = Checker { device: &cpu, roundoff: 0.1, report: &mut report };
        for (found, expected) in
            [(&[1.0, 2.0][..], &[1.0, 2.1][..]), (&[1.0], &[1.2]), (&[f32::NAN], &[1.0]), (&[], &[1.0])]
        {
            checker.compare("nothing", String::new(), (found, expected), |expected| 0.1 * expected);
        }
        checker.same_bits("nothing", String::new(), &[0.0], &[-0.0]);
        assert_eq!(errors, [true, false, false, false, false]);
    }
}
