//! The norm on the CPU: row after row; its squares are summed lane by lane, then across lanes.

use super::{Args, RmsNorm};
use crate::device::cpu::simd::{Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer};
use crate::error::KernelError;

impl RmsNorm for Cpu {
    fn rms_norm(&self, args: Args<'_, CpuBuffer>) -> Result<(), KernelError> {
        args.check()?;
        let width = args.width;
        for row in 0..args.rows {
            let range = row * width..(row + 1) * width;
            let residual = &mut args.residual[range.clone()];
            if let Some(addend) = args.addend {
                for (residual, addend) in residual.iter_mut().zip(&addend[range.clone()]) {
                    *residual += addend;
                }
            }
            let output = &mut args.output[range];
            let (weight, epsilon) = (&args.weight[..width], args.epsilon);
            // SAFETY: the set was detected, and the four slices have the same width.
            unsafe {
                dispatch!(
                    self.instruction_set(),
                    normalize(residual: &[f32], weight: &[f32], output: &mut [f32], epsilon: f32)
                );
            }
        }
        Ok(())
    }
}

#[inline(always)]
unsafe fn normalize<S: Simd>(residual: &[f32], weight: &[f32], output: &mut [f32], epsilon: f32) {
    let width = residual.len();
    let whole = width - width % S::WIDTH;
    // SAFETY: every access stays below `whole`, which is at most the length of each slice.
    unsafe {
        let mut squares = S::splat(0.0);
        for start in (0..whole).step_by(S::WIDTH) {
            let value = S::load(residual.as_ptr().add(start));
            squares = S::multiply_add(value, value, squares);
        }
        let mut sum = S::sum(squares);
        for value in &residual[whole..] {
            sum += value * value;
        }
        let factor = 1.0 / (sum / width as f32 + epsilon).sqrt();
        for start in (0..whole).step_by(S::WIDTH) {
            let value = S::mul(S::load(residual.as_ptr().add(start)), S::splat(factor));
            S::store(output.as_mut_ptr().add(start), S::mul(value, S::load(weight.as_ptr().add(start))));
        }
        for index in whole..width {
            output[index] = residual[index] * factor * weight[index];
        }
    }
}
