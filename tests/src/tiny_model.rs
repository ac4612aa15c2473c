//! Small random checkpoints of every architecture: seconds to run, no download.
//!
//! The weights are a fixed function of the tensor's number, so that `tests/golden/tiny_models.py` can make the
//! same model in Hugging Face transformers.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Entries of the embedding table.
pub const VOCABULARY: usize = 90;
/// Width of the residual stream.
pub const HIDDEN: usize = 48;
/// Width of the feed-forward layer.
pub const INTERMEDIATE: usize = 80;
/// Query heads.
pub const HEADS: usize = 4;
/// Key and value heads.
pub const KV_HEADS: usize = 2;
/// Width of a head: not `HIDDEN / HEADS`.
pub const HEAD_DIM: usize = 16;
/// Decoder layers.
pub const LAYERS: usize = 2;

/// What distinguishes one tiny model from another.
#[derive(Clone, Copy, Debug)]
pub struct TinyModel {
    /// Names it in golden files.
    pub name: &'static str,
    /// The class in config.json.
    pub class: &'static str,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has one.
    pub output_bias: bool,
    /// Whether query and key heads are normed.
    pub head_norms: bool,
    /// More fields of config.json: a JSON object.
    pub extra: &'static str,
}

const PLAIN: TinyModel = TinyModel {
    name: "llama",
    class: "LlamaForCausalLM",
    tied: true,
    qkv_bias: false,
    output_bias: false,
    head_norms: false,
    extra: r#"{"rope_theta": 10000.0}"#,
};

/// One model of each kind the forward pass distinguishes.
pub const TINY_MODELS: [TinyModel; 6] = [
    PLAIN,
    TinyModel {
        name: "llama 3.1 rope scaling",
        extra: r#"{"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#,
        ..PLAIN
    },
    TinyModel {
        name: "llama with attention biases and linear rope scaling",
        tied: false,
        qkv_bias: true,
        output_bias: true,
        extra: r#"{"attention_bias": true, "rope_parameters": {"rope_type": "linear", "factor": 4.0,
            "rope_theta": 10000.0}}"#,
        ..PLAIN
    },
    TinyModel {
        name: "mistral with a sliding window",
        class: "MistralForCausalLM",
        tied: false,
        extra: r#"{"rope_theta": 10000.0, "sliding_window": 21}"#,
        ..PLAIN
    },
    TinyModel {
        name: "qwen2",
        class: "Qwen2ForCausalLM",
        tied: false,
        qkv_bias: true,
        extra: r#"{"rope_theta": 1000000.0}"#,
        ..PLAIN
    },
    TinyModel { name: "qwen3", class: "Qwen3ForCausalLM", head_norms: true, ..PLAIN },
];

/// `count` reproducible values in -1.0..1.0.
pub fn random(count: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// `count` reproducible tokens of the vocabulary.
pub fn tokens(count: usize, seed: usize) -> Vec<u32> {
    random(count, seed).iter().map(|value| ((value + 1.0) / 2.0 * VOCABULARY as f32) as u32).collect()
}

impl TinyModel {
    /// The tiny model `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn named(name: &str) -> Self {
        let found = TINY_MODELS.into_iter().find(|model| model.name == name);
        found.unwrap_or_else(|| panic!("no tiny model is named {name:?}"))
    }

    /// Writes config.json and model.safetensors (F32) into `directory`.
    ///
    /// # Panics
    /// When the files cannot be written.
    pub fn write(&self, directory: &Path) {
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .shapes()
            .into_iter()
            .enumerate()
            .map(|(index, (name, shape))| {
                let values = random(shape.iter().product(), index + 1);
                let bytes = values.iter().flat_map(|value| (value * 0.5).to_le_bytes()).collect();
                (name, shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            (name.clone(), view.expect("shape and bytes agree"))
        });
        safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("written");
        std::fs::write(directory.join("config.json"), self.config().to_string()).expect("written");
    }

    /// The contents of config.json.
    ///
    /// # Panics
    /// When `extra` is not a JSON object.
    pub fn config(&self) -> Value {
        let mut config = json!({
            "architectures": [self.class],
            "model_type": self.class.trim_end_matches("ForCausalLM").to_lowercase(),
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        let extra: Value = serde_json::from_str(self.extra).expect("extra fields are JSON");
        for (name, value) in extra.as_object().expect("extra fields are an object") {
            config[name] = value.clone();
        }
        config
    }

    /// Every tensor with its shape; tensor `i` holds half of `random(elements, i + 1)`.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
            ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ];
        if !self.tied {
            shapes.push(("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]));
        }
        let (query, key) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for layer in 0..LAYERS {
            let mut add = |name: &str, shape: Vec<usize>| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape));
            };
            add("input_layernorm.weight", vec![HIDDEN]);
            add("post_attention_layernorm.weight", vec![HIDDEN]);
            for (name, width) in [("q", query), ("k", key), ("v", key)] {
                add(&format!("self_attn.{name}_proj.weight"), vec![width, HIDDEN]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), vec![width]);
                }
            }
            if self.head_norms {
                add("self_attn.q_norm.weight", vec![HEAD_DIM]);
                add("self_attn.k_norm.weight", vec![HEAD_DIM]);
            }
            add("self_attn.o_proj.weight", vec![HIDDEN, query]);
            if self.output_bias {
                add("self_attn.o_proj.bias", vec![HIDDEN]);
            }
            add("mlp.gate_proj.weight", vec![INTERMEDIATE, HIDDEN]);
            add("mlp.up_proj.weight", vec![INTERMEDIATE, HIDDEN]);
            add("mlp.down_proj.weight", vec![HIDDEN, INTERMEDIATE]);
        }
        shapes
    }
}
