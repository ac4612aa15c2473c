//! config.json of an imported model, in the older of its two generations (`rope_theta`, `rope_scaling`,
//! `torch_dtype`): transformers 4 and 5 read it.

use nibble_kernels::tensor::FloatType;
use serde_json::{Value, json};

use crate::config::{Architecture, ModelConfig, RopeScaling};

/// config.json of `config`, with the padding token `pad`.
pub(super) fn config_json(config: &ModelConfig, pad: Option<u32>) -> Value {
    let (class, model_type) = match config.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Mistral => ("MistralForCausalLM", "mistral"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let mut json = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": decimal(config.rms_norm_epsilon),
        "rope_theta": decimal(config.rope.theta),
        "rope_scaling": rope_scaling(config.rope.scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": true,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids.first(),
        "pad_token_id": pad,
        "torch_dtype": match config.float_type {
            FloatType::F32 => "float32",
            FloatType::F16 => "float16",
            FloatType::BF16 => "bfloat16",
        },
    });
    match config.architecture {
        Architecture::Llama => {
            json["attention_bias"] = config.attention_bias.into();
            json["mlp_bias"] = config.mlp_bias.into();
        }
        Architecture::Mistral => {}
        Architecture::Qwen2 => json["use_sliding_window"] = false.into(),
        Architecture::Qwen3 => {
            json["attention_bias"] = config.attention_bias.into();
            json["use_sliding_window"] = false.into();
        }
    }
    json
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": decimal(factor) }),
        RopeScaling::Llama3 {
            factor,
            low_frequency_factor,
            high_frequency_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": decimal(factor),
            "low_freq_factor": decimal(low_frequency_factor),
            "high_freq_factor": decimal(high_frequency_factor),
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

/// The shortest decimal that is this `f32`: 1e-6, where the nearest `f64` is 9.999999974752427e-7.
fn decimal(value: f32) -> Value {
    match value.to_string().parse::<f64>() {
        Ok(value) => json!(value),
        Err(_) => json!(value),
    }
}
