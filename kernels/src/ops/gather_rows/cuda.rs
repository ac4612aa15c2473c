//! The selection on CUDA: one launch, a thread for eight elements.

use super::{Args, GatherRows};
use crate::device::cuda::driver::{Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaIndices};
use crate::error::KernelError;
use crate::ops::{require_vectors, word};

/// The kernel.
pub const SOURCE: Source = Source { name: "gather_rows", variant: "", text: include_str!("kernel.cu") };

const THREADS: u32 = 128;

impl GatherRows for Cuda {
    fn gather_rows(&self, args: Args<'_, CudaBuffer, CudaIndices>) -> Result<(), KernelError> {
        args.check()?;
        if args.count == 0 { Ok(()) } else { self.submit(&launch(&args)?) }
    }
}

fn launch(args: &Args<'_, CudaBuffer, CudaIndices>) -> Result<Launch, KernelError> {
    const NAME: &str = "gather_rows";
    require_vectors(NAME, "width", args.width)?;
    let width = word(NAME, "width", args.width)?;
    let arguments = [
        Argument::Address(args.input.address()),
        Argument::Address(args.rows.address()),
        Argument::Address(args.output.address()),
        Argument::U32(width),
    ];
    Ok(Launch {
        source: SOURCE,
        kernel: "gather_rows",
        grid: [word(NAME, "count", args.count)?, width.div_ceil(8 * THREADS), 1],
        block: THREADS,
        shared_bytes: 0,
        arguments: arguments.into_iter().collect(),
    })
}
