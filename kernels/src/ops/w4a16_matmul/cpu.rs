//! The product on the CPU.

use super::{Args, Product, W4a16Matmul};
use crate::backend::{Activations, Device};
use crate::device::cpu::integer_product::IntegerProduct;
use crate::device::cpu::matrix::Panels;
use crate::device::cpu::panel_product::PanelProduct;
use crate::device::cpu::quantized_panels::{IntegerPanels, QuantizedPanels};
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, '_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        let Args { input, products, rows } = args;
        for product in products {
            match &product.weight.panels {
                QuantizedPanels::Nibbles(weight) => multiply_steps(self, weight, input, product, rows),
                QuantizedPanels::FiveBits(weight) => multiply_steps(self, weight, input, product, rows),
                QuantizedPanels::SevenBits(weight) => multiply_steps(self, weight, input, product, rows),
                QuantizedPanels::EightBits(weight) => multiply_steps(self, weight, input, product, rows),
                QuantizedPanels::Bytes(weight) => multiply(self, weight, input, product, rows),
            }
        }
        Ok(())
    }
}

type CpuProduct<'a> = Product<'a, CpuBuffer, CpuPackedMatrix>;

/// The product of codes in steps, which can be multiplied as integers.
fn multiply_steps<P: IntegerPanels>(
    cpu: &Cpu,
    weight: &P,
    input: &CpuBuffer,
    product: &mut CpuProduct<'_>,
    rows: usize,
) {
    match cpu.activations() {
        Activations::Integer => multiply_rounded(cpu, weight, input, product, rows),
        Activations::Float => multiply(cpu, weight, input, product, rows),
    }
}

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
