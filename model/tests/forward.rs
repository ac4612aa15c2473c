//! The forward pass on small random models of every architecture: a sequence's logits have the same bits
//! alone, in a batch, in chunks and over scattered blocks.

use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{BLOCK_SIZE, Batch, KvCache, Logits, Model, SequenceRows, rounded_copy_bytes};
use nibble_tests::tiny_model::{HIDDEN, TINY_MODELS, TinyModel, VOCABULARY, tokens};

const MAX_POSITIONS: usize = 160;

fn load(model: &TinyModel) -> Model<Cpu> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    model.write(directory.path());
    let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
    Model::load(Cpu::new(2), &checkpoint, MAX_POSITIONS).expect("a valid model")
}

/// The logits of every token of `tokens`, run in chunks of `chunk` over `block_table`.
fn in_chunks(
    model: &mut Model<Cpu>,
    cache: &mut KvCache<Cpu>,
    tokens: &[u32],
    chunk: usize,
    block_table: &[u32],
) -> Vec<f32> {
    let mut values = Vec::new();
    for (index, chunk_tokens) in tokens.chunks(chunk).enumerate() {
        let batch = Batch::single(chunk_tokens, index * chunk, block_table.to_vec());
        values.extend(model.forward(&batch, cache).expect("a valid batch").values);
    }
    values
}

#[test]
fn logits_have_the_same_bits_whole_in_chunks_and_over_scattered_blocks() {
    for tiny in &TINY_MODELS {
        let mut model = load(tiny);
        let tokens = tokens(101, 5);
        let blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
        let in_order: Vec<u32> = (0..blocks).collect();
        let scattered: Vec<u32> = (0..blocks).map(|block| 2 * (blocks - block)).collect();
        let mut cache = model.kv_cache(2 * blocks as usize + 1).unwrap();
        let whole = in_chunks(&mut model, &mut cache, &tokens, tokens.len(), &in_order);
        assert!(whole.iter().all(|logit| logit.is_finite()));
        for chunk in [1, 7, 64] {
            let chunked = in_chunks(&mut model, &mut cache, &tokens, chunk, &scattered);
            assert_eq!(chunked, whole, "{} in chunks of {chunk}", tiny.name);
        }
    }
}

#[test]
fn logits_have_the_same_bits_alone_and_among_seven_others() {
    for tiny in &TINY_MODELS {
        let mut model = load(tiny);
        let mut cache = model.kv_cache(8 * 4).unwrap();
        let sequences: Vec<Vec<u32>> = (0..8).map(|index| tokens(20 + 5 * index, 50 + index)).collect();
        let table = |index: usize| -> Vec<u32> { (0..4).map(|block| (block * 8 + index) as u32).collect() };
        let mut batch = Batch::default();
        for (index, tokens) in sequences.iter().enumerate() {
            let first_row = batch.token_ids.len();
            batch.token_ids.extend(tokens);
            batch.positions.extend(0..tokens.len() as u32);
            batch.logit_rows.push(batch.token_ids.len() - 1);
            let rows = tokens.len();
            batch.sequences.push(SequenceRows {
                first_row,
                rows,
                first_position: 0,
                block_table: table(index),
            });
        }
        let together = model.forward(&batch, &mut cache).expect("a valid batch");
        for (index, tokens) in sequences.iter().enumerate() {
            let alone = in_chunks(&mut model, &mut cache, tokens, tokens.len(), &[0, 1, 2, 3]);
            let last = &alone[(tokens.len() - 1) * VOCABULARY..];
            assert_eq!(together.row(index), last, "{} sequence {index}", tiny.name);
        }
    }
}

#[test]
fn a_broken_batch_is_refused_with_the_rule_it_breaks() {
    type Break = fn(&mut Batch);
    let cases: [(&str, Break); 8] = [
        ("positions", |batch| batch.positions.truncate(3)),
        ("token", |batch| batch.token_ids[0] = VOCABULARY as u32),
        ("logits of row", |batch| batch.logit_rows = vec![10]),
        ("hidden states of row", |batch| batch.hidden_rows = vec![10]),
        ("blocks for", |batch| batch.sequences[0].block_table.clear()),
        ("block Some(9)", |batch| batch.sequences[0].block_table[0] = 9),
        ("consecutive", |batch| batch.positions[4] = 9),
        ("sequences cover", |batch| batch.sequences.clear()),
    ];
    let mut model = load(&TINY_MODELS[0]);
    let mut cache = model.kv_cache(1).unwrap();
    for (problem, break_it) in cases {
        let mut batch = Batch::single(&tokens(10, 1), 0, vec![0]);
        break_it(&mut batch);
        let message = model.forward(&batch, &mut cache).expect_err("refused").to_string();
        assert!(message.contains(problem), "{message}");
    }
    let good = Batch::single(&tokens(10, 1), 0, vec![0]);
    let Logits { rows, vocabulary, .. } = model.forward(&good, &mut cache).expect("a valid batch");
    assert_eq!((rows, vocabulary), (10, VOCABULARY));
}

#[test]
fn a_head_in_eight_bits_is_counted_where_it_stands_beside_the_table_it_is_tied_to() {
    let quantization = serde_json::json!({
        "quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": false, "sym": true,
    });
    for tiny in &TINY_MODELS {
        for is_quantized in [false, true] {
            let directory = tempfile::tempdir().expect("a temporary directory");
            tiny.write(directory.path());
            let mut config = tiny.config();
            if is_quantized {
                config["quantization_config"] = quantization.clone();
            }
            std::fs::write(directory.path().join("config.json"), config.to_string()).expect("written");
            let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
            // A code for each weight, and a scale for each row: it has fewer inputs than a group.
            let copy = if tiny.tied && is_quantized { VOCABULARY * (HIDDEN + 4) } else { 0 };
            assert_eq!(rounded_copy_bytes(&checkpoint, Activations::Integer), copy as u64, "{}", tiny.name);
            assert_eq!(rounded_copy_bytes(&checkpoint, Activations::Float), 0);
        }
    }
}
