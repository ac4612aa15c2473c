//! Runs the real `nibble` binary as a user would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A command line of texts and paths.
#[macro_export]
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        [$(::std::ffi::OsStr::new(&$argument).to_owned()),*]
    };
}

/// The release binary: `NIBBLE_BIN`, or the one in the target directory this test was built into.
///
/// # Panics
/// When it was not built.
pub fn binary() -> PathBuf {
    let beside_tests = || {
        let test = std::env::current_exe().expect("a test knows its own path");
        let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
        profile.join("nibble")
    };
    let binary = std::env::var_os("NIBBLE_BIN").map_or_else(beside_tests, PathBuf::from);
    assert!(binary.exists(), "{} is not there; build it: cargo build --release", binary.display());
    binary
}

/// Runs `nibble` with `arguments` and returns what it did.
///
/// # Panics
/// When it cannot be started.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Output {
    Command::new(binary()).args(arguments).output().expect("the binary starts")
}

/// Runs `nibble`, which must succeed, and parses the JSON it prints.
///
/// # Panics
/// When it fails or prints something else.
pub fn json<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Value {
    let output = run(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nibble failed: {errors}");
    serde_json::from_slice(&output.stdout).expect("nibble prints JSON")
}

/// Runs `nibble`, which must refuse, and returns the one line it says.
///
/// # Panics
/// When it succeeds, panics or says more than one line.
pub fn refusal<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> String {
    let output = run(arguments);
    let errors = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(output.status.code(), Some(1), "expected a refusal, got: {errors}");
    let mut lines = errors.lines().filter(|line| line.starts_with("error: "));
    let line = lines.next().unwrap_or_else(|| panic!("no error line in: {errors}")).to_owned();
    assert!(lines.next().is_none(), "more than one error: {errors}");
    line
}
