//! Reads back what was written, as a server would, and compares it with what was computed.

use std::path::Path;

use nibble_kernels::backend::Backend;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::self_test::SelfTest;

use crate::error::QuantizeError;
use crate::report::Report;

/// Opens the checkpoint in `directory` with the loader that serves it, one matrix at a time, compares the dequantized
/// weights of every matrix with those that `report` measured, and writes nibble_self_test.json: the checksums, and
/// logits that `backend` computed with one decoder layer in memory at a time.
///
/// # Errors
/// Names the matrix that reads back as another one. The checkpoint then has no self-test.
pub fn verify<B: Backend>(backend: B, directory: &Path, report: &Report) -> Result<SelfTest, QuantizeError> {
    let checkpoint = Checkpoint::open(directory)?;
    let test = SelfTest::record(backend, &checkpoint)?;
    for matrix in &report.layers {
        let found = test.weights.get(&matrix.name);
        if found != Some(&matrix.checksum) {
            return Err(QuantizeError::Verification {
                name: matrix.name.clone(),
                found: found.map_or_else(|| "not quantized".to_owned(), ToString::to_string),
                expected: matrix.checksum.to_string(),
                directory: directory.to_owned(),
            });
        }
    }
    test.write(directory)?;
    Ok(test)
}
