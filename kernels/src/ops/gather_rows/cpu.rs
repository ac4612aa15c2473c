//! The selection on the CPU: one copy for each row.

use super::{Args, GatherRows};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices};
use crate::error::KernelError;

impl GatherRows for Cpu {
    fn gather_rows(&self, args: Args<'_, CpuBuffer, CpuIndices>) -> Result<(), KernelError> {
        args.check()?;
        let width = args.width;
        for (index, &row) in args.rows[..args.count].iter().enumerate() {
            let from = row as usize * width;
            args.output[index * width..(index + 1) * width].copy_from_slice(&args.input[from..from + width]);
        }
        Ok(())
    }
}
