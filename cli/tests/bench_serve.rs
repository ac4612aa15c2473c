//! `nibble bench serve` against `nibble serve` with a small random model.

mod common;

use std::process::{Command, Output};

use serde_json::Value;

use common::{Server, text, write_model};

fn bench(server: &Server, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nibble"))
        .args(["bench", "serve", "--url", &format!("http://{}", server.address)])
        .args(options)
        .output()
        .unwrap()
}

#[test]
fn a_load_is_reported_with_every_token_and_the_keys_that_scripts_rely_on() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let server = Server::start(directory.path(), &[]);
    let saved = directory.path().join("result.json");
    let load = ["--num-prompts", "12", "--max-concurrency", "3", "--random-input-len", "4", "--ignore-eos"];
    let options = ["--random-output-len", "9", "--percentiles", "95", "--json", "--save-result"];
    let output = bench(&server, &[&load[..], &options, &[saved.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report, serde_json::from_slice::<Value>(&std::fs::read(saved).unwrap()).unwrap());
    assert_eq!((&report["completed"], &report["failed"]), (&12.into(), &0.into()));
    assert_eq!(report["output_tokens"], 12 * 9);
    assert!(report["output_tokens_per_second"].as_f64().unwrap() > 0.0);
    for metric in ["ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"] {
        for key in ["mean", "p50", "p90", "p95", "p99"] {
            assert!(
                report[metric][key].as_f64().is_some_and(|value| value >= 0.0),
                "{metric} {key}: {report}"
            );
        }
    }
    // The end comes after the first token, and all of it within the run.
    let median = |metric: &str| report[metric]["p50"].as_f64().unwrap();
    assert!(median("ttft_ms") < median("e2el_ms"));
    assert!(median("e2el_ms") < 1e3 * report["duration_seconds"].as_f64().unwrap());
}

#[test]
fn what_the_server_refuses_is_told_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let server = Server::start(directory.path(), &[]);
    for (options, reason) in [
        (["--model", "gpt-4"], "is not served here"),
        (["--random-output-len", "100000"], "max_tokens"),
        // The small model has none.
        (["--endpoint", "chat"], "no_chat_template"),
    ] {
        let output = bench(&server, &options);
        assert!(!output.status.success());
        assert!(text(&output.stderr).contains(reason), "{}", text(&output.stderr));
    }
}
