//! The real small models the end-to-end tests run: fetched once by `scripts/fetch-model`, cached in `.cache/`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{arguments, nibble};

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The GGUF file of the test model `name`, fetched if it is not there yet.
///
/// # Panics
/// When it cannot be fetched.
pub fn gguf(name: &str) -> PathBuf {
    let output = Command::new(workspace().join("scripts/fetch-model"))
        .arg(name)
        .stderr(Stdio::inherit())
        .output()
        .expect("scripts/fetch-model starts");
    assert!(output.status.success(), "scripts/fetch-model {name} failed");
    let path = String::from_utf8(output.stdout).expect("a path is UTF-8");
    workspace().join(path.trim_end())
}

/// Imports the test model `name` as F16 into a new directory under `directory`.
///
/// # Panics
/// When the import fails.
pub fn import(name: &str, directory: &Path) -> PathBuf {
    let out = directory.join(format!("{name}-f16"));
    let output = nibble::run(&arguments!["import", gguf(name), out]);
    assert!(output.status.success(), "import failed: {}", String::from_utf8_lossy(&output.stderr));
    out
}
