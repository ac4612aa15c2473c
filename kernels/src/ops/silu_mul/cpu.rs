//! The activation on the CPU: slices of 16,384 elements a task.

use super::{Args, SiluMul};
use crate::device::cpu::simd::{InstructionSet, Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer, DisjointSlices};
use crate::error::KernelError;

const ELEMENTS_PER_TASK: usize = 16_384;

impl SiluMul for Cpu {
    fn silu_mul(&self, args: Args<'_, CpuBuffer>) -> Result<(), KernelError> {
        args.check()?;
        let (gate, up) = (&args.gate[..args.elements], &args.up[..args.elements]);
        let output = DisjointSlices::new(&mut args.output[..args.elements]);
        let set = self.instruction_set();
        self.pool().run(args.elements.div_ceil(ELEMENTS_PER_TASK), &|task| {
            let range = task * ELEMENTS_PER_TASK..args.elements.min((task + 1) * ELEMENTS_PER_TASK);
            // SAFETY: tasks have disjoint ranges.
            let output = unsafe { output.slice(range.clone()) };
            gate_slice(set, &gate[range.clone()], &up[range], output);
        });
        Ok(())
    }
}

fn gate_slice(set: InstructionSet, gate: &[f32], up: &[f32], output: &mut [f32]) {
    // SAFETY: the set was detected and the three slices have one length.
    unsafe { dispatch!(set, gate_elements(gate: &[f32], up: &[f32], output: &mut [f32])) }
}

#[inline(always)]
unsafe fn gate_elements<S: Simd>(gate: &[f32], up: &[f32], output: &mut [f32]) {
    let whole = gate.len() - gate.len() % S::WIDTH;
    // SAFETY: accesses stay below the common length; the rest goes through a padded vector.
    unsafe {
        for start in (0..whole).step_by(S::WIDTH) {
            let value = gated::<S>(S::load(gate.as_ptr().add(start)), S::load(up.as_ptr().add(start)));
            S::store(output.as_mut_ptr().add(start), value);
        }
        let rest = gate.len() - whole;
        let (mut padded_gate, mut padded_up) = ([0.0f32; 16], [0.0f32; 16]);
        padded_gate[..rest].copy_from_slice(&gate[whole..]);
        padded_up[..rest].copy_from_slice(&up[whole..]);
        S::store(
            padded_gate.as_mut_ptr(),
            gated::<S>(S::load(padded_gate.as_ptr()), S::load(padded_up.as_ptr())),
        );
        output[whole..].copy_from_slice(&padded_gate[..rest]);
    }
}

#[inline(always)]
unsafe fn gated<S: Simd>(gate: S::F32, up: S::F32) -> S::F32 {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let denominator = S::add(S::splat(1.0), S::exp(S::sub(S::splat(0.0), gate)));
        S::mul(S::div(gate, denominator), up)
    }
}
