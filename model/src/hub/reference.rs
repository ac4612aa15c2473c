//! What a user calls a model: a directory, a GGUF file or a Hugging Face id.

use std::path::{Path, PathBuf};

use crate::error::CheckpointError;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelReference {
    /// A directory that exists.
    Directory(PathBuf),
    /// A GGUF file that exists.
    Gguf(PathBuf),
    /// `organization/name` on the Hugging Face hub.
    HubId(String),
}

impl ModelReference {
    /// What `name` stands for. What exists comes first: a directory `a/b` is not looked up on the hub.
    ///
    /// # Errors
    /// When it is a file of another kind, or neither there nor an id.
    pub fn parse(name: &str) -> Result<Self, CheckpointError> {
        let path = Path::new(name);
        let gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        let found = match (path.is_dir(), path.exists(), gguf) {
            (true, ..) => return Ok(Self::Directory(path.to_owned())),
            (false, true, true) => return Ok(Self::Gguf(path.to_owned())),
            (false, true, false) => "a file of another kind",
            (false, false, false) if is_hub_id(name) => return Ok(Self::HubId(name.to_owned())),
            (false, false, _) => "not there",
        };
        Err(CheckpointError::Mismatch {
            file: path.to_owned(),
            item: "the model".to_owned(),
            found: found.to_owned(),
            expected: "a directory, a .gguf file or a Hugging Face id such as Qwen/Qwen2.5-0.5B-Instruct"
                .to_owned(),
            help: "check the path".to_owned(),
        })
    }
}

/// `organization/name` by the hub's rules for names.
fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let outer = |byte: Option<u8>| byte.is_some_and(|byte| !matches!(byte, b'-' | b'.'));
        part.bytes().all(plain) && outer(part.bytes().next()) && outer(part.bytes().next_back())
    };
    let parts = name.split_once('/').is_some_and(|(organization, name)| part(organization) && part(name));
    parts && !name.contains("--") && !name.contains("..") && name.len() <= 96
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_exists_or_an_id_or_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("model.GGUF"), "").unwrap();
        std::fs::write(path("model.bin"), "").unwrap();
        assert_eq!(
            ModelReference::parse(&path("")).unwrap(),
            ModelReference::Directory(directory.path().join(""))
        );
        assert_eq!(
            ModelReference::parse(&path("model.GGUF")).unwrap(),
            ModelReference::Gguf(directory.path().join("model.GGUF"))
        );
        let id = "Qwen/Qwen2.5-0.5B_x";
        assert_eq!(ModelReference::parse(id).unwrap(), ModelReference::HubId(id.to_owned()));
        for (name, found) in [
            (path("model.bin").as_str(), "a file of another kind"),
            ("nowhere/model.gguf", "not there"),
            ("nowhere", "not there"),
            ("a/b/c", "not there"),
            ("../b", "not there"),
            ("a/..", "not there"),
            ("a/b--c", "not there"),
            ("a/b c", "not there"),
            ("./b", "not there"),
        ] {
            let error = ModelReference::parse(name).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(found), "{error}");
        }
    }
}
