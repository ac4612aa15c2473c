//! `nibble quantize` from its arguments to its files, and the commands that check them.

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use common::{Server, nibble, text, write_model};
use serde_json::Value;

/// A model of one layer, a text, and the directory both lie in.
struct World {
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("model")).unwrap();
        write_model(&directory.path().join("model"));
        let world = Self { directory };
        // What the model itself writes, it predicts better than any change of it does: windows of 100 tokens.
        let mut text = String::new();
        for seed in 0..12 {
            let mut command = nibble("generate", &world.path("model"));
            command.args(["--prompt", "A", "--raw", "--max-tokens", "110", "--json", "--temperature", "1"]);
            let answer = command.args(["--seed", &seed.to_string()]).output().unwrap().stdout;
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            let written = format!("A{}", answer["text"].as_str().unwrap());
            text += written.get(..100).unwrap_or_default();
        }
        assert!(text.len() >= 300, "most answers are long: {text}");
        std::fs::write(world.path("text"), text).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn quantize(&self, out: &str, options: &[&str]) -> Output {
        let mut command = nibble("quantize", &self.path("model"));
        command.arg(self.path(out)).args(["--method", "rtn", "--group-size", "16"]).args(options);
        command.output().unwrap()
    }

    fn evaluation(&self) -> [String; 4] {
        let text = self.path("text").to_str().unwrap().to_owned();
        ["--eval-text".to_owned(), text, "--eval-window".to_owned(), "100".to_owned()]
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Starts a server that must refuse, and returns what it said.
fn refusal_to_serve(model: &Path, options: &[&str]) -> String {
    let mut command = nibble("serve", model);
    command.args(["--port", "0"]).args(options).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if !line.is_empty() {
        process.kill().unwrap();
    }
    let output = process.wait_with_output().unwrap();
    assert!(line.is_empty() && !output.status.success(), "it serves: {line}");
    text(&output.stderr)
}

#[test]
fn quantize_writes_reports_a_card_and_a_self_test_beside_the_weights() {
    let world = World::new();
    let evaluation = world.evaluation();
    let options: Vec<&str> = evaluation.iter().map(String::as_str).chain(["--json"]).collect();
    let output = world.quantize("out", &options);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, json(&world.path("out/nibble_report.json")), "what is printed is what is kept");
    for key in ["bits_per_weight", "seconds", "perplexity_before", "perplexity_after", "mean_kl_divergence"] {
        assert!(printed[key].is_f64(), "{key}");
    }
    assert_eq!(printed["layers"].as_array().unwrap().len(), 7);
    let eval = |model: &str, options: &[&str]| -> Value {
        let mut command = nibble("eval", &world.path(model));
        command.arg("--text").arg(world.path("text")).args(["--window", "100", "--json"]).args(options);
        serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
    };
    let reference = world.path("model").to_str().unwrap().to_owned();
    let loaded = eval("out", &["--reference", &reference]);
    let streamed = eval("out", &["--reference", &reference, "--low-memory"]);
    for key in ["perplexity", "mean_kl_divergence", "top1_agreement", "reference_perplexity"] {
        assert_eq!(loaded[key], streamed[key], "{key}");
    }
    assert_eq!(printed["perplexity_after"], loaded["perplexity"]);
    assert_eq!(printed["perplexity_before"], eval("model", &[])["perplexity"]);
    assert_eq!(printed["mean_kl_divergence"], loaded["mean_kl_divergence"]);

    let card = std::fs::read_to_string(world.path("out/README.md")).unwrap();
    assert!(card.contains("nibble quantize ") && card.contains("--group-size 16"), "{card}");
    let page = std::fs::read_to_string(world.path("out/nibble_report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("down_proj"));
    let verified = nibble("inspect", &world.path("out")).args(["--verify", "--json"]).output().unwrap();
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(verified["verification"]["largest_logit_difference"], 0.0);
    // Seven matrices, two tensors outside of the layer, two norms in it.
    assert_eq!(verified["verification"]["weights"], 7 + 2 + 2);
}

#[test]
fn a_checkpoint_that_fails_its_gate_is_kept_marked_and_warned_of() {
    let world = World::new();
    let evaluation = world.evaluation();
    let with_limit = |limit| {
        let options = evaluation.iter().map(String::as_str);
        options.chain(["--max-perplexity-increase", limit]).collect::<Vec<_>>()
    };
    let passed = world.quantize("passed", &with_limit("100000%"));
    assert!(passed.status.success(), "{}", text(&passed.stderr));
    assert_eq!(json(&world.path("passed/nibble_report.json"))["quality_gate"]["status"], "passed");

    // Groups of all inputs and three bits: no small model keeps its perplexity to a hundredth of a percent.
    let mut options = with_limit("0.01%");
    options.extend(["--bits", "3", "--group-size", "-1", "--sym", "--format", "compressed-tensors"]);
    let mut command = nibble("quantize", &world.path("model"));
    let failed = command.arg(world.path("failed")).args(["--method", "rtn"]).args(&options).output().unwrap();
    let said = text(&failed.stderr);
    assert_eq!(failed.status.code(), Some(1), "{said}");
    for part in ["failed its quality gate", "more than 0.01%", "layer 0 (", "try --method gptq", "is kept"] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    assert_eq!(json(&world.path("failed/nibble_report.json"))["quality_gate"]["status"], "failed");
    let card = std::fs::read_to_string(world.path("failed/README.md")).unwrap();
    assert!(card.contains("quality_gate: failed"), "{card}");
    let inspected = text(&nibble("inspect", &world.path("failed")).output().unwrap().stdout);
    assert!(inspected.contains("failed its quality gate"), "{inspected}");
    let taken = refusal_to_serve(&world.path("failed"), &["--max-model-len", "999"]);
    assert!(taken.contains("failed its quality gate"), "warned before anything else: {taken}");

    for (limit, problem) in
        [("5", "a percentage or a fraction"), ("0.05", "such as 5%"), ("many%", "0 or more")]
    {
        let refused = world.quantize("refused", &with_limit(limit));
        assert!(!refused.status.success() && !world.path("refused").exists());
        assert!(text(&refused.stderr).contains(problem), "{}", text(&refused.stderr));
    }
    let alone = world.quantize("refused", &["--max-perplexity-increase", "5%"]);
    assert!(text(&alone.stderr).contains("--eval-text"), "{}", text(&alone.stderr));
}

#[test]
fn a_flipped_byte_of_the_weights_is_found_before_anything_is_served() {
    let world = World::new();
    assert!(world.quantize("out", &[]).status.success());
    let out = world.path("out");
    drop(Server::start(&out, &["--self-test"]));

    let weights = out.join("model.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&good[8..header]).unwrap();
    let damage = |tensor: &str| {
        let first = header + tensors[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        let mut bytes = good.clone();
        bytes[first + 5] ^= 0x10;
        std::fs::write(&weights, bytes).unwrap();
    };
    let layer = "model.layers.0.";
    for (tensor, named) in [
        (format!("{layer}mlp.up_proj.qweight"), format!("{layer}mlp.up_proj")),
        (format!("{layer}self_attn.q_proj.scales"), format!("{layer}self_attn.q_proj")),
        ("model.embed_tokens.weight".to_owned(), "model.embed_tokens.weight".to_owned()),
        (format!("{layer}input_layernorm.weight"), format!("{layer}input_layernorm.weight")),
    ] {
        damage(&tensor);
        let said = refusal_to_serve(&out, &["--self-test"]);
        assert!(
            said.contains(&format!("tensor \"{named}\"")) && said.contains("checksum"),
            "{tensor}: {said}"
        );
        let inspected = nibble("inspect", &out).arg("--verify").output().unwrap();
        assert!(!inspected.status.success() && text(&inspected.stderr).contains(&named));
    }
    std::fs::write(&weights, &good).unwrap();

    let test = out.join("nibble_self_test.json");
    let recorded = std::fs::read_to_string(&test).unwrap();
    let recorded: Value = serde_json::from_str(&recorded).unwrap();
    let activations = [("int8", "rounded_logits", "logits"), ("f32", "logits", "rounded_logits")];
    for (activations, own, other) in activations {
        let arguments = ["--self-test", "--activations", activations];
        let wrong = |logits: &str| {
            let mut wrong = recorded.clone();
            let logit = wrong[logits][3]["logit"].as_f64().unwrap();
            wrong[logits][3]["logit"] = (logit + 2.0 * wrong["tolerance"].as_f64().unwrap()).into();
            std::fs::write(&test, wrong.to_string()).unwrap();
        };
        wrong(own);
        let said = refusal_to_serve(&out, &arguments);
        assert!(said.contains("the logit of token") && said.contains("tolerance"), "{said}");
        wrong(other);
        drop(Server::start(&out, &arguments));
    }
    let mut of_earlier_version = recorded.clone();
    of_earlier_version.as_object_mut().unwrap().remove("rounded_logits").unwrap();
    std::fs::write(&test, of_earlier_version.to_string()).unwrap();
    let said = refusal_to_serve(&out, &["--self-test"]);
    assert!(said.contains("rounded_logits") && said.contains("--activations f32"), "{said}");
    drop(Server::start(&out, &["--self-test", "--activations", "f32"]));
    std::fs::write(&test, "{").unwrap();
    let said = refusal_to_serve(&out, &["--self-test"]);
    assert!(said.contains("nibble_self_test.json") && !said.contains("panicked"), "{said}");
    std::fs::remove_file(&test).unwrap();
    let said = refusal_to_serve(&out, &["--self-test"]);
    assert!(said.contains("nibble_self_test.json: the self-test is missing"), "{said}");
    drop(Server::start(&out, &[]));
}
