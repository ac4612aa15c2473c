//! A run of `nibble quantize` that is killed again and again writes what one that was left alone writes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nibble_tests::tiny_model::{TinyModel, VOCABULARY};
use nibble_tests::{arguments, nibble};
use serde_json::json;

/// A model with a tokenizer of one token for each word, and a text.
fn write_inputs(directory: &Path) {
    std::fs::create_dir(directory.join("model")).expect("created");
    TinyModel::named("qwen2").write(&directory.join("model"));
    let vocabulary: BTreeMap<String, usize> = (0..VOCABULARY).map(|id| (format!("w{id}"), id)).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    std::fs::write(directory.join("model/tokenizer.json"), tokenizer.to_string()).expect("written");
    let words: Vec<String> = (0..40_000).map(|word| format!("w{}", word * word % VOCABULARY)).collect();
    std::fs::write(directory.join("text"), words.join(" ")).expect("written");
}

fn quantize(directory: &Path, out: &str, more: &[&str]) -> Vec<OsString> {
    let (model, text) = (directory.join("model"), directory.join("text"));
    let mut arguments = arguments![
        "quantize",
        model,
        directory.join(out),
        "--calibration",
        text,
        "--group-size",
        "16",
        "--samples",
        "200",
        "--sequence-length",
        "128",
        "--journal-interval",
        "0",
        "--json",
    ]
    .to_vec();
    arguments.extend(more.iter().map(OsString::from));
    arguments
}

/// The files of a checkpoint but for those that say when and by which command it was written.
fn files(directory: &Path) -> BTreeMap<OsString, Vec<u8>> {
    const OF_THE_RUN: [&str; 3] = ["nibble_report.json", "nibble_report.html", "README.md"];
    let entries = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    let files = entries.filter(|entry| !OF_THE_RUN.iter().any(|name| entry.file_name() == *name));
    files.map(|entry| (entry.file_name(), std::fs::read(entry.path()).expect("a file"))).collect()
}

/// Starts `nibble` and kills it as soon as `path` is there; false if it has ended before that was seen.
fn killed_at(arguments: &[OsString], path: &Path) -> bool {
    let mut child = Command::new(nibble::binary())
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let started = Instant::now();
    while !path.exists() {
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{} never came", path.display());
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().expect("killed");
    child.wait().expect("dead");
    true
}

fn kill_at(arguments: &[OsString], path: &Path) {
    assert!(killed_at(arguments, path), "it ended before {} was there", path.display());
}

#[test]
fn a_run_that_is_killed_again_and_again_writes_the_same_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    write_inputs(directory);
    let whole = nibble::json(&quantize(directory, "whole", &[]));
    assert_eq!(whole["resumed_layers"], 0);

    let journal = directory.join("killed.resume");
    let resumed = quantize(directory, "killed", &["--resume"]);
    for place in ["journal.json", "layer-00000", "states-00000"] {
        kill_at(&resumed, &journal.join(place));
        assert!(!directory.join("killed").exists());
    }
    let forgotten = nibble::refusal(&quantize(directory, "killed", &[]));
    assert!(forgotten.contains("killed.resume") && forgotten.contains("--resume"), "{forgotten}");
    let other = nibble::refusal(&quantize(directory, "killed", &["--resume", "--bits", "8"]));
    assert!(other.contains("settings"), "{other}");

    // Behind the last layer only the output is left to be put together: a short time, which may be missed.
    let late = quantize(directory, "late", &["--resume"]);
    let last_states = directory.join("late.resume/states-00001");
    let missed = |_: &usize| !killed_at(&late, &last_states) || directory.join("late").exists();
    let tries = (0..20).take_while(missed).inspect(|_| {
        std::fs::remove_dir_all(directory.join("late")).expect("removed");
    });
    assert!(tries.count() < 20, "it was never caught behind its last layer");
    assert_eq!(nibble::json(&late)["resumed_layers"], 2);
    assert!(files(&directory.join("late")) == files(&directory.join("whole")));

    let report = nibble::json(&resumed);
    assert_eq!(report["resumed_layers"], 1);
    assert_eq!(report["layers"], whole["layers"]);
    assert_eq!(report["bits_per_weight"], whole["bits_per_weight"]);
    assert!(files(&directory.join("killed")) == files(&directory.join("whole")));
    assert!(!journal.exists());
    let spilled = quantize(directory, "spilled", &["--memory-limit", "1KB"]);
    nibble::json(&spilled);
    assert!(files(&directory.join("spilled")) == files(&directory.join("whole")));
    let names = std::fs::read_dir(directory).expect("a directory").count();
    assert_eq!(names, 6, "model, text and four checkpoints, nothing else");
}

#[test]
fn a_run_that_is_killed_at_its_output_head_writes_the_same_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    write_inputs(directory);
    let head =
        ["--quantize-lm-head", "--override", "lm_head=bits:8", "--format", "compressed-tensors", "--resume"];
    let whole = nibble::json(&quantize(directory, "whole", &head));
    let last = whole["layers"].as_array().and_then(|layers| layers.last()).expect("matrices");
    assert_eq!((&last["name"], &last["bits"]), (&json!("lm_head"), &json!(8)));

    let journal = directory.join("killed.resume");
    let resumed = quantize(directory, "killed", &head);
    for place in ["states-00001", "layer-00002"] {
        kill_at(&resumed, &journal.join(place));
        assert!(!directory.join("killed").exists());
    }
    let report = nibble::json(&resumed);
    assert_eq!(report["resumed_layers"], 2);
    assert_eq!(report["layers"], whole["layers"]);
    assert!(files(&directory.join("killed")) == files(&directory.join("whole")));
}
