//! Root-mean-square normalization, with the residual addition before it.
//!
//! ```text
//! residual[m, h] += addend[m, h]                                   (when there is an addend)
//! output[m, h]    = residual[m, h] / sqrt(mean over h of residual[m, h]^2 + epsilon) * weight[h]
//! ```
//!
//! Shapes: `residual, addend, output [rows, width]`, `weight [width]`. The sum of squares of a row is taken
//! in one order that depends on `width` alone. Refuses buffers that are too short.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

pub(crate) mod cases;
mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use super::holds;
use crate::backend::{Device, Length};
use crate::error::KernelError;

/// Arguments of [`RmsNorm::rms_norm`].
pub struct Args<'a, Buffer> {
    /// `[rows, width]`, the residual stream; the addend is added to it in place.
    pub residual: &'a mut Buffer,
    /// `[rows, width]`, the output of the block before; the first norm of a model has none.
    pub addend: Option<&'a Buffer>,
    /// `[width]`.
    pub weight: &'a Buffer,
    /// `[rows, width]`.
    pub output: &'a mut Buffer,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Added to the mean square.
    pub epsilon: f32,
}

impl<Buffer: Length> Args<'_, Buffer> {
    /// Checks that the buffers hold the rows.
    ///
    /// # Errors
    /// Names the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        let elements = self.rows * self.width;
        holds("rms_norm", "residual", self.residual, elements)?;
        if let Some(addend) = self.addend {
            holds("rms_norm", "addend", addend, elements)?;
        }
        holds("rms_norm", "weight", self.weight, self.width)?;
        holds("rms_norm", "output", self.output, elements)
    }
}

/// The operation of this module.
pub trait RmsNorm: Device {
    /// Adds to the residual stream and normalizes it.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn rms_norm(&self, args: Args<'_, Self::Buffer>) -> Result<(), KernelError>;
}
