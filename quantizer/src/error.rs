//! What can go wrong while a model is quantized.

use std::path::PathBuf;

use nibble_kernels::KernelError;
use nibble_model::error::CheckpointError;
use nibble_model::forward::ModelError;

/// A model could not be quantized. Nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// A file of the model is wrong, or the output cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A layer could not be run over the calibration data.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A quantized matrix breaks an invariant, or the device has no kernel for it.
    #[error("{name}: {source}")]
    Matrix {
        /// The linear layer.
        name: String,
        /// What was refused.
        source: KernelError,
    },
    /// The settings do not fit the model.
    #[error("{name} is {found}, expected {expected}; {help}")]
    Settings {
        /// The matrix or the option.
        name: String,
        /// What was found.
        found: String,
        /// What is needed.
        expected: String,
        /// What to do.
        help: String,
    },
    /// The calibration file cannot be used.
    #[error("calibration file {}: {problem}; {help}", file.display())]
    Calibration {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        help: String,
    },
    /// No sample of the calibration data can be used.
    #[error("no calibration sample can be used: {skipped}; {help}")]
    NoSamples {
        /// The first ones, with their places and what is wrong with each.
        skipped: String,
        /// What to do.
        help: &'static str,
    },
    /// Numbers that are not finite.
    #[error("{name}: {what} {found}, expected finite numbers; {help}")]
    NotFinite {
        /// The linear layer.
        name: String,
        /// Which numbers.
        what: &'static str,
        /// What was found.
        found: String,
        /// What to do.
        help: &'static str,
    },
    /// The Hessian cannot be factored, however much it is damped.
    #[error(
        "{name}: the Hessian of its inputs cannot be factored even with damping {damping}; use other calibration data or --method rtn"
    )]
    Factorization {
        /// The linear layer.
        name: String,
        /// The largest damping tried.
        damping: f64,
    },
    /// The journal of an earlier run cannot be used.
    #[error("{} {found}; {help}", directory.display())]
    Journal {
        /// The journal.
        directory: PathBuf,
        /// What is wrong with it.
        found: String,
        /// What to do.
        help: String,
    },
    /// What was written reads back as something else.
    #[error(
        "{}: the dequantized weights of {name} have the checksum {found}, expected {expected}, that of the matrix that was written; the disk or the memory is faulty: remove the directory and quantize again",
        directory.display()
    )]
    Verification {
        /// The linear layer.
        name: String,
        /// What was read.
        found: String,
        /// What was computed.
        expected: String,
        /// The checkpoint.
        directory: PathBuf,
    },
    /// The checkpoint computes something else than the run did before it was written.
    #[error(
        "{}: the logit of token {token} is {found}, but the quantized model in memory had {expected}, with a tolerance of {tolerance}; this is a bug in what was written besides the quantized matrices: please report it",
        directory.display()
    )]
    VerifiedLogits {
        /// The token.
        token: usize,
        /// Its logit in the checkpoint.
        found: f32,
        /// Its logit in the run.
        expected: f32,
        /// What they may differ by.
        tolerance: f32,
        /// The checkpoint.
        directory: PathBuf,
    },
    /// A report or a model card could not be made.
    #[error("the report cannot be made: {0}; the checkpoint itself is complete")]
    Report(String),
    /// The operating system gives no threads.
    #[error("cannot start {threads} threads: {problem}; give a smaller --threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system answered.
        problem: String,
    },
}

impl QuantizeError {
    /// A [`QuantizeError::Matrix`] about the linear layer `name`, for `map_err`.
    pub(crate) fn matrix(name: &str) -> impl FnOnce(KernelError) -> Self {
        let name = name.to_owned();
        move |source| Self::Matrix { name, source }
    }
}
