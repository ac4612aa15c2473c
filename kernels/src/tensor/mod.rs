//! Host-side tensors: what a checkpoint holds before a backend packs it for its device.

mod dense;
mod quantized;

pub use dense::{DenseMatrix, DenseValues, FloatType};
pub use quantized::{GroupOffsets, QuantizedMatrix, QuantizedParts, checksum, stored_bits};
