//! The forward pass on small random models of every architecture: a sequence's logits have the same bits
//! alone, in a batch, in chunks and over scattered blocks.

use std::path::Path;

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{BLOCK_SIZE, Batch, KvCache, Logits, Model, SequenceRows};
use safetensors::tensor::{Dtype, TensorView};

const VOCABULARY: usize = 90;
const HIDDEN: usize = 48;
const INTERMEDIATE: usize = 80;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const MAX_POSITIONS: usize = 160;

struct Kind {
    class: &'static str,
    tied: bool,
    qkv_bias: bool,
    head_norms: bool,
    extra: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind { class: "LlamaForCausalLM", tied: true, qkv_bias: false, head_norms: false, extra: "" },
    Kind {
        class: "MistralForCausalLM",
        tied: false,
        qkv_bias: false,
        head_norms: false,
        extra: r#","sliding_window":21"#,
    },
    Kind { class: "Qwen2ForCausalLM", tied: false, qkv_bias: true, head_norms: false, extra: "" },
    Kind { class: "Qwen3ForCausalLM", tied: true, qkv_bias: false, head_norms: true, extra: "" },
];

/// Reproducible values in -1.0..1.0.
fn random(count: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn write_model(directory: &Path, kind: &Kind) {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    if !kind.tied {
        shapes.push(("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]));
    }
    let (query, key) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    for layer in 0..2 {
        let mut add = |name: &str, shape: Vec<usize>| {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", vec![HIDDEN]);
        add("post_attention_layernorm.weight", vec![HIDDEN]);
        for (name, width) in [("q", query), ("k", key), ("v", key)] {
            add(&format!("self_attn.{name}_proj.weight"), vec![width, HIDDEN]);
            if kind.qkv_bias {
                add(&format!("self_attn.{name}_proj.bias"), vec![width]);
            }
        }
        if kind.head_norms {
            add("self_attn.q_norm.weight", vec![HEAD_DIM]);
            add("self_attn.k_norm.weight", vec![HEAD_DIM]);
        }
        add("self_attn.o_proj.weight", vec![HIDDEN, query]);
        add("mlp.gate_proj.weight", vec![INTERMEDIATE, HIDDEN]);
        add("mlp.up_proj.weight", vec![INTERMEDIATE, HIDDEN]);
        add("mlp.down_proj.weight", vec![HIDDEN, INTERMEDIATE]);
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let values = random(shape.iter().product(), index + 1);
            let bytes = values.iter().flat_map(|value| (value * 0.5).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("written");
    let config = format!(
        r#"{{"architectures":["{}"],"vocab_size":{VOCABULARY},"hidden_size":{HIDDEN},
        "intermediate_size":{INTERMEDIATE},"num_hidden_layers":2,"num_attention_heads":{HEADS},
        "num_key_value_heads":{KV_HEADS},"head_dim":{HEAD_DIM},"rms_norm_eps":1e-5,"rope_theta":10000.0,
        "max_position_embeddings":256,"tie_word_embeddings":{},"hidden_act":"silu","torch_dtype":"float32",
        "bos_token_id":1,"eos_token_id":2{}}}"#,
        kind.class, kind.tied, kind.extra
    );
    std::fs::write(directory.join("config.json"), config).expect("written");
}

fn load(kind: &Kind) -> Model<Cpu> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_model(directory.path(), kind);
    let checkpoint = Checkpoint::open(directory.path()).expect("a valid checkpoint");
    Model::load(Cpu::new(2), &checkpoint, MAX_POSITIONS).expect("a valid model")
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    random(count, seed).iter().map(|value| ((value + 1.0) / 2.0 * VOCABULARY as f32) as u32).collect()
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
    for kind in &KINDS {
        let mut model = load(kind);
        let tokens = tokens(101, 5);
        let blocks = tokens.len().div_ceil(BLOCK_SIZE) as u32;
        let in_order: Vec<u32> = (0..blocks).collect();
        let scattered: Vec<u32> = (0..blocks).map(|block| 2 * (blocks - block)).collect();
        let mut cache = model.kv_cache(2 * blocks as usize + 1);
        let whole = in_chunks(&mut model, &mut cache, &tokens, tokens.len(), &in_order);
        assert!(whole.iter().all(|logit| logit.is_finite()));
        for chunk in [1, 7, 64] {
            let chunked = in_chunks(&mut model, &mut cache, &tokens, chunk, &scattered);
            assert_eq!(chunked, whole, "{} in chunks of {chunk}", kind.class);
        }
    }
}

#[test]
fn logits_have_the_same_bits_alone_and_among_seven_others() {
    for kind in &KINDS {
        let mut model = load(kind);
        let mut cache = model.kv_cache(8 * 4);
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
            assert_eq!(together.row(index), last, "{} sequence {index}", kind.class);
        }
    }
}

#[test]
fn a_broken_batch_is_refused_with_the_rule_it_breaks() {
    type Break = fn(&mut Batch);
    let cases: [(&str, Break); 7] = [
        ("positions", |batch| batch.positions.truncate(3)),
        ("token", |batch| batch.token_ids[0] = VOCABULARY as u32),
        ("logits of row", |batch| batch.logit_rows = vec![10]),
        ("blocks for", |batch| batch.sequences[0].block_table.clear()),
        ("block Some(9)", |batch| batch.sequences[0].block_table[0] = 9),
        ("consecutive", |batch| batch.positions[4] = 9),
        ("sequences cover", |batch| batch.sequences.clear()),
    ];
    let mut model = load(&KINDS[0]);
    let mut cache = model.kv_cache(1);
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
