//! GGUF files in, Hugging Face directories out: what is written, and what is refused without writing anything.

mod common;

use std::path::Path;

use common::tiny_model::{self, HEAD_DIM, HIDDEN, LAYERS};
use common::{Gguf, Value};
use nibble_kernels::tensor::FloatType;
use nibble_model::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES};
use nibble_model::config::{Architecture, RopeScaling};
use nibble_model::import::{ImportOptions, ImportSummary, import};
use nibble_model::tokenizer::Tokenizer;
use proptest::prelude::*;
use safetensors::Dtype;
use tempfile::TempDir;

const OPTIONS: ImportOptions =
    ImportOptions { float_type: FloatType::F32, max_shard_bytes: DEFAULT_SHARD_BYTES };

/// Imports `gguf` in a directory of its own.
fn import_with(gguf: &Gguf, options: ImportOptions) -> (TempDir, Result<ImportSummary, String>) {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.gguf");
    gguf.write(&source);
    let result = import(&source, &directory.path().join("out"), options, &mut |_| {});
    (directory, result.map_err(|error| error.to_string()))
}

/// Imports `gguf` and opens what was written.
fn imported(gguf: &Gguf) -> (TempDir, Checkpoint) {
    let (directory, summary) = import_with(gguf, OPTIONS);
    let checkpoint = Checkpoint::open(&directory.path().join("out")).unwrap();
    assert_eq!(*checkpoint.config(), summary.unwrap().config, "config.json says what was read");
    (directory, checkpoint)
}

/// The first element of `blk.0.{name}`, as the tiny model numbers them.
fn first(gguf: &Gguf, name: &str) -> f32 {
    let data = &gguf.tensors.iter().find(|tensor| tensor.name == name).unwrap().data;
    f32::from_le_bytes(data[..4].try_into().unwrap())
}

/// The rows of `[2 * HEAD_DIM, width]` elements counted from `first`, in this order.
fn rows(first: f32, width: usize, order: &[usize]) -> Vec<f32> {
    order.iter().flat_map(|row| (0..width).map(move |i| first + (row * width + i) as f32)).collect()
}

#[test]
fn a_llama_model_is_written_whole_and_its_rotary_rows_are_put_back() {
    let gguf = tiny_model::model("llama");
    let (directory, checkpoint) = imported(&gguf);
    let config = checkpoint.config();
    assert_eq!(config.architecture, Architecture::Llama);
    assert!(config.tie_word_embeddings && !config.attention_bias);
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[0][..], None));
    let order = [0, 2, 1, 3, 4, 6, 5, 7];
    let queries = checkpoint.dense("model.layers.0.self_attn.q_proj.weight", 2 * HEAD_DIM, HIDDEN).unwrap();
    let expected = rows(first(&gguf, "blk.0.attn_q.weight"), HIDDEN, &order);
    assert_eq!(queries.values().to_f32(), expected);
    let values = checkpoint.dense("model.layers.0.self_attn.v_proj.weight", HEAD_DIM, HIDDEN).unwrap();
    assert_eq!(values.values().to_f32(), rows(first(&gguf, "blk.0.attn_v.weight"), HIDDEN, &[0, 1, 2, 3]));
    assert_eq!(checkpoint.tensors().count(), 2 + 9 * LAYERS);
    let mut names: Vec<_> = std::fs::read_dir(directory.path().join("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    let tokenizer = Tokenizer::open(checkpoint.path(), config).unwrap();
    assert_eq!(tokenizer.encode("ab<tool> b<|end|>", true).unwrap(), [3, 5, 4, 2, 0]);
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(checkpoint.path().join(name)).unwrap()).unwrap()
    };
    let tokenizer_config = json("tokenizer_config.json");
    assert_eq!(tokenizer_config["chat_template"], "{{ messages }}");
    assert_eq!(tokenizer_config["eos_token"], "<|end|>");
    assert_eq!(tokenizer_config["added_tokens_decoder"]["0"]["special"], true);
    assert_eq!(tokenizer_config["added_tokens_decoder"]["5"]["special"], false);
    assert_eq!(json("config.json")["rms_norm_eps"], 1e-6);
}

#[test]
fn biases_of_a_llama_model_are_put_back_like_its_rows() {
    let mut gguf = tiny_model::model("llama");
    for layer in 0..LAYERS {
        let numbers = |count: usize| (0..count).map(|i| i as f32).collect::<Vec<_>>();
        for (name, size) in [("q", 2 * HEAD_DIM), ("k", HEAD_DIM), ("v", HEAD_DIM), ("output", HIDDEN)] {
            gguf.floats(&format!("blk.{layer}.attn_{name}.bias"), &[size], &numbers(size));
        }
    }
    let (_directory, checkpoint) = imported(&gguf);
    assert!(checkpoint.config().attention_bias && checkpoint.config().attention_output_bias);
    let bias = |name: &str, size| {
        checkpoint.vector(&format!("model.layers.1.self_attn.{name}_proj.bias"), size).unwrap()
    };
    assert_eq!(bias("q", 8), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(bias("k", 4), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(bias("v", 4), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn qwen_models_keep_their_rows_and_have_biases_or_norms() {
    let gguf = tiny_model::model("qwen2");
    let (_directory, checkpoint) = imported(&gguf);
    assert_eq!(checkpoint.config().architecture, Architecture::Qwen2);
    let queries = checkpoint.dense("model.layers.0.self_attn.q_proj.weight", 2 * HEAD_DIM, HIDDEN).unwrap();
    let in_order: Vec<usize> = (0..8).collect();
    let expected = rows(first(&gguf, "blk.0.attn_q.weight"), HIDDEN, &in_order);
    assert_eq!(queries.values().to_f32(), expected);
    let bias = checkpoint.vector("model.layers.0.self_attn.q_proj.bias", 8).unwrap();
    assert_eq!(bias, rows(first(&gguf, "blk.0.attn_q.bias"), 1, &in_order));

    let mut gguf = tiny_model::model("qwen3");
    gguf.floats("output.weight", &[6, HIDDEN], &[0.5; 6 * HIDDEN]);
    let (_directory, checkpoint) = imported(&gguf);
    assert_eq!(checkpoint.config().architecture, Architecture::Qwen3);
    assert!(!checkpoint.config().tie_word_embeddings);
    let norm = checkpoint.vector("model.layers.1.self_attn.k_norm.weight", HEAD_DIM).unwrap();
    assert_eq!(norm, rows(first(&gguf, "blk.1.attn_k_norm.weight"), 1, &[0, 1, 2, 3]));
}

#[test]
fn scalings_of_the_rotary_embedding_are_read() {
    let mut gguf = tiny_model::model("llama");
    gguf.set("llama.rope.scaling.type", "linear".into());
    gguf.set("llama.rope.scaling.factor", Value::F32(4.0));
    assert_eq!(imported(&gguf).1.config().rope.scaling, RopeScaling::Linear { factor: 4.0 });

    let mut gguf = tiny_model::model("llama");
    gguf.floats("rope_freqs.weight", &[HEAD_DIM / 2], &[1.0, 2.0]);
    let expected = "tensor \"rope_freqs.weight\" is a scaling of unknown form";
    assert!(import_with(&gguf, OPTIONS).1.unwrap_err().contains(expected));
}

#[test]
fn element_type_and_shard_size_are_as_asked_for() {
    let options = ImportOptions { float_type: FloatType::BF16, max_shard_bytes: 200 };
    let (directory, summary) = import_with(&tiny_model::model("llama"), options);
    let checkpoint = Checkpoint::open(&directory.path().join("out")).unwrap();
    assert!(checkpoint.tensors().all(|tensor| tensor.dtype == Dtype::BF16));
    assert!(directory.path().join("out/model.safetensors.index.json").exists());
    assert_eq!(checkpoint.config().float_type, FloatType::BF16);
    let bytes: usize = checkpoint.tensors().map(|tensor| tensor.data.len()).sum();
    assert_eq!(summary.unwrap().bytes, bytes as u64);
}

#[test]
fn a_value_beyond_f16_is_refused_with_the_tensor_and_the_way_out() {
    let mut gguf = tiny_model::model("llama");
    gguf.tensor("blk.1.ffn_up.weight").data[8..12].copy_from_slice(&70_000f32.to_le_bytes());
    let f16 = ImportOptions { float_type: FloatType::F16, ..OPTIONS };
    let (directory, result) = import_with(&gguf, f16);
    let error = result.unwrap_err();
    assert!(error.contains("tensor \"blk.1.ffn_up.weight\" is holding 70000"), "{error}");
    assert!(error.contains("--dtype bf16"), "{error}");
    assert_only_the_source_is_in(directory.path());
    gguf.tensor("blk.1.ffn_up.weight").data[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(import_with(&gguf, f16).1.unwrap_err().contains("damaged"));
}

fn assert_only_the_source_is_in(directory: &Path) {
    let names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["model.gguf"]);
}

/// A change to a good file, and what the error must say.
type Damage = (fn(&mut Gguf), &'static [&'static str]);

const DAMAGES: [Damage; 20] = [
    (|gguf| gguf.set("general.architecture", "gemma3".into()), &["general.architecture", "gemma3", "qwen2"]),
    (|gguf| gguf.remove("general.architecture"), &["general.architecture", "missing"]),
    (|gguf| gguf.set("llama.expert_count", Value::U32(8)), &["llama.expert_count", "8"]),
    (|gguf| gguf.set("split.count", Value::U32(3)), &["split.count", "llama-gguf-split --merge"]),
    (|gguf| gguf.set("llama.block_count", Value::U32(u32::MAX)), &["blk.2.attn_norm.weight", "missing"]),
    (|gguf| gguf.set("llama.block_count", Value::U32(1)), &["blk.1.", "does not have"]),
    (|gguf| gguf.remove("llama.embedding_length"), &["llama.embedding_length", "missing"]),
    (|gguf| gguf.set("llama.attention.head_count", "two".into()), &["llama.attention.head_count", "\"two\""]),
    (
        |gguf| gguf.set("llama.attention.head_count_kv", Value::U32(0)),
        &["llama.attention.head_count_kv", "0"],
    ),
    (|gguf| gguf.set("llama.rope.scaling.type", "yarn".into()), &["llama.rope.scaling.type", "yarn"]),
    (
        |gguf| gguf.tensors.retain(|t| t.name != "blk.1.ffn_down.weight"),
        &["blk.1.ffn_down.weight", "missing"],
    ),
    (|gguf| gguf.tensors.retain(|t| t.name != "token_embd.weight"), &["token_embd.weight", "missing"]),
    (
        |gguf| gguf.tensor("blk.0.attn_k.weight").shape = vec![8, 4],
        &["blk.0.attn_k.weight", "[8, 4]", "[4, 8]"],
    ),
    (|gguf| gguf.tensor("blk.0.attn_k.weight").kind = 26, &["blk.0.attn_k.weight", "I32", "Q4_K"]),
    (
        |gguf| gguf.set("tokenizer.ggml.tokens", Value::Strings(vec!["a".to_owned(); 5])),
        &["tokenizer.ggml.tokens", "array of 5", "6 rows"],
    ),
    (
        |gguf| gguf.set("tokenizer.ggml.tokens", Value::Strings(vec!["a".to_owned(); 6])),
        &["tokenizer.ggml.tokens", "\"a\" twice"],
    ),
    (|gguf| gguf.set("tokenizer.ggml.model", "bert".into()), &["tokenizer.ggml.model", "bert", "gpt2"]),
    (
        |gguf| gguf.set("tokenizer.ggml.pre", "poro-chat".into()),
        &["tokenizer.ggml.pre", "poro-chat", "smollm"],
    ),
    (
        |gguf| gguf.set("tokenizer.ggml.eos_token_id", Value::U32(6)),
        &["tokenizer.ggml.eos_token_id", "below"],
    ),
    (
        |gguf| gguf.set("tokenizer.ggml.merges", Value::Strings(vec!["a a".to_owned()])),
        &["tokenizer.ggml.merges", "\"a\" and \"a\""],
    ),
];

#[test]
fn every_contradiction_is_one_error_with_its_name_and_nothing_is_written() {
    for (number, (damage, named)) in DAMAGES.iter().enumerate() {
        let mut gguf = tiny_model::model("llama");
        damage(&mut gguf);
        let (directory, result) = import_with(&gguf, OPTIONS);
        let error = result.expect_err(&format!("damage {number}"));
        for part in named.iter().chain([&"model.gguf"]) {
            assert!(error.contains(part), "damage {number}: {part} is not in: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
        assert_only_the_source_is_in(directory.path());
    }
}

#[test]
fn a_file_cut_off_anywhere_gives_an_error_and_no_directory() {
    let bytes = tiny_model::model("qwen3").bytes();
    for tenth in 0..10 {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("model.gguf");
        std::fs::write(&source, &bytes[..bytes.len() * tenth / 10]).unwrap();
        let error = import(&source, &directory.path().join("out"), OPTIONS, &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("model.gguf"), "{error}");
        assert_only_the_source_is_in(directory.path());
    }
}

#[test]
fn an_output_that_exists_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("model.gguf"), directory.path().join("out"));
    tiny_model::model("llama").write(&source);
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "kept").unwrap();
    let error = import(&source, &out, OPTIONS, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("out") && error.contains("there already"), "{error}");
    assert_eq!(std::fs::read(out.join("precious")).unwrap(), b"kept");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn damaged_files_are_imported_or_refused_but_never_panic_or_leave_a_part(
        architecture in prop::sample::select(vec!["llama", "qwen2", "qwen3"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = tiny_model::model(architecture).bytes();
        // The header is where most can go wrong: damage it, not the elements.
        let header = bytes.len() - bytes.len() / 2;
        for (index, value) in changes {
            bytes[index.index(header)] = value;
        }
        let directory = tempfile::tempdir().unwrap();
        let (source, out) = (directory.path().join("model.gguf"), directory.path().join("out"));
        std::fs::write(&source, bytes).unwrap();
        match import(&source, &out, OPTIONS, &mut |_| {}) {
            Ok(_) => prop_assert!(out.join("config.json").exists()),
            Err(_) => assert_only_the_source_is_in(directory.path()),
        }
    }
}
