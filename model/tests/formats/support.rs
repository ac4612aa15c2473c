//! Checkpoints of one layer and their metadata.

use std::path::Path;

use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::{Checkpoint, LinearWeight};
use nibble_model::config::ModelConfig;
use nibble_model::formats::{
    ActivationOrder, Format, GptqVersion, GroupSize, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use serde_json::{Value, json};

pub(crate) fn model_config(quantization: Value) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "quantization_config": quantization,
    })
}

pub(crate) fn parse(quantization: Value) -> Result<QuantizationConfig, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, model_config(quantization).to_string()).unwrap();
    let config = ModelConfig::from_file(&path).map_err(|error| error.to_string())?;
    Ok(config.quantization.expect("a quantized checkpoint"))
}

pub(crate) fn read(
    directory: &Path,
    out_features: usize,
    in_features: usize,
) -> Result<QuantizedMatrix, String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    match checkpoint.linear("x", out_features, in_features).map_err(|error| error.to_string())? {
        LinearWeight::Quantized(matrix) => Ok(matrix),
        LinearWeight::Dense(_) => Err("dense".to_owned()),
    }
}

pub(crate) fn plan(
    settings: ModuleSettings,
    exceptions: &[(&str, Option<ModuleSettings>)],
) -> QuantizationPlan {
    QuantizationPlan {
        settings,
        exceptions: exceptions.iter().map(|&(name, settings)| (name.to_owned(), settings)).collect(),
        quantize_lm_head: false,
        damp_percent: None,
        quantizer: "nibble:test".to_owned(),
    }
}

pub(crate) fn settings(bits: u32, group_size: GroupSize, symmetric: bool) -> ModuleSettings {
    ModuleSettings { bits, group_size, symmetric, activation_order: ActivationOrder::None }
}

pub(crate) const FORMATS: [Format; 4] =
    [Format::Gptq(GptqVersion::V1), Format::Gptq(GptqVersion::V2), Format::Awq, Format::CompressedTensors];
