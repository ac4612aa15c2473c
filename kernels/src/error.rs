//! What can be wrong with a call of an operation.

/// An operation was asked for something it cannot do. Nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A size or count does not agree with what the other arguments say.
    #[error("{operation}: {argument} is {found}, expected {expected}")]
    Size {
        /// The operation.
        operation: &'static str,
        /// The argument or named size.
        argument: &'static str,
        /// What the other arguments imply.
        expected: usize,
        /// What was passed.
        found: usize,
    },
    /// A value is outside the range the operation is defined for.
    #[error("{operation}: {argument} is {found}; {requirement}")]
    Value {
        /// The operation.
        operation: &'static str,
        /// The argument.
        argument: &'static str,
        /// What was passed.
        found: String,
        /// What is allowed.
        requirement: &'static str,
    },
    /// The device refused or failed.
    #[error("{device}: cannot {action}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// What was asked of it.
        action: String,
        /// What it answered, and what to do.
        reason: String,
    },
}

impl KernelError {
    /// `Ok` when `found` equals `expected`, else a [`KernelError::Size`] that names both.
    pub fn check(
        operation: &'static str,
        argument: &'static str,
        found: usize,
        expected: usize,
    ) -> Result<(), Self> {
        if found == expected { Ok(()) } else { Err(Self::Size { operation, argument, expected, found }) }
    }

    /// `Ok` when `allowed`, else a [`KernelError::Value`] with the value and what is required of it.
    pub fn require(
        allowed: bool,
        operation: &'static str,
        argument: &'static str,
        found: impl std::fmt::Display + Copy,
        requirement: &'static str,
    ) -> Result<(), Self> {
        if allowed {
            Ok(())
        } else {
            Err(Self::Value { operation, argument, found: found.to_string(), requirement })
        }
    }
}
