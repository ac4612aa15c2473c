//! The product on the CPU.

use super::{Args, W4a16Matmul};
use crate::backend::{Activations, Device};
use crate::device::cpu::integer_product::IntegerProduct;
use crate::device::cpu::matrix::Panels;
use crate::device::cpu::panel_product::PanelProduct;
use crate::device::cpu::quantized_panels::{IntegerPanels, QuantizedPanels};
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        match &args.weight.panels {
            QuantizedPanels::Nibbles(weight) => multiply_steps(self, weight, args),
            QuantizedPanels::FiveBits(weight) => multiply_steps(self, weight, args),
            QuantizedPanels::SevenBits(weight) => multiply_steps(self, weight, args),
            QuantizedPanels::EightBits(weight) => multiply_steps(self, weight, args),
            QuantizedPanels::Bytes(weight) => multiply(self, weight, args),
        }
        Ok(())
    }
}

/// The product of codes in steps, which can be multiplied as integers.
fn multiply_steps<P: IntegerPanels>(cpu: &Cpu, weight: &P, args: Args<'_, CpuBuffer, CpuPackedMatrix>) {
    match cpu.activations() {
        Activations::Integer => multiply_rounded(cpu, weight, args),
        Activations::Float => multiply(cpu, weight, args),
    }
}

fn multiply<P: Panels>(cpu: &Cpu, weight: &P, args: Args<'_, CpuBuffer, CpuPackedMatrix>) {
    let Args { input, bias, output, rows, .. } = args;
    PanelProduct { input, weight, bias: bias.map(|bias| &**bias), output, rows }
        .run(cpu.instruction_set(), cpu.pool());
}

fn multiply_rounded<P: IntegerPanels>(cpu: &Cpu, weight: &P, args: Args<'_, CpuBuffer, CpuPackedMatrix>) {
    let Args { input, bias, output, rows, .. } = args;
    let (set, pool) = (cpu.instruction_set(), cpu.pool());
    let mut rounded = cpu.integer_rows();
    rounded.fill(input, rows, weight, set, pool);
    IntegerProduct { input: &rounded, weight, bias: bias.map(|bias| &**bias), output, rows }.run(set, pool);
}
