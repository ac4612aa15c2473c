//! Token embedding: `output[m, h] = table[token_ids[m], h]`.
//!
//! Shapes: `token_ids [rows]`, `table [vocabulary, hidden]` (a [`Device::DenseMatrix`] with the vocabulary as
//! its outputs, so that a tied output head shares it), `output [rows, hidden]`.
//!
//! Refuses buffers that are too short. A token id at or above the vocabulary is the caller's error; the
//! host checks ids before they reach a device.
//!
//! [`Device::DenseMatrix`]: crate::backend::Device::DenseMatrix

pub(crate) mod cases;
mod cpu;
pub mod cuda;

use super::holds;
use crate::backend::{Device, Length, MatrixShape};
use crate::error::KernelError;

/// Arguments of [`Embedding::embedding`].
pub struct Args<'a, Buffer, Indices, Matrix> {
    /// Token of each row, each below the vocabulary.
    pub token_ids: &'a Indices,
    /// `[vocabulary, hidden]`.
    pub table: &'a Matrix,
    /// `[rows, hidden]`.
    pub output: &'a mut Buffer,
    /// Number of rows.
    pub rows: usize,
}

impl<Buffer: Length, Indices: Length, Matrix: MatrixShape> Args<'_, Buffer, Indices, Matrix> {
    /// Checks that the buffers hold the rows.
    ///
    /// # Errors
    /// Names the buffer that is too short.
    pub fn check(&self) -> Result<(), KernelError> {
        holds("embedding", "token_ids", self.token_ids, self.rows)?;
        holds("embedding", "output", self.output, self.rows * self.table.in_features())
    }
}

/// The operation of this module.
pub trait Embedding: Device {
    /// Looks up a row of the table for each token.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn embedding(
        &self,
        args: Args<'_, Self::Buffer, Self::Indices, Self::DenseMatrix>,
    ) -> Result<(), KernelError>;
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::device::cpu::Cpu;
    use crate::tensor::{DenseMatrix, DenseValues};

    #[test]
    fn rows_of_the_table_come_out_in_the_order_of_the_tokens() {
        let cpu = Cpu::new(2);
        let (vocabulary, hidden) = (70, 5);
        let values: Vec<f32> = (0..vocabulary * hidden).map(|index| index as f32).collect();
        let matrix = DenseMatrix::new(vocabulary, hidden, DenseValues::F32(Cow::from(&values))).unwrap();
        let table = cpu.pack_dense("embed", &matrix).unwrap();
        let tokens = [69u32, 0, 33, 33];
        let mut token_ids = cpu.indices(4).unwrap();
        cpu.write_indices(&tokens, &mut token_ids).unwrap();
        let mut output = cpu.buffer(4 * hidden).unwrap();
        cpu.embedding(Args { token_ids: &token_ids, table: &table, output: &mut output, rows: 4 }).unwrap();
        for (row, token) in output.chunks_exact(hidden).zip(tokens) {
            let first = token as usize * hidden;
            assert_eq!(row, &values[first..first + hidden]);
        }
        let short = Args { token_ids: &token_ids, table: &table, output: &mut output, rows: 5 };
        assert!(cpu.embedding(short).unwrap_err().to_string().contains("token_ids"));
    }
}
