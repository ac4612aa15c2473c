//! The product on the CPU.

use super::{Args, DenseMatmul};
use crate::device::cpu::matrix::{DensePanelsOf, Panels};
use crate::device::cpu::panel_product::{PanelProduct, SharedOutput};
use crate::device::cpu::{Cpu, CpuBuffer, CpuDenseMatrix};
use crate::error::KernelError;

impl DenseMatmul for Cpu {
    fn dense_matmul(&self, args: Args<'_, CpuBuffer, CpuDenseMatrix>) -> Result<(), KernelError> {
        args.check()?;
        match &args.weight.panels {
            DensePanelsOf::F32(weight) => multiply(self, weight, args),
            DensePanelsOf::F16(weight) => multiply(self, weight, args),
            DensePanelsOf::BF16(weight) => multiply(self, weight, args),
        }
        Ok(())
    }
}

fn multiply<P: Panels>(cpu: &Cpu, weight: &P, args: Args<'_, CpuBuffer, CpuDenseMatrix>) {
    let Args { input, bias, output, rows, .. } = args;
    let output = SharedOutput::new(output);
    let product = PanelProduct { input, weight, bias: bias.map(|bias| &**bias), output, rows };
    // SAFETY: `Args::check` saw that the output holds the rows; the set was detected; the pool runs each task once.
    cpu.pool().run(product.tasks(), &|task| unsafe { product.run_task(cpu.instruction_set(), task) });
}
