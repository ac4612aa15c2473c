//! Writes a model of random weights in the shape of Llama 3 70B, with fewer layers: to see what `nibble quantize` needs for
//! matrices of that size. A text to calibrate on lies beside the weights.
//!
//!     cargo run --release -p nibble-tests --example write_random_model -- OUT [LAYERS]

use std::path::PathBuf;

use half::f16;
use nibble_model::checkpoint::{CheckpointWriter, DEFAULT_SHARD_BYTES};
use nibble_model::config::ModelConfig;
use nibble_model::forward::LinearRole;
use safetensors::Dtype;
use serde_json::json;

/// Words of the vocabulary that texts are made of; the table has room for as many as Llama 3's.
const WORDS: usize = 5_000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let out = PathBuf::from(arguments.next().expect("usage: write_random_model OUT [LAYERS]"));
    let layers: usize = arguments.next().map_or(2, |layers| layers.parse().expect("a number of layers"));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 8192,
        "intermediate_size": 28_672, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": true, "hidden_act": "silu",
        "torch_dtype": "float16",
    });
    let vocabulary: serde_json::Map<_, _> = (0..WORDS).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    let mut writer = CheckpointWriter::create(&out, DEFAULT_SHARD_BYTES).expect("OUT can be made");
    writer.file("config.json", config.to_string().as_bytes()).expect("written");
    writer.file("tokenizer.json", tokenizer.to_string().as_bytes()).expect("written");
    let parsed = std::env::temp_dir().join(format!("nibble-random-model-{}.json", std::process::id()));
    std::fs::write(&parsed, config.to_string()).expect("a temporary file");
    let config = ModelConfig::from_file(&parsed).expect("the config is valid");
    std::fs::remove_file(&parsed).expect("it was written");

    let mut state = 1;
    let mut tensor = |name: &str, shape: &[usize], size: f32| {
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| random(&mut state, size).to_le_bytes()).collect();
        writer.tensor(name, Dtype::F16, shape, &bytes).expect("written");
    };
    let hidden = config.hidden_size;
    tensor("model.embed_tokens.weight", &[config.vocabulary_size, hidden], 1.0);
    for layer in 0..layers {
        for role in LinearRole::ALL {
            let spec = role.spec(&config, layer);
            // Outputs as large as inputs.
            let size = (3.0 / spec.in_features as f32).sqrt();
            tensor(&spec.weight_name(), &[spec.out_features, spec.in_features], size);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensor(&format!("model.layers.{layer}.{norm}.weight"), &[hidden], 1.0);
        }
    }
    tensor("model.norm.weight", &[hidden], 1.0);
    writer.finish().expect("written");
    let words = (0..1 << 20).map(|_| {
        let part = (random(&mut state, 1.0).to_f32() + 1.0) / 2.0;
        format!("w{}", (part * WORDS as f32) as usize % WORDS)
    });
    let text = words.collect::<Vec<_>>().join(" ");
    std::fs::write(out.join("calibration.txt"), text).expect("written");
}

/// The next number of SplitMix64 in `-size..size`.
fn random(state: &mut u64, size: f32) -> f16 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^= value >> 31;
    f16::from_f32(((value >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size)
}
