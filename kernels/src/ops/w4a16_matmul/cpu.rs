//! The product on the CPU. Weights that round their activations alike share the rounded rows and one run of the pool.

use arrayvec::ArrayVec;

use super::{Args, Product, W4a16Matmul};
use crate::backend::{Activations, Device};
use crate::device::cpu::integer_product::IntegerProduct;
use crate::device::cpu::integer_rows::IntegerRows;
use crate::device::cpu::matrix::Panels;
use crate::device::cpu::panel_product::{PanelProduct, SharedOutput};
use crate::device::cpu::quantized_panels::{IntegerPanels, QuantizedPanels};
use crate::device::cpu::{Cpu, CpuBuffer, CpuPackedMatrix};
use crate::error::KernelError;

/// Weights in one run of the pool, at most.
const TOGETHER: usize = 4;

impl W4a16Matmul for Cpu {
    fn w4a16_matmul(&self, args: Args<'_, '_, CpuBuffer, CpuPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        let Args { input, products, rows } = args;
        let mut rest = products;
        while let Some(first) = rest.first() {
            let first = first.weight;
            let alike = |product: &&CpuProduct<'_>| first.rounds_like(product.weight);
            let count = rest.iter().take(TOGETHER).take_while(alike).count().max(1);
            let (together, behind) = rest.split_at_mut(count);
            multiply(self, input, together, rows);
            rest = behind;
        }
        Ok(())
    }
}

type CpuProduct<'a> = Product<'a, CpuBuffer, CpuPackedMatrix>;

/// A product, and which tasks of the run are its.
struct Part<'a> {
    weight: &'a CpuPackedMatrix,
    bias: Option<&'a [f32]>,
    output: SharedOutput,
    first_task: usize,
}

/// Multiplies by weights that round alike.
fn multiply(cpu: &Cpu, input: &CpuBuffer, products: &mut [CpuProduct<'_>], rows: usize) {
    let (set, pool) = (cpu.instruction_set(), cpu.pool());
    let mut rounded = cpu.integer_rows();
    if let (Some(first), Activations::Integer) = (products.first(), cpu.activations()) {
        first.weight.round(&mut rounded, input, rows, set, pool);
    }
    let run = Run { cpu, input, rounded: &rounded, rows };
    let mut parts = ArrayVec::<_, TOGETHER>::new();
    let mut tasks = 0;
    for product in products {
        let bias = product.bias.map(|bias| &**bias);
        let output = SharedOutput::new(product.output);
        let part = Part { weight: product.weight, bias, output, first_task: tasks };
        tasks += run.tasks(&part);
        parts.push(part);
    }
    pool.run(tasks, &|task| {
        if let Some(part) = parts.iter().rfind(|part| part.first_task <= task) {
            run.run_task(part, task - part.first_task);
        }
    });
}

/// What the parts of a run share.
struct Run<'a> {
    cpu: &'a Cpu,
    input: &'a [f32],
    rounded: &'a IntegerRows,
    rows: usize,
}

/// Does the same with the product of a part, be it of rounded activations or not.
macro_rules! with_product {
    ($run:expr, $part:expr, |$product:ident| $value:expr) => {
        match (&$part.weight.panels, $run.cpu.activations()) {
            (QuantizedPanels::Nibbles(weight), Activations::Integer) => {
                let $product = $run.rounded($part, weight);
                $value
            }
            (QuantizedPanels::FiveBits(weight), Activations::Integer) => {
                let $product = $run.rounded($part, weight);
                $value
            }
            (QuantizedPanels::SevenBits(weight), Activations::Integer) => {
                let $product = $run.rounded($part, weight);
                $value
            }
            (QuantizedPanels::EightBits(weight), Activations::Integer) => {
                let $product = $run.rounded($part, weight);
                $value
            }
            (QuantizedPanels::Nibbles(weight), Activations::Float) => {
                let $product = $run.float($part, weight);
                $value
            }
            (QuantizedPanels::FiveBits(weight), Activations::Float) => {
                let $product = $run.float($part, weight);
                $value
            }
            (QuantizedPanels::SevenBits(weight), Activations::Float) => {
                let $product = $run.float($part, weight);
                $value
            }
            (QuantizedPanels::EightBits(weight), Activations::Float) => {
                let $product = $run.float($part, weight);
                $value
            }
            (QuantizedPanels::Bytes(weight), _) => {
                let $product = $run.float($part, weight);
                $value
            }
        }
    };
}

impl Run<'_> {
    fn rounded<'p, P: IntegerPanels>(&'p self, part: &Part<'p>, weight: &'p P) -> IntegerProduct<'p, P> {
        let &Part { bias, output, .. } = part;
        let threads = self.cpu.pool().threads();
        IntegerProduct { input: self.rounded, weight, bias, output, rows: self.rows, threads }
    }

    fn float<'p, P: Panels>(&'p self, part: &Part<'p>, weight: &'p P) -> PanelProduct<'p, P> {
        let &Part { bias, output, .. } = part;
        PanelProduct { input: self.input, weight, bias, output, rows: self.rows }
    }

    fn tasks(&self, part: &Part<'_>) -> usize {
        with_product!(self, part, |product| product.tasks())
    }

    fn run_task(&self, part: &Part<'_>, task: usize) {
        // SAFETY: `Args::check` saw that the buffers hold the rows; the set was detected; the pool runs each task once.
        with_product!(self, part, |product| unsafe { product.run_task(self.cpu.instruction_set(), task) });
    }
}
