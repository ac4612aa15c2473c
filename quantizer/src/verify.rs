//! Reads back what was written, as a server would, and compares it with what was computed.

use std::path::Path;

use nibble_kernels::backend::{Activations, Backend};
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::streamed_logits;
use nibble_model::self_test::SelfTest;

use crate::error::QuantizeError;
use crate::report::{Report, RunLogits};

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// The self-test that it wrote.
    pub self_test: SelfTest,
    /// The largest difference between a logit of the checkpoint and the same logit as the run computed it from what it
    /// had in memory; none where it ran no calibration.
    pub largest_logit_difference: Option<f32>,
}

/// Opens the checkpoint in `directory` with the loader that serves it, one matrix at a time, compares the dequantized
/// weights of every matrix with those that `report` measured, and the logits of a prompt with those that the run
/// computed before it wrote anything. Then writes nibble_self_test.json: the checksums, and logits that a
/// `device` with either kind of activations computed with one decoder layer in memory at a time.
///
/// # Errors
/// Names the matrix that reads back as another one, or the logit that is off. The checkpoint then has no self-test.
pub fn verify<B: Backend>(
    device: impl Fn(Activations) -> B,
    directory: &Path,
    report: &Report,
) -> Result<Verification, QuantizeError> {
    let checkpoint = Checkpoint::open(directory)?;
    let self_test = SelfTest::record(&device, &checkpoint)?;
    for matrix in &report.layers {
        let found = self_test.weights.get(&matrix.name);
        if found != Some(&matrix.checksum) {
            return Err(QuantizeError::Verification {
                name: matrix.name.clone(),
                found: found.map_or_else(|| "not quantized".to_owned(), ToString::to_string),
                expected: matrix.checksum.to_string(),
                directory: directory.to_owned(),
            });
        }
    }
    let largest_logit_difference = match &report.logits {
        Some(logits) => Some(compare(device(Activations::Float), &checkpoint, logits, self_test.tolerance)?),
        None => None,
    };
    self_test.write(directory)?;
    Ok(Verification { self_test, largest_logit_difference })
}

/// The largest difference between the logits of `checkpoint` and those that the run computed.
fn compare<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    run: &RunLogits,
    tolerance: f32,
) -> Result<f32, QuantizeError> {
    let logits = streamed_logits(backend, checkpoint, &run.tokens)?;
    let written = logits.row(logits.rows - 1);
    let mut largest: f32 = 0.0;
    for (token, (&found, &expected)) in written.iter().zip(&run.logits).enumerate() {
        let difference = (found - expected).abs();
        if difference.is_nan() || difference > tolerance {
            let directory = checkpoint.path().to_owned();
            return Err(QuantizeError::VerifiedLogits { token, found, expected, tolerance, directory });
        }
        largest = largest.max(difference);
    }
    Ok(largest)
}
