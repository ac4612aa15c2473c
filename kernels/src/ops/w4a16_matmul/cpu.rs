//! The product on the CPU.

use super::{Args, W4a16Matmul};
use crate::backend::{Activations, Device};
use crate::device::cpu::integer_product::IntegerProduct;
use crate::device::cpu::matrix::{IntegerPanels, Panels, QuantizedPanels};
use crate::device::cpu::panel_product::PanelProduct;
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        match (&args.weight.panels, self.activations()) {
            (QuantizedPanels::Nibbles(weight), Activations::Integer) => multiply_rounded(self, weight, args),
            (QuantizedPanels::Words(weight), Activations::Integer) => multiply_rounded(self, weight, args),
            (QuantizedPanels::Nibbles(weight), Activations::Float) => multiply(self, weight, args),
            (QuantizedPanels::Words(weight), Activations::Float) => multiply(self, weight, args),
            (QuantizedPanels::Bytes(weight), _) => multiply(self, weight, args),
        }
        Ok(())
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
