//! The product on the CPU.

use super::{Args, W4a16Matmul};
use crate::device::cpu::matrix::{Panels, QuantizedPanels};
use crate::device::cpu::panel_product::PanelProduct;
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        match &args.weight.panels {
            QuantizedPanels::Nibbles(weight) => multiply(self, weight, args),
            QuantizedPanels::Bytes(weight) => multiply(self, weight, args),
        }
        Ok(())
    }
}

fn multiply<P: Panels>(cpu: &Cpu, weight: &P, args: Args<'_, CpuBuffer, CpuPackedMatrix>) {
    let Args { input, bias, output, rows, .. } = args;
    PanelProduct { input, weight, bias: bias.map(|bias| &**bias), output, rows }
        .run(cpu.instruction_set(), cpu.pool());
}
