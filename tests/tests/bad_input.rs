//! Damaged and contradictory files: one clear sentence that names file and item, no panic, no output left.

use std::path::Path;

use nibble_tests::real_model::workspace;
use nibble_tests::tiny_model::{TinyModel, VOCABULARY};
use nibble_tests::{arguments, nibble};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// A tokenizer of `words` words, each of which is one token.
fn tokenizer(words: usize) -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        (0..words).map(|id| (format!("w{id}"), json!(id))).collect();
    json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    })
}

fn write_whole(directory: &Path) {
    TinyModel::named("llama").write(directory);
    std::fs::write(directory.join("tokenizer.json"), tokenizer(VOCABULARY).to_string()).expect("written");
}

fn edit_config(directory: &Path, edit: impl FnOnce(&mut Value)) {
    let file = directory.join("config.json");
    let text = std::fs::read_to_string(&file).expect("config.json");
    let mut config = serde_json::from_str(&text).expect("valid JSON");
    edit(&mut config);
    std::fs::write(&file, config.to_string()).expect("written");
}

/// Rewrites the weights, each tensor as `edit` says: its new element type and shape, or `None` to leave it out.
fn edit_weights(directory: &Path, edit: impl Fn(&str, Dtype, Vec<usize>) -> Option<(Dtype, Vec<usize>)>) {
    let file = directory.join("model.safetensors");
    let bytes = std::fs::read(&file).expect("model.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("valid weights");
    let views = tensors.tensors().into_iter().filter_map(|(name, view)| {
        let (dtype, shape) = edit(&name, view.dtype(), view.shape().to_vec())?;
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        Some((name, TensorView::new(dtype, shape, &view.data()[..bytes]).expect("sizes agree")))
    });
    std::fs::write(&file, safetensors::serialize(views, None).expect("serialized")).expect("written");
}

type Damage = fn(&Path);

/// What is done to a whole model, and what the sentence about it must name.
const CASES: &[(&str, Damage, &[&str])] = &[
    ("config of an unknown architecture", unknown_architecture, &["config.json", "GPT2LMHeadModel"]),
    ("config cut off", config_cut_off, &["config.json", "not valid JSON"]),
    ("config without a field", config_without_field, &["config.json", "hidden_size", "missing"]),
    ("config with a wrong type", config_with_text, &["config.json", "num_hidden_layers", "\"two\""]),
    ("config of more layers than there are", config_of_more_layers, &["model.layers.2.", "missing"]),
    ("weights cut off", weights_cut_off, &["model.safetensors", "cut off"]),
    ("weights that are not weights", weights_of_text, &["model.safetensors", "header"]),
    ("weights of an unusable type", weights_of_integers, &["model.layers.1.mlp.up_proj.weight", "I32"]),
    (
        "a tensor of another shape",
        tensor_of_other_shape,
        &["model.layers.0.self_attn.o_proj.weight", "[48, 32]"],
    ),
    ("a tensor missing", tensor_missing, &["model.norm.weight", "missing"]),
    ("no weights", no_weights, &["model.safetensors"]),
    ("no tokenizer", no_tokenizer, &["tokenizer.json"]),
    ("a tokenizer cut off", tokenizer_cut_off, &["tokenizer.json"]),
    ("a tokenizer of another model", tokenizer_of_other_model, &["tokenizer.json", "w90", "vocab_size 90"]),
];

fn unknown_architecture(directory: &Path) {
    edit_config(directory, |config| config["architectures"] = json!(["GPT2LMHeadModel"]));
}

fn config_cut_off(directory: &Path) {
    cut(&directory.join("config.json"), 100);
}

fn config_without_field(directory: &Path) {
    edit_config(directory, |config| drop(config.as_object_mut().expect("an object").remove("hidden_size")));
}

fn config_with_text(directory: &Path) {
    edit_config(directory, |config| config["num_hidden_layers"] = json!("two"));
}

fn config_of_more_layers(directory: &Path) {
    edit_config(directory, |config| config["num_hidden_layers"] = json!(3));
}

fn weights_cut_off(directory: &Path) {
    let file = directory.join("model.safetensors");
    let length = std::fs::metadata(&file).expect("weights").len();
    cut(&file, length - 1);
}

fn weights_of_text(directory: &Path) {
    std::fs::write(directory.join("model.safetensors"), "<html>404</html>").expect("written");
}

fn weights_of_integers(directory: &Path) {
    edit_weights(directory, |name, dtype, shape| {
        Some((if name.ends_with("1.mlp.up_proj.weight") { Dtype::I32 } else { dtype }, shape))
    });
}

fn tensor_of_other_shape(directory: &Path) {
    edit_weights(directory, |name, dtype, shape| {
        Some((dtype, if name.ends_with("0.self_attn.o_proj.weight") { vec![48, 32] } else { shape }))
    });
}

fn tensor_missing(directory: &Path) {
    edit_weights(directory, |name, dtype, shape| (name != "model.norm.weight").then_some((dtype, shape)));
}

fn no_weights(directory: &Path) {
    std::fs::remove_file(directory.join("model.safetensors")).expect("removed");
}

fn no_tokenizer(directory: &Path) {
    std::fs::remove_file(directory.join("tokenizer.json")).expect("removed");
}

fn tokenizer_cut_off(directory: &Path) {
    cut(&directory.join("tokenizer.json"), 200);
}

fn tokenizer_of_other_model(directory: &Path) {
    let file = directory.join("tokenizer.json");
    std::fs::write(file, tokenizer(VOCABULARY + 1).to_string()).expect("written");
}

fn cut(file: &Path, bytes: u64) {
    let file = std::fs::File::options().write(true).open(file).expect("the file is there");
    file.set_len(bytes).expect("cut");
}

#[test]
fn every_command_refuses_a_damaged_model_with_one_sentence_that_names_what_is_wrong() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "w1 w2 w3 ".repeat(100)).expect("written");
    for (index, (what, damage, names)) in CASES.iter().enumerate() {
        let model = directory.path().join(index.to_string());
        std::fs::create_dir(&model).expect("created");
        write_whole(&model);
        damage(&model);
        let out = directory.path().join("out");
        for command in [
            &arguments!["eval", model, "--text", text, "--window", "16"][..],
            &arguments!["generate", model, "--prompt", "w1", "--max-tokens", "2"],
            &arguments!["serve", model, "--port", "0"],
            &arguments![
                "quantize",
                model,
                out,
                "--group-size",
                "16",
                "--calibration",
                text,
                "--sequence-length",
                "64"
            ],
        ] {
            let message = nibble::refusal(command);
            for name in *names {
                assert!(message.contains(name), "{what}: {command:?} says: {message}");
            }
        }
        let left =
            std::fs::read_dir(directory.path()).expect("readable").map(|entry| entry.expect("readable"));
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("out")), "{what}: {left:?}");
    }
}

#[test]
fn the_undamaged_model_is_taken() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_whole(directory.path());
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "w1 w2 w3 ".repeat(100)).expect("written");
    let report =
        nibble::json(&arguments!["eval", directory.path(), "--text", text, "--window", "16", "--json"]);
    assert_eq!(report["predicted_tokens"], 18 * 15);
}

/// A model in `directory` and what `nibble quantize` says and does with these calibration files.
fn quantize(directory: &Path, method: &str, files: &[&Path]) -> std::process::Output {
    let (model, out) = (directory.join("model"), directory.join("out"));
    if !model.exists() {
        std::fs::create_dir(&model).expect("created");
        write_whole(&model);
    }
    let mut command = arguments![
        "quantize",
        model,
        out,
        "--method",
        method,
        "--group-size",
        "16",
        "--sequence-length",
        "64"
    ]
    .to_vec();
    command.extend(files.iter().flat_map(|file| arguments!["--calibration", file]));
    nibble::run(&command)
}

#[test]
fn calibration_files_that_cannot_be_used_are_refused_with_one_sentence_and_leave_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut parquet =
        std::fs::read(workspace().join("quantizer/tests/golden/documents.parquet")).expect("there");
    // The decoder of Parquet panics at this one.
    parquet[2625] ^= 1;
    for (name, contents, says) in [
        ("empty.jsonl", &b""[..], "no documents"),
        ("broken.jsonl", b"\"w1\"\n{\"text\": w1}\n", "line 2, column 10"),
        ("latin.json", b"\"w1 \xe9\"", "byte 4 is not UTF-8"),
        ("other.jsonl", b"{\"body\": \"w1\"}\n", "line 1: none of the known fields, it has \"body\""),
        ("short.txt", b"w1 w2", "2 tokens, fewer than one sequence of 64"),
        ("text.parquet", b"w1 w2", "cannot be read as Parquet"),
        ("damaged.parquet", &parquet, "it is damaged"),
    ] {
        let file = directory.path().join(name);
        std::fs::write(&file, contents).expect("written");
        let output = quantize(directory.path(), "rtn", &[&file]);
        let message = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(1), "{name}: {message}");
        assert!(
            message.lines().count() == 1 && message.contains(name) && message.contains(says),
            "{message}"
        );
        assert!(!directory.path().join("out").exists(), "{name}");
    }
}

#[test]
fn documents_of_several_files_calibrate_and_those_skipped_are_named() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("some.jsonl");
    let chat =
        json!({"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]});
    std::fs::write(&file, format!("{chat}\n{{\"text\": \"\"}}\n\"w4 w5\"\n")).expect("written");
    let golden = workspace().join("quantizer/tests/golden/documents.parquet");
    let output = quantize(directory.path(), "gptq", &[&file, &golden]);
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(output.status.success(), "{message}");
    assert!(message.contains("4 calibration samples are skipped"), "{message}");
    assert!(message.contains("some.jsonl line 2: empty; "), "{message}");
    assert!(message.contains("documents.parquet row 5: none of the known fields"), "{message}");
    assert!(message.contains("fewer sequences than asked for"), "{message}");
}
