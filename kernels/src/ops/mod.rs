//! One line per operation; each folder holds its definition, reference, implementations and tests.
//!
//! The contract of every operation: the arguments are checked first and nothing is computed when they
//! disagree; then the work is enqueued, without allocating device memory and without waiting. Only [`sample`] waits: its
//! tokens are what the host needs for the next step.

pub mod dense_matmul;
pub mod embedding;
pub mod gather_rows;
pub mod paged_attention;
pub mod rms_norm;
pub mod rotary_embedding;
pub mod sample;
pub mod silu_mul;
pub mod w4a16_matmul;

use crate::backend::Length;
use crate::device::cuda::Element;
use crate::device::cuda::driver::Source;
use crate::error::KernelError;

/// Checks that a buffer holds at least `needed` elements.
fn holds(
    operation: &'static str,
    argument: &'static str,
    buffer: &impl Length,
    needed: usize,
) -> Result<(), KernelError> {
    let length = buffer.length();
    if length >= needed {
        Ok(())
    } else {
        Err(KernelError::Size { operation, argument, expected: needed, found: length })
    }
}

/// Refuses a row that is not made of whole vectors of 16 bytes, as CUDA kernels move it.
fn require_vectors(
    operation: &'static str,
    argument: &'static str,
    elements: usize,
) -> Result<(), KernelError> {
    let whole = elements > 0 && elements.is_multiple_of(8);
    KernelError::require(whole, operation, argument, elements, "must be a positive multiple of 8 on CUDA")
}

/// A count as CUDA kernels take it; they add up to a block's work to it, which must fit too.
fn word(operation: &'static str, argument: &'static str, count: usize) -> Result<u32, KernelError> {
    let allowed = count <= i32::MAX as usize;
    KernelError::require(allowed, operation, argument, count, "must be below 2^31 on CUDA")?;
    Ok(count as u32)
}

/// The kernel for an element among those for F16 and BF16.
fn entry_point(element: Element, kernels: [&'static str; 2]) -> &'static str {
    match element {
        Element::F16 => kernels[0],
        Element::BF16 => kernels[1],
    }
}

/// The CUDA sources of every operation.
pub fn cuda_sources() -> Vec<Source> {
    let mut sources = vec![
        dense_matmul::cuda::SOURCE,
        embedding::cuda::SOURCE,
        gather_rows::cuda::SOURCE,
        rms_norm::cuda::SOURCE,
        rotary_embedding::cuda::SOURCE,
        sample::cuda::SOURCE,
        silu_mul::cuda::SOURCE,
    ];
    sources.extend(paged_attention::cuda::SOURCES);
    sources.extend(w4a16_matmul::cuda::SOURCES);
    sources
}
