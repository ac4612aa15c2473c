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

/// Arguments of [`W4a16Matmul::w4a16_matmul`]: one or several products of the same activations, such as query, key and
/// value. A device may do them all at once; a row's bits then depend on which products are asked for together.
pub struct Args<'a, 'p, Buffer, Matrix> {
    /// `[rows, in_features]`.
    pub input: &'a Buffer,
    /// What the activations are multiplied with; all weights have the same `in_features`.
    pub products: &'p mut [Product<'a, Buffer, Matrix>],
    /// Number of rows.
    pub rows: usize,
}

/// A weight, and where its product goes.
pub struct Product<'a, Buffer, Matrix> {
    /// `[out_features, in_features]`.
    pub weight: &'a Matrix,
    /// `[out_features]`, for layers that have one.
    pub bias: Option<&'a Buffer>,
    /// `[rows, out_features]`.
    pub output: &'a mut Buffer,
}

impl<Buffer: Length, Matrix: MatrixShape> Args<'_, '_, Buffer, Matrix> {
    /// Checks that the weights agree and the buffers hold the rows.
    ///
    /// # Errors
    /// Names the weight that differs, or the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        let Some(first) = self.products.first() else { return Ok(()) };
        let in_features = first.weight.in_features();
        holds("w4a16_matmul", "input", self.input, self.rows * in_features)?;
        for Product { weight, bias, output } in &*self.products {
            KernelError::check("w4a16_matmul", "in_features", weight.in_features(), in_features)?;
            if let Some(bias) = bias {
                holds("w4a16_matmul", "bias", *bias, weight.out_features())?;
            }
            holds("w4a16_matmul", "output", *output, self.rows * weight.out_features())?;
        }
        Ok(())
    }
}

/// The operation of this module.
pub trait W4a16Matmul: Device {
    /// Multiplies activations by each of the weight matrices.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn w4a16_matmul(&self, args: Args<'_, '_, Self::Buffer, Self::PackedMatrix>) -> Result<(), KernelError>;
}
