//! What every device must show: rows of the table, bit for bit.

use std::borrow::Cow;

use super::{Args, Embedding};
use crate::check::{Checker, random};
use crate::error::KernelError;
use crate::tensor::{DenseMatrix, DenseValues};

pub(crate) fn check<D: Embedding>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for (vocabulary, hidden, rows) in [(70, 8, 4), (1000, 576, 33), (300, 8192, 200)] {
        let (_, table) = checker.input(&random(vocabulary * hidden, 1))?;
        let matrix = DenseMatrix::new(vocabulary, hidden, DenseValues::F32(Cow::from(&table)))?;
        let packed = checker.device.pack_dense("table", &matrix)?;
        let tokens: Vec<u32> = (0..rows as u32).map(|row| (row * 7919 + 3) % vocabulary as u32).collect();
        let mut output = checker.output(rows * hidden)?;
        let token_ids = &checker.indices(&tokens)?;
        checker.device.embedding(Args { token_ids, table: &packed, output: &mut output, rows })?;
        let expected: Vec<f32> =
            tokens.iter().flat_map(|&token| &table[token as usize * hidden..][..hidden]).copied().collect();
        let found = checker.values(&output, rows * hidden)?;
        checker.same_bits("embedding", format!("{rows} of {vocabulary} x {hidden}"), &found, &expected);
    }
    Ok(())
}
