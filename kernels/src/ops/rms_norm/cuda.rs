//! The norm on CUDA: one launch, a warp or a block for each row.

use super::{Args, RmsNorm};
use crate::device::cuda::driver::{Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, Element};
use crate::error::KernelError;
use crate::ops::{entry_point, require_vectors, word};

/// The kernels.
pub const SOURCE: Source = Source { name: "rms_norm", variant: "", text: include_str!("kernel.cu") };

/// Widest row: four vectors for each of 512 threads.
pub const MAX_WIDTH: usize = 16_384;

/// Widest row that one warp normalizes.
const WARP_WIDTH: usize = 256;
const ROWS_PER_WARP_BLOCK: u32 = 4;
const MAX_THREADS: u32 = 512;

impl RmsNorm for Cuda {
    fn rms_norm(&self, args: Args<'_, CudaBuffer>) -> Result<(), KernelError> {
        args.check()?;
        if args.rows == 0 { Ok(()) } else { self.submit(&launch(self.element(), &args)?) }
    }
}

/// How a row is worked on; chosen by its width alone.
#[derive(Debug, PartialEq, Eq)]
struct Form {
    /// The entry points for F16 and BF16.
    kernels: [&'static str; 2],
    /// Threads of a block.
    threads: u32,
    /// Rows of a block.
    rows: u32,
}

impl Form {
    fn of_width(width: usize) -> Self {
        if width <= WARP_WIDTH {
            let kernels = ["rms_norm_f16_warp", "rms_norm_bf16_warp"];
            return Self { kernels, threads: ROWS_PER_WARP_BLOCK * 32, rows: ROWS_PER_WARP_BLOCK };
        }
        let vectors = width.div_ceil(8) as u32;
        let (kernels, vectors_per_thread) = match vectors.div_ceil(MAX_THREADS) {
            1 => (["rms_norm_f16_1", "rms_norm_bf16_1"], 1),
            2 => (["rms_norm_f16_2", "rms_norm_bf16_2"], 2),
            _ => (["rms_norm_f16_4", "rms_norm_bf16_4"], 4),
        };
        Self { kernels, threads: vectors.div_ceil(vectors_per_thread).next_multiple_of(32), rows: 1 }
    }
}

fn launch(element: Element, args: &Args<'_, CudaBuffer>) -> Result<Launch, KernelError> {
    const NAME: &str = "rms_norm";
    require_vectors(NAME, "width", args.width)?;
    KernelError::require(
        args.width <= MAX_WIDTH,
        NAME,
        "width",
        args.width,
        "must be at most 16384 on CUDA",
    )?;
    let rows = word(NAME, "rows", args.rows)?;
    let form = Form::of_width(args.width);
    let in_warps = form.rows > 1;
    let arguments = [
        Argument::Address(args.residual.address()),
        Argument::Address(args.addend.map_or(0, CudaBuffer::address)),
        Argument::Address(args.weight.address()),
        Argument::Address(args.output.address()),
        Argument::U32(if in_warps { rows } else { form.threads }),
        Argument::U32(word(NAME, "width", args.width)?),
        Argument::F32(args.epsilon),
    ];
    Ok(Launch {
        source: SOURCE,
        kernel: entry_point(element, form.kernels),
        grid: [rows.div_ceil(form.rows), 1, 1],
        block: form.threads,
        shared_bytes: if in_warps { 0 } else { form.threads / 32 * 4 },
        arguments: arguments.into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_has_a_thread_for_every_vector_of_a_row() {
        for width in (8..=MAX_WIDTH).step_by(8) {
            let form = Form::of_width(width);
            let kernel = form.kernels[0];
            let vectors_per_thread = kernel.rsplit('_').next().unwrap().parse().unwrap_or(1);
            let threads_of_a_row = form.threads / form.rows;
            assert!(threads_of_a_row * vectors_per_thread * 8 >= width as u32, "{width}: {form:?}");
            assert!(form.threads <= MAX_THREADS && form.threads.is_multiple_of(32), "{width}: {form:?}");
            assert!(SOURCE.text.contains(&format!("({kernel}, F16")), "{kernel} is not in kernel.cu");
        }
    }
}
