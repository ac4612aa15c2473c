//! The lookup on CUDA: one launch, a thread for eight elements.

use super::{Args, Embedding};
use crate::backend::MatrixShape;
use crate::device::cuda::driver::{Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaDenseMatrix, CudaIndices};
use crate::error::KernelError;
use crate::ops::{require_vectors, word};

/// The kernel.
pub const SOURCE: Source = Source { name: "embedding", variant: "", text: include_str!("kernel.cu") };

const THREADS: u32 = 128;

impl Embedding for Cuda {
    fn embedding(&self, args: Args<'_, CudaBuffer, CudaIndices, CudaDenseMatrix>) -> Result<(), KernelError> {
        args.check()?;
        if args.rows == 0 { Ok(()) } else { self.submit(&launch(&args)?) }
    }
}

fn launch(args: &Args<'_, CudaBuffer, CudaIndices, CudaDenseMatrix>) -> Result<Launch, KernelError> {
    const NAME: &str = "embedding";
    require_vectors(NAME, "hidden", args.table.in_features())?;
    let hidden = word(NAME, "hidden", args.table.in_features())?;
    let arguments = [
        Argument::Address(args.token_ids.address()),
        Argument::Address(args.table.address()),
        Argument::Address(args.output.address()),
        Argument::U32(hidden),
    ];
    Ok(Launch {
        source: SOURCE,
        kernel: "embedding",
        grid: [word(NAME, "rows", args.rows)?, hidden.div_ceil(8 * THREADS), 1],
        block: THREADS,
        shared_bytes: 0,
        arguments: arguments.into_iter().collect(),
    })
}
