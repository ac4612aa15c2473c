//! A GGUF file of a model with a few dozen weights, for tests.

#![allow(dead_code, reason = "each test program uses its part")]

use super::{Gguf, Value};

pub(crate) const HIDDEN: usize = 8;
pub(crate) const INTERMEDIATE: usize = 12;
pub(crate) const HEADS: usize = 2;
pub(crate) const KV_HEADS: usize = 1;
pub(crate) const HEAD_DIM: usize = 4;
pub(crate) const LAYERS: usize = 2;
const TOKENS: [&str; 6] = ["<|end|>", "a", "b", "ab", "Ġ", "<tool>"];

/// A complete model of `architecture`: llama, qwen2 or qwen3.
pub(crate) fn model(architecture: &str) -> Gguf {
    let mut gguf = Gguf::default();
    gguf.set("general.architecture", architecture.into());
    for (name, value) in [
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INTERMEDIATE),
        ("block_count", LAYERS),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("context_length", 64),
    ] {
        gguf.set(&format!("{architecture}.{name}"), Value::U32(value as u32));
    }
    gguf.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6));
    gguf.set(&format!("{architecture}.rope.freq_base"), Value::F32(5e5));
    tokenizer(&mut gguf);
    weights(&mut gguf, architecture, TOKENS.len());
    gguf
}

/// A llama of this hidden size, whose linear layers, embedding and norms have no weights yet.
pub(crate) fn without_weights(hidden: usize, heads: usize, kv_heads: usize, layers: usize) -> Gguf {
    let mut gguf = model("llama");
    gguf.tensors.clear();
    for (name, value) in [
        ("embedding_length", hidden),
        ("feed_forward_length", hidden),
        ("block_count", layers),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ] {
        gguf.set(&format!("llama.{name}"), Value::U32(value as u32));
    }
    gguf
}

fn tokenizer(gguf: &mut Gguf) {
    gguf.set("tokenizer.ggml.model", "gpt2".into());
    gguf.set("tokenizer.ggml.pre", "qwen2".into());
    gguf.set("tokenizer.ggml.tokens", Value::Strings(TOKENS.map(str::to_owned).to_vec()));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(vec![3, 1, 1, 1, 1, 4]));
    gguf.set("tokenizer.ggml.merges", Value::Strings(vec!["a b".to_owned()]));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(0));
    gguf.set("tokenizer.chat_template", "{{ messages }}".into());
}

/// Adds every weight; element `i` of a tensor is `i` plus a number of its own.
fn weights(gguf: &mut Gguf, architecture: &str, vocabulary: usize) {
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut add = |name: &str, shape: &[usize]| {
        let first = 1000.0 * (1 + gguf.tensors.len()) as f32;
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| first + i as f32).collect();
        gguf.floats(name, shape, &values);
    };
    add("token_embd.weight", &[vocabulary, HIDDEN]);
    add("output_norm.weight", &[HIDDEN]);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| add(&format!("blk.{layer}.{name}"), shape);
        add("attn_norm.weight", &[HIDDEN]);
        add("ffn_norm.weight", &[HIDDEN]);
        add("attn_q.weight", &[queries, HIDDEN]);
        add("attn_k.weight", &[keys, HIDDEN]);
        add("attn_v.weight", &[keys, HIDDEN]);
        add("attn_output.weight", &[HIDDEN, queries]);
        add("ffn_gate.weight", &[INTERMEDIATE, HIDDEN]);
        add("ffn_up.weight", &[INTERMEDIATE, HIDDEN]);
        add("ffn_down.weight", &[HIDDEN, INTERMEDIATE]);
        if architecture == "qwen2" {
            add("attn_q.bias", &[queries]);
            add("attn_k.bias", &[keys]);
            add("attn_v.bias", &[keys]);
        }
        if architecture == "qwen3" {
            add("attn_q_norm.weight", &[HEAD_DIM]);
            add("attn_k_norm.weight", &[HEAD_DIM]);
        }
    }
}
