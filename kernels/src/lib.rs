//! Device memory and every numeric operation of Nibble. Knows tensors, not models.

mod error;
pub mod ops;
pub mod tensor;

pub use error::KernelError;
