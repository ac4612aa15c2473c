//! Selection of rows: `output[i, h] = input[rows[i], h]`.
//!
//! Picks the rows whose logits are wanted out of a step. Shapes: `input [*, width]`, `rows [count]`,
//! `output [count, width]`. Refuses buffers that are too short; row numbers are the caller's to check.

pub(crate) mod cases;
mod cpu;
pub mod cuda;

use super::holds;
use crate::backend::{Device, Length};
use crate::error::KernelError;

/// Arguments of [`GatherRows::gather_rows`].
pub struct Args<'a, Buffer, Indices> {
    /// `[*, width]`.
    pub input: &'a Buffer,
    /// Row of the input for each row of the output.
    pub rows: &'a Indices,
    /// `[count, width]`.
    pub output: &'a mut Buffer,
    /// Number of rows selected.
    pub count: usize,
    /// Elements of a row.
    pub width: usize,
}

impl<Buffer: Length, Indices: Length> Args<'_, Buffer, Indices> {
    /// Checks that the buffers hold the rows.
    ///
    /// # Errors
    /// Names the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        holds("gather_rows", "rows", self.rows, self.count)?;
        holds("gather_rows", "output", self.output, self.count * self.width)
    }
}

/// The operation of this module.
pub trait GatherRows: Device {
    /// Copies the selected rows.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn gather_rows(&self, args: Args<'_, Self::Buffer, Self::Indices>) -> Result<(), KernelError>;
}
