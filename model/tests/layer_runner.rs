//! The layer runner takes sequences of different lengths, as calibration documents give them.

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{DecoderLayer, LayerRunner};
use nibble_tests::tiny_model::{HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, TINY_MODELS, random};

/// Every input of the first layer's linear layers, and its output.
fn pass(runner: &mut LayerRunner<Cpu>, layer: &DecoderLayer<Cpu>, mut hidden: Vec<f32>) -> [Vec<f32>; 5] {
    let tokens = hidden.len() / HIDDEN;
    let mut input = vec![0.0; tokens * HIDDEN];
    let mut attention = vec![0.0; tokens * HEADS * HEAD_DIM];
    let mut feed_forward_input = vec![0.0; tokens * HIDDEN];
    let mut gated = vec![0.0; tokens * INTERMEDIATE];
    runner.attention_input(layer, &hidden, &mut input).expect("runs");
    runner.attention(layer, &hidden, &mut attention).expect("runs");
    runner.add_attention(layer, &attention, &mut hidden).expect("runs");
    runner.feed_forward_input(layer, &hidden, &mut feed_forward_input).expect("runs");
    runner.gated(layer, &hidden, &mut gated).expect("runs");
    runner.add_feed_forward(layer, &mut hidden).expect("runs");
    [input, attention, feed_forward_input, gated, hidden]
}

#[test]
fn a_short_sequence_after_a_long_one_has_the_bits_it_has_alone() {
    for tiny in &TINY_MODELS {
        let directory = tempfile::tempdir().expect("a temporary directory");
        tiny.write(directory.path());
        let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
        let runner = |max_tokens| {
            LayerRunner::new(Cpu::new(2), checkpoint.config(), max_tokens).expect("enough memory")
        };
        let mut shared = runner(101);
        let layer = DecoderLayer::load(shared.backend(), &checkpoint, 0).expect("a valid layer");
        for (seed, tokens) in [101, 1, 37, 64].into_iter().enumerate() {
            let hidden = random(tokens * HIDDEN, seed);
            let alone = pass(&mut runner(tokens), &layer, hidden.clone());
            assert!(pass(&mut shared, &layer, hidden) == alone, "{}: {tokens} tokens", tiny.name);
        }
    }
}
