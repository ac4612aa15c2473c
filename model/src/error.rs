//! What can be wrong with the files of a model.
//!
//! Every message says which file, which tensor or field, what was found, what was expected and what to do.

use std::path::{Path, PathBuf};

/// A checkpoint, tokenizer or chat template could not be read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused an access.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried: "read", "create", "rename".
        action: &'static str,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// A file, tensor or field does not hold what it must.
    #[error("{}: {item} is {found}, expected {expected}; {help}", file.display())]
    Mismatch {
        /// The file.
        file: PathBuf,
        /// The tensor or field, with its kind: `tensor "model.norm.weight"`.
        item: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
        /// What to do.
        help: String,
    },
    /// A well-formed value names something Nibble does not implement.
    #[error("{}: {item} is {found}, which is not supported; supported: {supported}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field or tensor, with its kind.
        item: String,
        /// What was found.
        found: String,
        /// What is supported instead.
        supported: String,
    },
    /// A file cannot be parsed at all.
    #[error("{}: {problem}; {help}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// Where and how the text or header breaks off.
        problem: String,
        /// What to do.
        help: String,
    },
    /// A model id could not be fetched.
    #[error("cannot fetch {model} ({file}) from the Hugging Face hub: {problem}; {help}")]
    Download {
        /// The model id.
        model: String,
        /// The file of the model.
        file: String,
        /// What the client reported.
        problem: String,
        /// What to do.
        help: String,
    },
}

impl CheckpointError {
    /// An [`CheckpointError::Io`], for `map_err`: `std::fs::read(path).map_err(CheckpointError::io("read", path))`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// A [`CheckpointError::Mismatch`] about the tensor `name` of `file`.
    pub fn tensor(
        file: &Path,
        name: &str,
        found: impl ToString,
        expected: impl ToString,
        help: impl ToString,
    ) -> Self {
        Self::Mismatch {
            file: file.to_owned(),
            item: format!("tensor \"{name}\""),
            found: found.to_string(),
            expected: expected.to_string(),
            help: help.to_string(),
        }
    }

    /// A [`CheckpointError::Mismatch`] about the field `name` of the JSON file `file`.
    pub fn field(file: &Path, name: &str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Mismatch {
            file: file.to_owned(),
            item: format!("field \"{name}\""),
            found: found.to_string(),
            expected: expected.to_string(),
            help: "correct the file or fetch the model again".to_owned(),
        }
    }

    /// A [`CheckpointError::Unsupported`] about the field `name` of the JSON file `file`.
    pub fn unsupported(
        file: &Path,
        name: &str,
        found: impl std::fmt::Display,
        supported: impl ToString,
    ) -> Self {
        Self::Unsupported {
            file: file.to_owned(),
            item: format!("field \"{name}\""),
            found: format!("\"{found}\""),
            supported: supported.to_string(),
        }
    }

    /// A [`CheckpointError::Malformed`] about the whole of `file`.
    pub fn malformed(file: &Path, problem: impl ToString, help: impl ToString) -> Self {
        Self::Malformed { file: file.to_owned(), problem: problem.to_string(), help: help.to_string() }
    }
}
