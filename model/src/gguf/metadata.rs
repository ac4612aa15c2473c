//! Metadata values of a GGUF file, and access to them by the type that is expected.

use super::GgufFile;
use crate::error::CheckpointError;

/// A metadata value. Integers and floats of every width are kept in the widest.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    /// `u8`, `u16`, `u32`, `u64`.
    Unsigned(u64),
    /// `i8`, `i16`, `i32`, `i64`.
    Signed(i64),
    /// `f32`, `f64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// A string.
    String(String),
    /// Values of one type.
    Array(MetadataArray),
}

/// The values of an array.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataArray {
    /// `u8`, `u16`, `u32`, `u64`.
    Unsigned(Vec<u64>),
    /// `i8`, `i16`, `i32`, `i64`.
    Signed(Vec<i64>),
    /// `f32`, `f64`.
    Float(Vec<f64>),
    /// `bool`.
    Bool(Vec<bool>),
    /// Strings.
    String(Vec<String>),
}

impl MetadataValue {
    /// What it is, for messages.
    fn describe(&self) -> String {
        match self {
            Self::Unsigned(value) => value.to_string(),
            Self::Signed(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::String(value) => {
                let short: String = value.chars().take(40).collect();
                format!("{short:?}")
            }
            Self::Array(_) => "an array".to_owned(),
        }
    }
}

impl GgufFile {
    /// The string `key`, if present.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        self.typed(key, "a string", |value| match value {
            MetadataValue::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The strings `key`, if present.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, CheckpointError> {
        self.typed(key, "an array of strings", |value| match value {
            MetadataValue::Array(MetadataArray::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// The integers `key`, if present.
    ///
    /// # Errors
    /// When it is of another type, or one is negative.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<u64>>, CheckpointError> {
        self.typed(key, "an array of non-negative integers", |value| match value {
            MetadataValue::Array(MetadataArray::Unsigned(numbers)) => Some(numbers.clone()),
            MetadataValue::Array(MetadataArray::Signed(numbers)) => {
                numbers.iter().map(|&number| u64::try_from(number).ok()).collect()
            }
            _ => None,
        })
    }

    /// The floating-point numbers `key`, if present.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn floats(&self, key: &str) -> Result<Option<&[f64]>, CheckpointError> {
        self.typed(key, "an array of floating-point numbers", |value| match value {
            MetadataValue::Array(MetadataArray::Float(numbers)) => Some(numbers.as_slice()),
            _ => None,
        })
    }

    /// The integer `key`, if present.
    ///
    /// # Errors
    /// When it is of another type or negative.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        self.typed(key, "a non-negative integer", |value| match value {
            MetadataValue::Unsigned(number) => Some(*number),
            MetadataValue::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// The number `key`, if present.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(key, "a number", |value| match value {
            MetadataValue::Float(number) => Some(*number),
            _ => None,
        })
    }

    /// The switch `key`, if present.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "true or false", |value| match value {
            MetadataValue::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// The error that the metadata `key` is `found` where `expected` belongs.
    pub(crate) fn mismatch(
        &self,
        key: &str,
        found: impl ToString,
        expected: impl ToString,
    ) -> CheckpointError {
        CheckpointError::Mismatch {
            file: self.path().to_owned(),
            item: format!("metadata \"{key}\""),
            found: found.to_string(),
            expected: expected.to_string(),
            help: "fetch the file again or convert the model again".to_owned(),
        }
    }

    /// The error that the metadata `key` is `found`, which is not implemented.
    pub(crate) fn unsupported(
        &self,
        key: &str,
        found: impl ToString,
        supported: impl ToString,
    ) -> CheckpointError {
        CheckpointError::Unsupported {
            file: self.path().to_owned(),
            item: format!("metadata \"{key}\""),
            found: found.to_string(),
            supported: supported.to_string(),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        self.metadata(key)
            .map(|value| read(value).ok_or_else(|| self.mismatch(key, value.describe(), expected)))
            .transpose()
    }
}
