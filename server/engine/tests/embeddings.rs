//! Embeddings of tiny models by the engine against Hugging Face transformers' (tests/golden/tiny_embeddings.py).

mod support;

use nibble_engine::{Engine, EngineConfig, ModelRunner, Pooling, Request};
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::Model;
use nibble_tests::tiny_model::{TINY_MODELS, TinyModel};
use serde_json::Value;
use support::Stream;

/// Of the largest number of an embedding.
const TOLERANCE: f32 = 1e-5;

#[test]
fn embeddings_of_every_architecture_are_those_of_transformers_in_any_chunks() {
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/golden/tiny_embeddings.json")).expect("valid JSON");
    let models = golden["models"].as_array().expect("a list");
    assert_eq!(models.len(), TINY_MODELS.len());
    for golden in models {
        let name = golden["name"].as_str().expect("a name");
        let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).expect("token ids");
        let directory = tempfile::tempdir().expect("a temporary directory");
        TinyModel::named(name).write(directory.path());
        let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
        let run = |max_prefill_chunk_tokens| {
            let model = Model::load(Cpu::new(2), &checkpoint, 128).expect("a valid model");
            let config = EngineConfig { max_prefill_chunk_tokens, ..EngineConfig::default() };
            let engine =
                Engine::start(Box::new(ModelRunner::new(model, 16).unwrap()), config).expect("an engine");
            [Pooling::Last, Pooling::Mean].map(|pooling| {
                let request = Request::embedding(tokens.clone(), pooling);
                let stream = Stream::submit(&engine.handle(), request).expect("accepted");
                stream.finish().embedding.expect("an embedding")
            })
        };
        let embeddings = run(512);
        for (embedding, field) in embeddings.iter().zip(["last", "mean"]) {
            let expected: Vec<f32> = serde_json::from_value(golden[field].clone()).expect("numbers");
            assert_eq!(embedding.len(), expected.len(), "{name}");
            let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (found, expected) in embedding.iter().zip(&expected) {
                let error = (found - expected).abs() / largest;
                assert!(error < TOLERANCE, "{name}, {field}: {found}, expected {expected} ({error:e})");
            }
        }
        assert_eq!(run(7), embeddings, "{name}: chunks change no bit");
    }
}
