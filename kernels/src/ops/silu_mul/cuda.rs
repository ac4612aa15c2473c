//! The activation on CUDA: one launch, a thread for eight elements.

use super::{Args, SiluMul};
use crate::device::cuda::driver::{Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, Element};
use crate::error::KernelError;
use crate::ops::{entry_point, word};

/// The kernels.
pub const SOURCE: Source = Source { name: "silu_mul", variant: "", text: include_str!("kernel.cu") };

const THREADS: u32 = 128;

impl SiluMul for Cuda {
    fn silu_mul(&self, args: Args<'_, CudaBuffer>) -> Result<(), KernelError> {
        args.check()?;
        if args.elements == 0 { Ok(()) } else { self.submit(&launch(self.element(), &args)?) }
    }
}

fn launch(element: Element, args: &Args<'_, CudaBuffer>) -> Result<Launch, KernelError> {
    let elements = word("silu_mul", "elements", args.elements)?;
    let arguments = [
        Argument::Address(args.gate.address()),
        Argument::Address(args.up.address()),
        Argument::Address(args.output.address()),
        Argument::U32(elements),
    ];
    Ok(Launch {
        source: SOURCE,
        kernel: entry_point(element, ["silu_mul_f16", "silu_mul_bf16"]),
        grid: [elements.div_ceil(8 * THREADS), 1, 1],
        block: THREADS,
        shared_bytes: 0,
        arguments: arguments.into_iter().collect(),
    })
}
