//! Real GGUF files run as they are, held against Hugging Face transformers on the same weights
//! (tests/golden/real_models.py).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{BLOCK_SIZE, Batch, Model, SequenceRows};
use nibble_tests::real_model::{gguf, workspace};
use nibble_tests::{arguments, nibble};
use serde_json::{Value, json};

/// The models, and what eight-bit activations may cost of the perplexity: measured 0.2 % of SmolLM2's.
const MODELS: [(&str, f64); 2] = [("smollm2-135m", 0.01), ("qwen2.5-coder-0.5b", 0.01)];

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/real_models.json")).expect("valid JSON")
}

fn golden_of(name: &str) -> Value {
    let golden = golden();
    let models = golden["models"].as_array().expect("a list");
    models.iter().find(|model| model["name"] == name).expect("a golden model").clone()
}

fn tokens(name: &str) -> Vec<u32> {
    serde_json::from_value(golden_of(name)["tokens"].clone()).expect("token ids")
}

fn excerpt() -> PathBuf {
    workspace().join("tests/golden/wikitext-2-excerpt.txt")
}

#[test]
fn the_perplexity_of_a_gguf_file_is_that_of_transformers() {
    for (name, cost) in MODELS {
        let expected = &golden_of(name)["perplexity"];
        let window = expected["window"].to_string();
        let perplexity = |activations: &str| {
            let command = arguments!["eval", gguf(name), "--text", excerpt(), "--window", window, "--json"];
            let report = nibble::json(&[&command[..], &arguments!["--activations", activations]].concat());
            assert_eq!(report["predicted_tokens"], expected["predicted_tokens"]);
            report["perplexity"].as_f64().expect("a number") / expected["value"].as_f64().expect("a number")
        };
        // The golden model is what an import in F16 gives: its weights are rounded once more.
        let exact = perplexity("f32");
        assert!((exact - 1.0).abs() < 1e-3, "{name}: perplexity ratio {exact}");
        let rounded = perplexity("int8");
        assert!(rounded != exact && (rounded / exact - 1.0).abs() < cost, "{name}: {rounded} for {exact}");
    }
}

#[test]
fn a_gguf_file_answers_as_transformers_does() {
    // SmolLM2 wavers between two first words: log probabilities of -1.88 and -1.97, which eight-bit activations swap.
    for (name, activations) in [(MODELS[0].0, "f32"), (MODELS[1].0, "f32"), (MODELS[1].0, "int8")] {
        let question = golden()["question"].as_str().expect("a text").to_owned();
        let command =
            arguments!["generate", gguf(name), "--prompt", question, "--max-tokens", "24", "--json"];
        let answer = nibble::json(&[&command[..], &arguments!["--activations", activations]].concat());
        assert_eq!(answer["text"], golden_of(name)["answer"]["text"], "{name} {activations}");
    }
}

#[test]
fn a_gguf_file_is_served() {
    let mut server = Command::new(nibble::binary())
        .args(arguments!["serve", gguf("smollm2-135m"), "--port", "0", "--activations", "f32"])
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server starts");
    let mut line = String::new();
    let read = BufReader::new(server.stdout.take().expect("it is piped")).read_line(&mut line);
    let answer = read.map(|_| {
        let (name, address) = line.trim().strip_prefix("serving ")?.split_once(" at http://")?;
        let question = golden()["question"].clone();
        let body = json!({
            "model": name, "temperature": 0, "max_tokens": 24,
            "messages": [{"role": "user", "content": question}],
        })
        .to_string();
        let mut stream = TcpStream::connect(address).ok()?;
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str::<Value>(answer.split_once("\r\n\r\n")?.1).ok()
    });
    server.kill().expect("it runs");
    server.wait().expect("it has ended");
    let answer = answer.expect("the server says that it is ready").expect("an answer in JSON");
    let text = &answer["choices"][0]["message"]["content"];
    assert_eq!(*text, golden_of("smollm2-135m")["answer"]["text"], "{answer}");
}

#[test]
fn the_logits_of_a_gguf_file_have_the_same_bits_alone_in_chunks_and_in_a_batch() {
    let checkpoint = Checkpoint::open(&gguf("smollm2-135m")).expect("a valid file");
    let tokens = tokens("smollm2-135m");
    let prompts: Vec<&[u32]> = (0..8).map(|index| &tokens[index * 100..][..300 - 35 * index]).collect();
    let blocks_each = 300usize.div_ceil(BLOCK_SIZE);
    for activations in [Activations::Integer, Activations::Float] {
        let cpu = Cpu::new(2).with_activations(activations);
        let mut model = Model::load(cpu, &checkpoint, 300).expect("a valid model");
        let mut cache = model.kv_cache(8 * blocks_each).unwrap();
        let mut in_chunks = |model: &mut Model<Cpu>, prompt: &[u32], chunk: usize| {
            let mut last = Vec::new();
            for (index, tokens) in prompt.chunks(chunk).enumerate() {
                let block_table = (0..blocks_each as u32).rev().collect();
                let mut batch = Batch::single(tokens, index * chunk, block_table);
                batch.logit_rows = vec![tokens.len() - 1];
                last = model.forward(&batch, &mut cache).expect("a valid batch").values;
            }
            last
        };
        let whole: Vec<Vec<f32>> =
            prompts.iter().map(|prompt| in_chunks(&mut model, prompt, prompt.len())).collect();
        for chunk in [7, 128] {
            assert_eq!(
                in_chunks(&mut model, prompts[0], chunk),
                whole[0],
                "{activations:?}, chunks of {chunk}"
            );
        }
        let mut batch = Batch::default();
        for (index, prompt) in prompts.iter().enumerate() {
            let (first_row, rows) = (batch.token_ids.len(), prompt.len());
            batch.token_ids.extend(*prompt);
            batch.positions.extend(0..rows as u32);
            batch.logit_rows.push(first_row + rows - 1);
            let block_table = (0..blocks_each).map(|block| (block * 8 + index) as u32).collect();
            batch.sequences.push(SequenceRows { first_row, rows, first_position: 0, block_table });
        }
        let together = model.forward(&batch, &mut cache).expect("a valid batch");
        for (index, alone) in whole.iter().enumerate() {
            assert_eq!(together.row(index), alone, "{activations:?}, prompt {index} of 8");
        }
    }
}

#[test]
fn a_gguf_file_is_inspected_and_what_needs_a_directory_says_so() {
    let file = gguf("smollm2-135m");
    let inspection = nibble::json(&arguments!["inspect", file, "--json"]);
    assert_eq!(inspection["format"], "gguf");
    let weights = inspection["weights"].as_array().expect("a list");
    let of_type = |name: &str| weights.iter().filter(|weight| weight["dtype"] == name).count();
    assert_eq!((weights.len(), of_type("Q4_1"), of_type("Q8_0"), of_type("F32")), (272, 210, 1, 61));
    for command in [
        arguments!["quantize", file, "/nowhere/out"].to_vec(),
        arguments!["bench", "latency", file, "--load-format", "dummy"].to_vec(),
    ] {
        let message = nibble::refusal(&command);
        assert!(message.contains("is a GGUF file") && message.contains("nibble import"), "{message}");
    }
}
