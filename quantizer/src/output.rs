//! The files of a quantized checkpoint that are not quantized weights.

use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, TensorInfo};
use nibble_model::error::CheckpointError;
use nibble_model::formats::QuantizationConfig;
use nibble_model::forward::LinearSpec;
use serde_json::{Map, Value};

/// What the names of all decoder layers' tensors begin with; the layer's number follows.
pub(crate) const LAYERS: &str = "model.layers.";
/// Files that are the same for the quantized model.
const COPIED: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
];

/// Copies every tensor that is not part of a decoder layer, nor the weight of the linear layer `but`.
pub(crate) fn copy_shared_tensors(
    checkpoint: &Checkpoint,
    but: Option<&LinearSpec>,
    writer: &mut CheckpointWriter,
) -> Result<(), CheckpointError> {
    let but = but.map(LinearSpec::weight_name);
    let shared =
        |tensor: &TensorInfo<'_>| !tensor.name.starts_with(LAYERS) && but.as_deref() != Some(tensor.name);
    copy_tensors(checkpoint.tensors().filter(shared), writer)
}

/// Copies `tensors` as they are.
pub(crate) fn copy_tensors<'a>(
    tensors: impl Iterator<Item = TensorInfo<'a>>,
    writer: &mut CheckpointWriter,
) -> Result<(), CheckpointError> {
    for tensor in tensors {
        writer.tensor(tensor.name, tensor.dtype, tensor.shape, tensor.data)?;
    }
    Ok(())
}

/// Writes config.json with its `quantization_config` and the intermediate size, which may be padded, for GPTQ also quantize_config.json, and copies the tokenizer's
/// files.
pub(crate) fn write_files(
    checkpoint: &Checkpoint,
    writer: &mut CheckpointWriter,
    quantization: &QuantizationConfig,
) -> Result<(), CheckpointError> {
    let path = checkpoint.path().join("config.json");
    let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
    let help = "correct the file or fetch the model again";
    let mut config: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| CheckpointError::malformed(&path, error, help))?;
    let metadata = quantization.to_json();
    config.insert("intermediate_size".to_owned(), checkpoint.config().intermediate_size.into());
    config.insert("quantization_config".to_owned(), metadata.clone());
    writer.file("config.json", pretty(&Value::Object(config)).as_bytes())?;
    if let QuantizationConfig::Gptq(_) = quantization {
        writer.file("quantize_config.json", pretty(&metadata).as_bytes())?;
    }
    for name in COPIED {
        let path = checkpoint.path().join(name);
        if path.is_file() {
            let contents = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
            writer.file(name, &contents)?;
        }
    }
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
