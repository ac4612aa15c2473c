//! Device memory and every numeric operation of Nibble. Knows tensors, not models.

pub mod backend;
pub mod check;
pub mod device;
mod error;
pub mod ops;
pub mod tensor;
#[cfg(test)]
mod testing;

pub use backend::Backend;
pub use error::KernelError;
