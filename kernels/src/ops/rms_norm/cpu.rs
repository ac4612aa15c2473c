//! The norm on the CPU: row after row; its squares are summed lane by lane, then across lanes.

use super::{Args, RmsNorm};
use crate::device::cpu::simd::{InstructionSet, Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer, DisjointSlices};
use crate::error::KernelError;

/// Elements that a task norms, at least: fewer are faster than another thread hears of them.
const ELEMENTS_PER_TASK: usize = 16_384;

impl RmsNorm for Cpu {
    fn rms_norm(&self, args: Args<'_, CpuBuffer>) -> Result<(), KernelError> {
        args.check()?;
        let Args { width, rows, epsilon, .. } = args;
        let rows_per_task = ELEMENTS_PER_TASK.div_ceil(width.max(1));
        let (weight, addend) = (&args.weight[..width], args.addend.map(|addend| &**addend));
        let residual = DisjointSlices::new(args.residual);
        let output = DisjointSlices::new(args.output);
        let set = self.instruction_set();
        self.pool().run(rows.div_ceil(rows_per_task), &|task| {
            for row in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
                let range = row * width..(row + 1) * width;
                // SAFETY: rows are disjoint.
                let (residual, output) =
                    unsafe { (residual.slice(range.clone()), output.slice(range.clone())) };
                if let Some(addend) = addend {
                    for (residual, addend) in residual.iter_mut().zip(&addend[range]) {
                        *residual += addend;
                    }
                }
                normalize_row(set, residual, weight, output, epsilon);
            }
        });
        Ok(())
    }
}

fn normalize_row(set: InstructionSet, residual: &[f32], weight: &[f32], output: &mut [f32], epsilon: f32) {
    // SAFETY: the set was detected, and the three slices have the same width.
    unsafe {
        dispatch!(set, normalize(residual: &[f32], weight: &[f32], output: &mut [f32], epsilon: f32));
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
