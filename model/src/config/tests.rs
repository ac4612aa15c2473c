use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::formats::{ActivationOrder, Format, GptqVersion, GroupSize, ModuleSettings, QuantizationPlan};

/// Llama 3.1 8B, as transformers 4 writes it.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "attention_bias": false,
        "rope_theta": 500000.0,
        "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 },
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    })
}

/// Parses `config` as the config.json of a directory that also holds `beside`.
fn parse_with(config: &Value, beside: &[(&str, Value)]) -> Result<ModelConfig, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    for (name, value) in beside {
        std::fs::write(directory.path().join(name), value.to_string()).unwrap();
    }
    let path = directory.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    ModelConfig::from_file(&path)
}

fn parse(config: &Value) -> Result<ModelConfig, CheckpointError> {
    parse_with(config, &[])
}

/// `llama()` with `changes` merged in; a null removes the field.
fn changed(changes: Value) -> Value {
    let mut config = llama();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

#[test]
fn a_transformers_4_config_is_read_in_full() {
    let config = parse(&llama()).unwrap();
    assert_eq!(
        config,
        ModelConfig {
            architecture: Architecture::Llama,
            vocabulary_size: 128_256,
            hidden_size: 4096,
            intermediate_size: 14_336,
            layers: 32,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            rms_norm_epsilon: 1e-5,
            rope: RopeParameters {
                theta: 500_000.0,
                scaling: RopeScaling::Llama3 {
                    factor: 8.0,
                    low_frequency_factor: 1.0,
                    high_frequency_factor: 4.0,
                    original_max_position_embeddings: 8192,
                },
            },
            tie_word_embeddings: false,
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            query_key_norm: false,
            max_position_embeddings: 131_072,
            sliding_window: None,
            bos_token_id: Some(128_000),
            eos_token_ids: vec![128_001, 128_008, 128_009],
            float_type: FloatType::BF16,
            quantization: None,
        }
    );
}

#[test]
fn the_transformers_5_spelling_means_the_same() {
    let mut rope = llama()["rope_scaling"].clone();
    rope["rope_theta"] = json!(500_000.0);
    let config = changed(json!({
        "rope_theta": null, "rope_scaling": null, "torch_dtype": null,
        "rope_parameters": rope, "dtype": "bfloat16", "layer_types": vec!["full_attention"; 32],
    }));
    assert_eq!(parse(&config).unwrap(), parse(&llama()).unwrap());
}

#[test]
fn each_architecture_has_its_biases_and_norms() {
    let switches = |class: &str, changes: Value| {
        let mut config = changed(changes);
        config["architectures"] = json!([class]);
        let config = parse(&config).unwrap();
        (config.attention_bias, config.attention_output_bias, config.mlp_bias, config.query_key_norm)
    };
    assert_eq!(
        switches("LlamaForCausalLM", json!({ "attention_bias": true, "mlp_bias": true })),
        (true, true, true, false)
    );
    assert_eq!(switches("MistralForCausalLM", json!({})), (false, false, false, false));
    assert_eq!(switches("Qwen2ForCausalLM", json!({})), (true, false, false, false));
    assert_eq!(switches("Qwen3ForCausalLM", json!({})), (false, false, false, true));
}

#[test]
fn qwen_windows_count_only_when_every_layer_has_one() {
    let window = |enabled: bool, full_layers: usize| {
        parse(&changed(json!({
            "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": enabled,
            "sliding_window": 4096, "max_window_layers": full_layers,
        })))
        .map(|config| config.sliding_window)
    };
    assert_eq!(window(false, 0).unwrap(), None);
    assert_eq!(window(true, 32).unwrap(), None);
    assert_eq!(window(true, 0).unwrap(), Some(4096));
    assert!(window(true, 28).unwrap_err().to_string().contains("max_window_layers"));
}

#[test]
fn a_window_that_holds_the_whole_context_is_none() {
    let window = |size: usize| {
        parse(&changed(json!({ "architectures": ["MistralForCausalLM"], "sliding_window": size })))
            .unwrap()
            .sliding_window
    };
    assert_eq!(window(4096), Some(4096));
    assert_eq!(window(131_072), None);
}

#[test]
fn generation_config_adds_end_of_sequence_ids() {
    let config = changed(json!({ "eos_token_id": 7 }));
    let parsed = parse_with(&config, &[("generation_config.json", json!({ "eos_token_id": [7, 9] }))]);
    assert_eq!(parsed.unwrap().eos_token_ids, [7, 9]);
    let parsed = parse_with(&config, &[("generation_config.json", json!({ "eos_token_id": 3 }))]);
    assert_eq!(parsed.unwrap().eos_token_ids, [7, 3]);
}

#[test]
fn the_quantization_is_read_from_either_file() {
    let quantization = json!({ "bits": 4, "group_size": -1, "desc_act": true, "sym": false,
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "meta": { "quantizer": ["gptqmodel:7.7"] } });
    let inside = parse(&changed(json!({ "quantization_config": quantization }))).unwrap();
    let beside = parse_with(&llama(), &[("quantize_config.json", quantization)]).unwrap();
    assert_eq!(inside, beside);
    let quantization = inside.quantization.unwrap();
    let plan = QuantizationPlan {
        settings: ModuleSettings {
            bits: 4,
            group_size: GroupSize::PerChannel,
            symmetric: false,
            activation_order: ActivationOrder::Grouped,
        },
        exceptions: BTreeMap::new(),
        quantize_lm_head: false,
        damp_percent: None,
        quantizer: "gptqmodel:7.7".to_owned(),
    };
    assert_eq!(quantization, QuantizationConfig::plan(Format::Gptq(GptqVersion::V2), &plan).unwrap());
    let written = parse(&changed(json!({ "quantization_config": quantization.to_json() }))).unwrap();
    assert_eq!(written.quantization, Some(quantization));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let quantized = |changes: Value| {
        let mut quantization = json!({ "bits": 4, "group_size": 128, "quant_method": "gptq" });
        for (name, value) in changes.as_object().unwrap() {
            quantization[name] = value.clone();
        }
        json!({ "quantization_config": quantization })
    };
    let mixed: Vec<&str> =
        (0..32).map(|i| if i % 2 == 0 { "full_attention" } else { "sliding_attention" }).collect();
    let cases = [
        (json!({ "architectures": ["GemmaForCausalLM"] }), "GemmaForCausalLM"),
        (json!({ "architectures": null, "model_type": "phi3" }), "phi3"),
        (json!({ "hidden_act": "gelu_pytorch_tanh" }), "gelu_pytorch_tanh"),
        (json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }), "yarn"),
        (json!({ "rope_parameters": { "rope_type": "dynamic" } }), "dynamic"),
        (json!({ "rope_parameters": { "full_attention": { "rope_type": "default" } } }), "full_attention"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (json!({ "layer_types": mixed }), "16 sliding_attention and 16 full_attention"),
        (json!({ "layer_types": vec!["linear_attention"; 32] }), "linear_attention"),
        (json!({ "torch_dtype": "float8_e4m3fn" }), "float8_e4m3fn"),
        (quantized(json!({ "quant_method": "aqlm" })), "aqlm"),
        (quantized(json!({ "bits": 5 })), "bits"),
        (quantized(json!({ "checkpoint_format": "marlin" })), "marlin"),
        (quantized(json!({ "dynamic": { "+:.*down_proj": { "bits": 5 } } })), "+:.*down_proj.bits"),
    ];
    for (change, named) in cases {
        let message = parse(&changed(change)).unwrap_err().to_string();
        assert!(message.contains(named) && message.contains("not supported"), "{message}");
        assert!(message.contains("config.json"), "{message}");
    }
}

#[test]
fn what_is_wrong_names_file_and_field() {
    let cases = [
        (json!({ "hidden_size": null }), "hidden_size"),
        (json!({ "vocab_size": 0 }), "vocab_size"),
        (json!({ "num_hidden_layers": "many" }), "num_hidden_layers"),
        (json!({ "num_key_value_heads": 5 }), "num_key_value_heads"),
        (json!({ "num_attention_heads": 24 }), "hidden_size"),
        (json!({ "head_dim": 127 }), "head_dim"),
        (json!({ "rms_norm_eps": -1.0 }), "rms_norm_eps"),
        (json!({ "eos_token_id": "</s>" }), "eos_token_id"),
        (json!({ "rope_scaling": { "rope_type": "linear" } }), "rope_scaling.factor"),
        (json!({ "layer_types": ["full_attention"] }), "layer_types"),
        (json!({ "quantization_config": { "bits": 4, "group_size": 0 } }), "quantization_config.group_size"),
        (json!({ "quantization_config": [] }), "quantization_config"),
    ];
    for (change, field) in cases {
        let message = parse(&changed(change)).unwrap_err().to_string();
        assert!(message.contains(&format!("field \"{field}\"")), "{message}");
        assert!(message.contains("config.json") && message.contains("expected"), "{message}");
    }
}

#[test]
fn broken_json_is_an_error_with_its_position() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, "{\"hidden_size\": ").unwrap();
    let message = ModelConfig::from_file(&path).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("line 1"), "{message}");
    std::fs::remove_file(&path).unwrap();
    assert!(ModelConfig::from_file(&path).unwrap_err().to_string().contains("cannot read"));
}
