//! Typed access to the fields of a JSON object, with errors that name file and field.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::CheckpointError;

/// A JSON object of `file`. `null` counts as absent, as transformers writes it.
pub(crate) struct Fields {
    file: PathBuf,
    /// Path of the object inside the file, with a trailing dot; empty for the whole file.
    prefix: String,
    object: Map<String, Value>,
}

impl Fields {
    /// Reads `file`, which must hold one JSON object.
    pub(crate) fn read(file: &Path) -> Result<Self, CheckpointError> {
        let text = std::fs::read_to_string(file).map_err(CheckpointError::io("read", file))?;
        let value = serde_json::from_str(&text).map_err(|error| {
            CheckpointError::malformed(file, format!("not valid JSON: {error}"), "fetch the file again")
        })?;
        Self::from_value(file, String::new(), value)
    }

    /// [`Fields::read`], or `None` when `file` does not exist.
    pub(crate) fn read_if_present(file: &Path) -> Result<Option<Self>, CheckpointError> {
        if file.exists() { Self::read(file).map(Some) } else { Ok(None) }
    }

    /// The object `value` of `file`, found at `prefix` in it.
    pub(crate) fn from_value(file: &Path, prefix: String, value: Value) -> Result<Self, CheckpointError> {
        match value {
            Value::Object(object) => Ok(Self { file: file.to_owned(), prefix, object }),
            other => {
                let name = if prefix.is_empty() { "(whole file)" } else { prefix.trim_end_matches('.') };
                Err(CheckpointError::field(file, name, short(&other), "a JSON object"))
            }
        }
    }

    /// The value of `name`, absent and `null` alike as `None`.
    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Every name and value.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.object.iter()
    }

    /// The value of `name` as a `T`, if present. `expected` describes `T` to the user.
    pub(crate) fn optional<T: DeserializeOwned>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, CheckpointError> {
        self.value(name)
            .map(|value| T::deserialize(value).map_err(|_| self.mismatch(name, short(value), expected)))
            .transpose()
    }

    /// The value of `name` as a `T`.
    pub(crate) fn required<T: DeserializeOwned>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<T, CheckpointError> {
        self.optional(name, expected)?.ok_or_else(|| self.mismatch(name, "missing", expected))
    }

    /// A size that must be present and at least one.
    pub(crate) fn size(&self, name: &str) -> Result<usize, CheckpointError> {
        match self.required(name, "a positive integer")? {
            0 => Err(self.mismatch(name, "0", "a positive integer")),
            size => Ok(size),
        }
    }

    /// A finite number above zero, or `default` when absent.
    pub(crate) fn positive(&self, name: &str, default: f32) -> Result<f32, CheckpointError> {
        let number = self.optional(name, "a positive number")?.unwrap_or(default);
        self.check_positive(name, number)
    }

    /// A finite number above zero that must be present.
    pub(crate) fn required_positive(&self, name: &str) -> Result<f32, CheckpointError> {
        let number = self.required(name, "a positive number")?;
        self.check_positive(name, number)
    }

    fn check_positive(&self, name: &str, number: f32) -> Result<f32, CheckpointError> {
        if number.is_finite() && number > 0.0 {
            Ok(number)
        } else {
            Err(self.mismatch(name, number, "a positive number"))
        }
    }

    /// A boolean, or `default` when absent.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, CheckpointError> {
        Ok(self.optional(name, "true or false")?.unwrap_or(default))
    }

    /// The object under `name`, if present.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>, CheckpointError> {
        self.value(name)
            .map(|value| Self::from_value(&self.file, format!("{}{name}.", self.prefix), value.clone()))
            .transpose()
    }

    /// One id or a list of ids; absent is the empty list.
    pub(crate) fn ids(&self, name: &str) -> Result<Vec<u32>, CheckpointError> {
        const EXPECTED: &str = "a token id or a list of token ids";
        match self.value(name) {
            Some(Value::Array(_)) => Ok(self.required(name, EXPECTED)?),
            Some(_) => Ok(vec![self.required(name, EXPECTED)?]),
            None => Ok(Vec::new()),
        }
    }

    /// The error that `name` holds `found` where `expected` belongs.
    pub(crate) fn mismatch(
        &self,
        name: &str,
        found: impl ToString,
        expected: impl ToString,
    ) -> CheckpointError {
        CheckpointError::field(&self.file, &format!("{}{name}", self.prefix), found, expected)
    }

    /// The error that `name` holds `found`, which is not implemented.
    pub(crate) fn unsupported(
        &self,
        name: &str,
        found: impl std::fmt::Display,
        supported: impl ToString,
    ) -> CheckpointError {
        CheckpointError::unsupported(&self.file, &format!("{}{name}", self.prefix), found, supported)
    }
}

/// `value` as JSON, cut after 80 characters.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
