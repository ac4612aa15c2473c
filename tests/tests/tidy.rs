//! The house checking itself: what ARCHITECTURE.md promises and no compiler sees.
//!
//! A list of exceptions fails when an entry is no longer needed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use nibble_tests::real_model::workspace;

/// The most lines of a file one sitting can read.
const MOST_LINES: usize = 500;

/// The only files that may contain `unsafe`: SIMD, the thread pool, disjoint output slices, calls of NVIDIA's libraries
/// and of emulated kernels, mapped files.
const UNSAFE_FILES: &[&str] = &[
    "kernels/emulator/src/library.rs",
    "kernels/emulator/src/memory.rs",
    "kernels/src/device/cpu/aligned.rs",
    "kernels/src/device/cpu/cache.rs",
    "kernels/src/device/cpu/integer_product.rs",
    "kernels/src/device/cpu/integer_rows.rs",
    "kernels/src/device/cpu/integer_tiles.rs",
    "kernels/src/device/cpu/matrix.rs",
    "kernels/src/device/cpu/mod.rs",
    "kernels/src/device/cpu/panel_product.rs",
    "kernels/src/device/cpu/peak.rs",
    "kernels/src/device/cpu/quantized_codes.rs",
    "kernels/src/device/cpu/quantized_panels.rs",
    "kernels/src/device/cpu/simd/avx2.rs",
    "kernels/src/device/cpu/simd/avx512.rs",
    "kernels/src/device/cpu/simd/mod.rs",
    "kernels/src/device/cpu/simd/portable.rs",
    "kernels/src/device/cpu/thread_pool.rs",
    "kernels/src/device/cpu/tile.rs",
    "kernels/src/device/cpu/tile_shapes.rs",
    "kernels/src/device/cuda/card.rs",
    "kernels/src/device/cuda/compiler.rs",
    "kernels/src/ops/dense_matmul/cpu.rs",
    "kernels/src/ops/paged_attention/cpu.rs",
    "kernels/src/ops/paged_attention/cpu/products.rs",
    "kernels/src/ops/paged_attention/cpu/softmax.rs",
    "kernels/src/ops/paged_attention/cpu/tiles.rs",
    "kernels/src/ops/rms_norm/cpu.rs",
    "kernels/src/ops/rotary_embedding/cpu.rs",
    "kernels/src/ops/silu_mul/cpu.rs",
    "kernels/src/ops/w4a16_matmul/cpu.rs",
    "model/src/mapped_file.rs",
];

/// Which crates of the house a crate may use outside its tests.
const IMPORTS: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("kernels/emulator", &["nibble-kernels"]),
    ("model", &["nibble-kernels"]),
    ("quantizer", &["nibble-kernels", "nibble-model"]),
    ("server/engine", &["nibble-kernels", "nibble-model"]),
    ("server", &["nibble-engine", "nibble-model"]),
    ("cli", &["nibble-engine", "nibble-kernels", "nibble-model", "nibble-quantizer", "nibble-server"]),
    ("tests", &[]),
];

/// Every file that git tracks, or would.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(workspace())
        .output()
        .expect("git is there");
    assert!(output.status.success(), "git ls-files failed");
    let listing = String::from_utf8(output.stdout).expect("paths are UTF-8");
    listing.lines().map(PathBuf::from).filter(|path| workspace().join(path).is_file()).collect()
}

/// The Rust files and their text.
fn sources() -> Vec<(String, String)> {
    let rust = files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let sources: Vec<_> = rust.map(|path| (path.display().to_string(), read(&path))).collect();
    assert!(sources.len() > 50, "the sources are found");
    sources
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(workspace().join(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn is_test(path: &str) -> bool {
    path.ends_with("tests.rs")
        || path.ends_with("simulation.rs")
        || path.contains("/tests/")
        || path.contains("/examples/")
}

#[test]
fn every_file_says_at_its_head_what_it_holds() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!") || path.ends_with("tests.rs"), "{path} does not begin with //!");
    }
}

#[test]
fn no_file_is_longer_than_one_sitting_can_read() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= MOST_LINES, "{path} has {lines} lines; is there a second room in it?");
    }
}

#[test]
fn unsafe_lives_in_the_listed_files_only() {
    let marker = "unsafe ";
    let found: BTreeSet<String> = sources()
        .into_iter()
        .filter(|(path, text)| {
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            !path.ends_with("tidy.rs") && code.into_iter().any(|line| line.contains(marker))
        })
        .map(|(path, _)| path)
        .collect();
    let listed: BTreeSet<String> = UNSAFE_FILES.iter().map(|path| (*path).to_owned()).collect();
    assert_eq!(found, listed, "left: files with unsafe, right: files listed");
}

#[test]
fn nothing_is_left_unfinished_or_silenced() {
    for (path, text) in sources().into_iter().filter(|(path, _)| !path.ends_with("tidy.rs")) {
        for word in ["todo!(", "unimplemented!(", "FIXME", "#[ignore", "dbg!("] {
            assert!(!text.contains(word), "{path} contains {word}");
        }
        // What several test programs share, each of them uses in part.
        assert!(is_test(&path) || !text.contains("allow(dead_code"), "{path} silences dead code");
    }
}

#[test]
fn crates_import_in_one_direction() {
    for (package, allowed) in IMPORTS {
        let manifest = read(&Path::new(package).join("Cargo.toml"));
        let dependencies = manifest.split("[dependencies]").nth(1).expect("a list of dependencies");
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        let used: BTreeSet<&str> = dependencies
            .lines()
            .filter_map(|line| line.split(['.', ' ']).next())
            .filter(|name| name.starts_with("nibble-"))
            .collect();
        assert_eq!(used, allowed.iter().copied().collect(), "{package}: left: used, right: allowed");
    }
    let members = read(Path::new("Cargo.toml"));
    let members = members.split("members = [").nth(1).and_then(|rest| rest.split(']').next());
    assert_eq!(
        members.map(|list| list.split(',').count()),
        Some(IMPORTS.len()),
        "every member is listed here"
    );
}

#[test]
fn libraries_print_nothing_and_read_no_environment() {
    let below_cli =
        sources().into_iter().filter(|(path, _)| !path.starts_with("cli/") && !path.starts_with("tests/"));
    for (path, text) in below_cli.filter(|(path, _)| !is_test(path)) {
        for word in ["println!", "env::var", "thread_local!", "process::exit"] {
            assert!(!text.contains(word), "{path} contains {word}");
        }
    }
}

#[test]
fn every_script_and_every_document_that_is_named_is_there() {
    let documents =
        files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    for document in documents {
        let text = read(&document);
        let directory = document.parent().unwrap_or(Path::new(""));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let external = link.is_empty() || link.contains("://");
            let target = workspace().join(directory).join(link);
            assert!(external || target.exists(), "{} links to {link}", document.display());
        }
        for script in text.split("scripts/").skip(1) {
            let name: String =
                script.chars().take_while(|c| c.is_alphanumeric() || "-_.".contains(*c)).collect();
            let name = name.trim_end_matches('.');
            let target = workspace().join("scripts").join(name);
            assert!(target.exists(), "{} names scripts/{name}", document.display());
        }
    }
}
