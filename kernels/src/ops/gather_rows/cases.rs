//! What every device must show: the selected rows, bit for bit.

use super::{Args, GatherRows};
use crate::check::{Checker, random};
use crate::error::KernelError;

pub(crate) fn check<D: GatherRows>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for (from, width, count) in [(4, 8, 3), (100, 576, 64), (64, 8192, 64)] {
        let (input, values) = checker.input(&random(from * width, 1))?;
        let rows: Vec<u32> = (0..count as u32).map(|row| (row * 7919 + 3) % from as u32).collect();
        let mut output = checker.output(count * width)?;
        let indices = &checker.indices(&rows)?;
        checker.device.gather_rows(Args {
            input: &input,
            rows: indices,
            output: &mut output,
            count,
            width,
        })?;
        let expected: Vec<f32> =
            rows.iter().flat_map(|&row| &values[row as usize * width..][..width]).copied().collect();
        let found = checker.values(&output, count * width)?;
        checker.same_bits("gather_rows", format!("{count} of {from} x {width}"), &found, &expected);
    }
    Ok(())
}
