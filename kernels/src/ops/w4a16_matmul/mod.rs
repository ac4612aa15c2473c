//! Activations times a group-wise quantized weight matrix (4 bit weights, 16 bit activations on cards).
//!
//! ```text
//! output[m, n] = sum over k of input[m, k] * (codes[n, k] - zero_points[n, g(k)]) * scales[n, g(k)] + bias[n]
//! g(k)         = k / group_size
//! ```
//!
//! Shapes: `input [rows, in_features]`, `weight [out_features, in_features]`, `bias [out_features]`,
//! `output [rows, out_features]`. The order in which a row's terms are added depends on the weight's shape
//! alone, never on `rows`: a row has the same bits alone and in a batch. Refuses buffers that are too short.

pub(crate) mod cases;
mod cpu;
pub mod cuda;
pub(crate) mod layout;
pub mod reference;
#[cfg(test)]
mod tests;

use super::holds;
use crate::backend::{Device, Length, MatrixShape};
use crate::error::KernelError;

/// Arguments of [`W4a16Matmul::w4a16_matmul`].
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
        holds("w4a16_matmul", "input", self.input, self.rows * self.weight.in_features())?;
        if let Some(bias) = self.bias {
            holds("w4a16_matmul", "bias", bias, self.weight.out_features())?;
        }
        holds("w4a16_matmul", "output", self.output, self.rows * self.weight.out_features())
    }
}

/// The operation of this module.
pub trait W4a16Matmul: Device {
    /// Multiplies activations by a weight matrix.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn w4a16_matmul(&self, args: Args<'_, Self::Buffer, Self::PackedMatrix>) -> Result<(), KernelError>;
}
