//! Logits of every architecture against Hugging Face transformers' (tests/golden/tiny_models.py).

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{BLOCK_SIZE, Batch, Model};
use nibble_tests::tiny_model::TinyModel;
use serde_json::Value;

/// Of the largest logit of a row. Measured: 8.3e-7.
const TOLERANCE: f32 = 1e-5;

#[test]
fn logits_of_every_architecture_are_those_of_transformers() {
    let golden: Value =
        serde_json::from_str(include_str!("../../tests/golden/tiny_models.json")).expect("valid JSON");
    let models = golden["models"].as_array().expect("a list");
    assert_eq!(models.len(), nibble_tests::tiny_model::TINY_MODELS.len());
    for golden in models {
        let name = golden["name"].as_str().expect("a name");
        let directory = tempfile::tempdir().expect("a temporary directory");
        TinyModel::named(name).write(directory.path());
        let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
        let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).expect("token ids");
        let mut model = Model::load(Cpu::new(2), &checkpoint, tokens.len()).expect("a valid model");
        let blocks = tokens.len().div_ceil(BLOCK_SIZE);
        let batch = Batch::single(&tokens, 0, (0..blocks as u32).collect());
        let mut cache = model.kv_cache(blocks).unwrap();
        let logits = model.forward(&batch, &mut cache).expect("a valid batch");
        for row in golden["rows"].as_array().expect("rows") {
            let index = row["row"].as_u64().expect("a row") as usize;
            let expected: Vec<f32> = serde_json::from_value(row["logits"].clone()).expect("logits");
            let largest = expected.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
            for (found, expected) in logits.row(index).iter().zip(&expected) {
                let error = (found - expected).abs() / largest;
                assert!(error < TOLERANCE, "{name}, row {index}: {found}, expected {expected} ({error:e})");
            }
        }
    }
}
