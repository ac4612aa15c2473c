//! The product on the CPU.

use super::{Args, Product, W4a16Matmul};
use crate::backend::{Activations, Device};
use crate::device::cpu::integer_product::IntegerProduct;
use crate::device::cpu::matrix::{IntegerPanels, Panels, QuantizedPanels};
use crate::device::cpu::panel_product::PanelProduct;
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, '_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        let Args { input, products, rows } = args;
        for product in products {
            match (&product.weight.panels, self.activations()) {
                (QuantizedPanels::Nibbles(weight), Activations::Integer) => {
                    multiply_rounded(self, weight, input, product, rows);
                }
                (QuantizedPanels::Words(weight), Activations::Integer) => {
                    multiply_rounded(self, weight, input, product, rows);
                }
                (QuantizedPanels::Nibbles(weight), Activations::Float) => {
                    multiply(self, weight, input, product, rows);
                }
                (QuantizedPanels::Words(weight), Activations::Float) => {
                    multiply(self, weight, input, product, rows);
                }
                (QuantizedPanels::Bytes(weight), _) => multiply(self, weight, input, product, rows),
            }
        }
        Ok(())
    }
}

type CpuProduct<'a> = Product<'a, CpuBuffer, CpuPackedMatrix>;

fn multiply<P: Panels>(cpu: &Cpu, weight: &P, input: &CpuBuffer, product: &mut CpuProduct<'_>, rows: usize) {
    let bias = product.bias.map(|bias| &**bias);
    PanelProduct { input, weight, bias, output: product.output, rows }.run(cpu.instruction_set(), cpu.pool());
}

fn multiply_rounded<P: IntegerPanels>(
    cpu: &Cpu,
    weight: &P,
    input: &CpuBuffer,
    product: &mut CpuProduct<'_>,
    rows: usize,
) {
    let (set, pool) = (cpu.instruction_set(), cpu.pool());
    let mut rounded = cpu.integer_rows();
    rounded.fill(input, rows, weight, set, pool);
    let bias = product.bias.map(|bias| &**bias);
    IntegerProduct { input: &rounded, weight, bias, output: product.output, rows }.run(set, pool);
}
