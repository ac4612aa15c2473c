//! The gated activation of the feed-forward block: `output[i] = silu(gate[i]) * up[i]`,
//! `silu(x) = x / (1 + e^-x)`.
//!
//! Shapes: all `[elements]`; rows do not matter. Refuses buffers that are too short.
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU).

pub(crate) mod cases;
mod cpu;
pub mod cuda;

use super::holds;
use crate::backend::{Device, Length};
use crate::error::KernelError;

/// Arguments of [`SiluMul::silu_mul`].
pub struct Args<'a, Buffer> {
    /// The values that pass through the activation.
    pub gate: &'a Buffer,
    /// The values they gate.
    pub up: &'a Buffer,
    /// The product.
    pub output: &'a mut Buffer,
    /// Number of elements.
    pub elements: usize,
}

impl<Buffer: Length> Args<'_, Buffer> {
    /// Checks that the buffers hold the elements.
    ///
    /// # Errors
    /// Names the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        holds("silu_mul", "gate", self.gate, self.elements)?;
        holds("silu_mul", "up", self.up, self.elements)?;
        holds("silu_mul", "output", self.output, self.elements)
    }
}

/// The operation of this module.
pub trait SiluMul: Device {
    /// Gates `up` by the activation of `gate`.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn silu_mul(&self, args: Args<'_, Self::Buffer>) -> Result<(), KernelError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{Cpu, InstructionSet};
    use crate::testing::{random, upload};

    #[test]
    fn every_instruction_set_agrees_with_the_formula() {
        for set in InstructionSet::available() {
            let cpu = Cpu::with_instruction_set(2, set);
            let elements = 40_003;
            let gate: Vec<f32> = random(elements, 1).iter().map(|value| value * 40.0).collect();
            let up = random(elements, 2);
            let mut output = cpu.buffer(elements).unwrap();
            let args =
                Args { gate: &upload(&cpu, &gate), up: &upload(&cpu, &up), output: &mut output, elements };
            cpu.silu_mul(args).unwrap();
            for index in 0..elements {
                let x = f64::from(gate[index]);
                let expected = x / (1.0 + (-x).exp()) * f64::from(up[index]);
                let error = (f64::from(output[index]) - expected).abs();
                assert!(error <= 1e-6 * expected.abs().max(1e-6), "{set:?} x {x}: {error}");
            }
        }
    }
}
