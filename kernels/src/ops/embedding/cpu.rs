//! The lookup on the CPU: gathers one column of a panel for each token.

use super::{Args, Embedding};
use crate::device::cpu::{Cpu, CpuBuffer, CpuDenseMatrix, CpuIndices};
use crate::error::KernelError;

impl Embedding for Cpu {
    fn embedding(&self, args: Args<'_, CpuBuffer, CpuIndices, CpuDenseMatrix>) -> Result<(), KernelError> {
        args.check()?;
        let hidden = args.table.in_features();
        for (row, &token) in args.token_ids[..args.rows].iter().enumerate() {
            for (input, value) in args.output[row * hidden..(row + 1) * hidden].iter_mut().enumerate() {
                *value = args.table.weight(token as usize, input);
            }
        }
        Ok(())
    }
}
