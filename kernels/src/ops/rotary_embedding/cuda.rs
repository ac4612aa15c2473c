//! The rotation and the cache write on CUDA: one launch.

use super::{Args, RotaryEmbedding};
use crate::device::cuda::driver::{Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaIndices, Element};
use crate::error::KernelError;
use crate::ops::{entry_point, word};

/// The kernels.
pub const SOURCE: Source = Source { name: "rotary_embedding", variant: "", text: include_str!("kernel.cu") };

const THREADS: u32 = 128;

impl RotaryEmbedding for Cuda {
    fn rotary_embedding(
        &self,
        args: Args<'_, CudaBuffer, CudaIndices, CudaBuffer>,
    ) -> Result<(), KernelError> {
        args.check()?;
        if args.rows == 0 { Ok(()) } else { self.submit(&launch(self.element(), &args)?) }
    }
}

fn launch(
    element: Element,
    args: &Args<'_, CudaBuffer, CudaIndices, CudaBuffer>,
) -> Result<Launch, KernelError> {
    const NAME: &str = "rotary_embedding";
    let (whole, head_dim) = (args.head_dim.is_multiple_of(16) && args.head_dim > 0, args.head_dim);
    KernelError::require(whole, NAME, "head_dim", head_dim, "must be a multiple of 16 on CUDA")?;
    let (heads, kv_heads) = (word(NAME, "heads", args.heads)?, word(NAME, "kv_heads", args.kv_heads)?);
    let head_dim = word(NAME, "head_dim", head_dim)?;
    let threads_of_a_row = (heads + 2 * kv_heads) * (head_dim / 16);
    let arguments = [
        Argument::Address(args.query.address()),
        Argument::Address(args.key.address()),
        Argument::Address(args.value.address()),
        Argument::Address(args.cosines.address()),
        Argument::Address(args.sines.address()),
        Argument::Address(args.positions.address()),
        Argument::Address(args.slots.address()),
        Argument::Address(args.key_cache.address()),
        Argument::Address(args.value_cache.address()),
        Argument::U32(heads),
        Argument::U32(kv_heads),
        Argument::U32(head_dim),
    ];
    Ok(Launch {
        source: SOURCE,
        kernel: entry_point(element, ["rotary_embedding_f16", "rotary_embedding_bf16"]),
        grid: [word(NAME, "rows", args.rows)?, threads_of_a_row.div_ceil(THREADS), 1],
        block: THREADS,
        shared_bytes: 0,
        arguments: arguments.into_iter().collect(),
    })
}
