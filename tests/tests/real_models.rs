//! The main job on real models: import, evaluate, quantize, generate, held against Hugging Face transformers
//! (tests/golden/real_models.py).

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::{Checkpoint, LinearWeight};
use nibble_model::forward::{BLOCK_SIZE, Batch, LinearRole, LinearSpec, Model, SequenceRows};
use nibble_model::tokenizer::Tokenizer;
use nibble_tests::real_model::{import, workspace};
use nibble_tests::{arguments, nibble, real_model};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Golden {
    question: String,
    models: Vec<GoldenModel>,
}

#[derive(Deserialize)]
struct GoldenModel {
    name: String,
    tokens: Vec<u32>,
    rows: Vec<GoldenRow>,
    perplexity: GoldenPerplexity,
    answer: GoldenAnswer,
}

#[derive(Deserialize)]
struct GoldenRow {
    row: usize,
    top_ids: Vec<usize>,
    top_logits: Vec<f32>,
    every_997th: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenPerplexity {
    window: usize,
    predicted_tokens: usize,
    value: f64,
}

#[derive(Deserialize)]
struct GoldenAnswer {
    token_ids: Vec<u32>,
    text: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/real_models.json")).expect("valid JSON")
}

fn golden_of(name: &str) -> GoldenModel {
    golden().models.into_iter().find(|model| model.name == name).expect("a golden model")
}

fn excerpt() -> PathBuf {
    workspace().join("tests/golden/wikitext-2-excerpt.txt")
}

/// A directory for what this run makes, empty at its start.
fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("real_models");
        drop(std::fs::remove_dir_all(&directory));
        std::fs::create_dir_all(&directory).expect("the target directory is writable");
        directory
    })
}

fn smollm2() -> &'static Path {
    static IMPORTED: OnceLock<PathBuf> = OnceLock::new();
    IMPORTED.get_or_init(|| import("smollm2-135m", scratch()))
}

fn perplexity(model: &Path, golden: &GoldenPerplexity, activations: &str) -> Value {
    let window = golden.window.to_string();
    let command = arguments!["eval", model, "--text", excerpt(), "--window", window, "--json"];
    let report = nibble::json(&[&command[..], &arguments!["--activations", activations]].concat());
    assert_eq!(report["predicted_tokens"], golden.predicted_tokens);
    report
}

/// Tokens, logits and perplexity of an imported model.
fn agrees_with_transformers(directory: &Path, golden: &GoldenModel) {
    let checkpoint = Checkpoint::open(directory).expect("a valid checkpoint");
    let tokenizer = Tokenizer::open(directory, checkpoint.config()).expect("a valid tokenizer");
    let text = std::fs::read_to_string(excerpt()).expect("the excerpt is there");
    assert_eq!(tokenizer.encode(&text, false).expect("tokens"), golden.tokens, "{}", golden.name);

    let tokens = &golden.tokens[..golden.perplexity.window];
    let mut model = Model::load(Cpu::new(2), &checkpoint, tokens.len()).expect("a valid model");
    let mut cache = model.kv_cache(tokens.len().div_ceil(BLOCK_SIZE)).unwrap();
    let mut batch = Batch::single(tokens, 0, (0..cache.blocks() as u32).collect());
    batch.logit_rows = golden.rows.iter().map(|row| row.row).collect();
    let logits = model.forward(&batch, &mut cache).expect("a valid batch");
    for (index, row) in golden.rows.iter().enumerate() {
        let found = logits.row(index);
        let largest = row.top_logits[0].abs();
        let top = row.top_ids.iter().copied().zip(&row.top_logits);
        let every_997th = (0..).step_by(997).zip(&row.every_997th);
        for (id, expected) in top.chain(every_997th) {
            let error = (found[id] - expected).abs() / largest;
            assert!(error < 1e-3, "{} row {}: {} for {expected}", golden.name, row.row, found[id]);
        }
    }
    let report = perplexity(directory, &golden.perplexity, "f32");
    let ratio = report["perplexity"].as_f64().expect("a number") / golden.perplexity.value;
    assert!((ratio - 1.0).abs() < 1e-3, "{}: perplexity ratio {ratio}", golden.name);
}

fn answers(directory: &Path, activations: &str) -> Value {
    let question = golden().question;
    let command = arguments!["generate", directory, "--prompt", question, "--activations", activations];
    let options = arguments!["--temperature", "0", "--max-tokens", "24", "--json"];
    nibble::json(&[&command[..], &options].concat())
}

#[test]
fn imported_smollm2_is_the_model_that_transformers_runs() {
    let golden = golden_of("smollm2-135m");
    agrees_with_transformers(smollm2(), &golden);
    let answer = answers(smollm2(), "int8");
    assert_eq!(answer["text"], golden.answer.text);
    assert_eq!(answer["token_ids"], serde_json::json!(golden.answer.token_ids));
}

#[test]
fn imported_qwen2_5_coder_is_the_model_that_transformers_runs() {
    let golden = golden_of("qwen2.5-coder-0.5b");
    let directory = import("qwen2.5-coder-0.5b", scratch());
    agrees_with_transformers(&directory, &golden);
    assert_eq!(answers(&directory, "int8")["text"], golden.answer.text);
}

#[test]
fn quantized_smollm2_stays_near_the_original_and_gptq_nearer_than_rtn() {
    let golden = golden_of("smollm2-135m");
    let mut loss = Vec::new();
    for method in ["rtn", "gptq"] {
        let out = scratch().join(format!("smollm2-135m-{method}"));
        let command = arguments!["quantize", smollm2(), out, "--method", method, "--group-size", "64"];
        let calibration =
            arguments!["--calibration", excerpt(), "--samples", "8", "--sequence-length", "256"];
        let report = nibble::json(&[&command[..], &calibration, &arguments!["--json"]].concat());
        let bits = report["bits_per_weight"].as_f64().expect("a number");
        assert!((4.0..4.5).contains(&bits), "{bits} bits per weight");
        assert_eq!(report["layers"].as_array().expect("a list").len(), 30 * 7);
        let found = perplexity(&out, &golden.perplexity, "f32")["perplexity"].as_f64().expect("a number");
        loss.push(found / golden.perplexity.value - 1.0);
        let rounded = perplexity(&out, &golden.perplexity, "int8")["perplexity"].as_f64().expect("a number");
        let cost = rounded / found - 1.0;
        assert!(cost.abs() < 0.02, "activations in eight bits cost {cost} of the perplexity of {method}");
        assert!(rounded != found, "they are not the same");
        let answer = answers(&out, "f32");
        let text = answer["text"].as_str().expect("a text");
        assert!(text.contains("Paris"), "{method} answers {text:?}");
    }
    let [rtn, gptq] = loss[..] else { panic!("two methods") };
    // Both were measured on the calibration text itself, which favours GPTQ: the bars only catch what is broken.
    assert!(rtn > 0.02 && rtn < 0.4, "RTN loses {rtn}");
    assert!(gptq < 0.7 * rtn, "GPTQ loses {gptq}, RTN {rtn}");
}

#[test]
fn every_format_holds_the_same_weights() {
    let mut checksums = Vec::new();
    for format in ["gptq", "awq", "compressed-tensors"] {
        let out = scratch().join(format!("smollm2-135m-as-{format}"));
        let command = arguments!["quantize", smollm2(), out, "--method", "rtn", "--group-size", "64"];
        nibble::json(&[&command[..], &arguments!["--format", format, "--json"]].concat());
        let checkpoint = Checkpoint::open(&out).expect("a valid checkpoint");
        let layers = 0..checkpoint.config().layers;
        let specs =
            layers.flat_map(|layer| LinearRole::ALL.map(|role| role.spec(checkpoint.config(), layer)));
        let checksum = |spec: LinearSpec| match checkpoint
            .linear(&spec.name, spec.out_features, spec.in_features)
            .expect("a valid layer")
        {
            LinearWeight::Quantized(matrix) => matrix.checksum(),
            LinearWeight::Dense(_) => panic!("{} is not quantized", spec.name),
        };
        checksums.push(specs.map(checksum).collect::<Vec<_>>());
        let inspection = nibble::json(&arguments!["inspect", out, "--json"]);
        let weights = inspection["weights"].as_array().expect("a list");
        let quantized =
            weights.iter().filter(|weight| weight["dtype"] == "INT4" && weight["group_size"] == 64);
        assert_eq!(quantized.count(), 30 * 7, "{format}");
    }
    assert_eq!(checksums[0].len(), 30 * 7);
    assert!(checksums.iter().all(|other| *other == checksums[0]));
}

/// The logits after a prompt, computed in chunks of `chunk` tokens.
fn in_chunks(model: &mut Model<Cpu>, prompt: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = model.kv_cache(prompt.len().div_ceil(BLOCK_SIZE)).unwrap();
    let block_table: Vec<u32> = (0..cache.blocks() as u32).rev().collect();
    let mut last = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        let mut batch = Batch::single(tokens, index * chunk, block_table.clone());
        batch.logit_rows = vec![tokens.len() - 1];
        last = model.forward(&batch, &mut cache).expect("a valid batch").values;
    }
    last
}

#[test]
fn the_logits_of_a_prompt_have_the_same_bits_alone_in_a_batch_of_eight_and_in_any_chunks() {
    let checkpoint = Checkpoint::open(smollm2()).expect("a valid checkpoint");
    let mut model = Model::load(Cpu::new(2), &checkpoint, 600).expect("a valid model");
    let tokens = golden_of("smollm2-135m").tokens;
    let prompts: Vec<&[u32]> =
        (0..8).map(|index| &tokens[index * 200..index * 200 + 600 - 70 * index]).collect();

    let whole = in_chunks(&mut model, prompts[0], 600);
    for chunk in [7, 64, 512] {
        assert_eq!(in_chunks(&mut model, prompts[0], chunk), whole, "in chunks of {chunk}");
    }

    let mut batch = Batch::default();
    let blocks_each = 600usize.div_ceil(BLOCK_SIZE);
    for (index, prompt) in prompts.iter().enumerate() {
        let (first_row, rows) = (batch.token_ids.len(), prompt.len());
        batch.token_ids.extend(*prompt);
        batch.positions.extend(0..rows as u32);
        batch.logit_rows.push(first_row + rows - 1);
        let block_table = (0..blocks_each).map(|block| (block * 8 + index) as u32).collect();
        batch.sequences.push(SequenceRows { first_row, rows, first_position: 0, block_table });
    }
    let mut cache = model.kv_cache(8 * blocks_each).unwrap();
    let together = model.forward(&batch, &mut cache).expect("a valid batch");
    for (index, prompt) in prompts.iter().enumerate() {
        assert_eq!(together.row(index), in_chunks(&mut model, prompt, 600), "prompt {index} of 8");
    }
}

#[test]
fn a_damaged_gguf_is_refused_with_one_sentence_and_leaves_nothing() {
    let whole = std::fs::read(real_model::gguf("smollm2-135m")).expect("the model is there");
    let file = scratch().join("damaged.gguf");
    for (bytes, names) in
        [(0, "damaged.gguf"), (3, "damaged.gguf"), (1000, "damaged.gguf"), (90_000_000, "tensor")]
    {
        std::fs::write(&file, &whole[..bytes]).expect("written");
        let out = scratch().join("from-damaged");
        let message = nibble::refusal(&arguments!["import", file, out]);
        assert!(message.contains(names) && message.contains("damaged.gguf"), "{message}");
        let left = std::fs::read_dir(scratch()).expect("readable");
        let left: Vec<_> = left.map(|entry| entry.expect("readable").file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("from-damaged")), "{left:?}");
    }
}
