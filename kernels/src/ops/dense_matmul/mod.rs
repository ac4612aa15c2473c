//! Activations times a dense weight matrix, its elements in F32, F16 or BF16.
//!
//! ```text
//! output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n]
//! ```
//!
//! Shapes: `input [rows, in_features]`, `weight [out_features, in_features]`, `bias [out_features]`,
//! `output [rows, out_features]`. The order in which a row's terms are added depends on the weight's shape
//! alone, never on `rows`: a row has the same bits alone and in a batch. Refuses buffers that are too short.

pub(crate) mod cases;
mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use super::holds;
use crate::backend::{Device, Length, MatrixShape};
use crate::error::KernelError;

/// Arguments of [`DenseMatmul::dense_matmul`].
pub struct Args<'a, Buffer, Matrix> {
    /// `[rows, in_features]`.
    pub input: &'a Buffer,
    /// `[out_features, in_features]`.
    pub weight: &'a Matrix,
    /// `[out_features]`, for layers that have one.
    pub bias: Option<&'a Buffer>,
    /// `[rows, out_features]`.
    pub output: &'a mut Buffer,
    /// Number of rows.
    pub rows: usize,
}

impl<Buffer: Length, Matrix: MatrixShape> Args<'_, Buffer, Matrix> {
    /// Checks that the buffers hold the rows.
    ///
    /// # Errors
    /// Names the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        holds("dense_matmul", "input", self.input, self.rows * self.weight.in_features())?;
        if let Some(bias) = self.bias {
            holds("dense_matmul", "bias", bias, self.weight.out_features())?;
        }
        holds("dense_matmul", "output", self.output, self.rows * self.weight.out_features())
    }
}

/// The operation of this module.
pub trait DenseMatmul: Device {
    /// Multiplies activations by a weight matrix.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn dense_matmul(&self, args: Args<'_, Self::Buffer, Self::DenseMatrix>) -> Result<(), KernelError>;
}
