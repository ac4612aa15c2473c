//! One line per operation; each folder holds its definition, reference, implementations and tests.
//!
//! The contract of every operation: the arguments are checked first and nothing is computed when they
//! disagree; then the work is enqueued, without allocating device memory and without waiting.

pub mod dense_matmul;
pub mod embedding;
pub mod gather_rows;
pub mod paged_attention;
pub mod rms_norm;
pub mod rotary_embedding;
pub mod silu_mul;
pub mod w4a16_matmul;

use crate::backend::Length;
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
