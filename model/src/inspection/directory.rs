//! What a Hugging Face directory holds.

use std::path::Path;

use super::{Contents, Inspection, Shape, Weight, layer_of};
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::config::Fields;
use crate::error::CheckpointError;
use crate::formats::QuantizationConfig;

pub(super) fn inspect(path: &Path) -> Result<Inspection, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    let config = checkpoint.config();
    let weights = checkpoint.tensors().filter_map(|tensor| match &config.quantization {
        Some(quantization) => quantized_weight(&checkpoint, quantization, tensor),
        None => Some(dense_weight(tensor)),
    });
    let contents = Contents {
        format: "safetensors",
        architecture: format!("{:?}", config.architecture),
        shape: Some(Shape::of(config)),
        quantization: config.quantization.as_ref().map(QuantizationConfig::to_json),
        tokenizer: path.join("tokenizer.json").exists(),
        chat_template: has_chat_template(path)?,
        weights: weights.collect(),
    };
    Ok(contents.summarize(path))
}

fn dense_weight(tensor: TensorInfo<'_>) -> Weight {
    Weight::new(
        tensor.name,
        layer(tensor.name),
        format!("{:?}", tensor.dtype),
        tensor.shape,
        tensor.data.len(),
    )
}

/// The weight that begins with `tensor`: the codes of a quantized layer stand for all its tensors, the others of
/// it for none.
fn quantized_weight(
    checkpoint: &Checkpoint,
    quantization: &QuantizationConfig,
    tensor: TensorInfo<'_>,
) -> Option<Weight> {
    let parts = quantization.parts();
    let layer_of_part = parts.iter().find_map(|part| tensor.name.strip_suffix(part)?.strip_suffix('.'));
    let Some(name) = layer_of_part.filter(|name| checkpoint.has(&format!("{name}.{}", parts[0]))) else {
        return Some(dense_weight(tensor));
    };
    // What the metadata or the other tensors do not explain is shown as it lies there.
    let (Some(settings), Some(shape)) =
        (quantization.settings_of(name), quantization.shape_of(checkpoint, name))
    else {
        return Some(dense_weight(tensor));
    };
    if !tensor.name.ends_with(parts[0]) {
        return None;
    }
    let tensors = parts.iter().filter_map(|part| checkpoint.raw(&format!("{name}.{part}")).ok());
    let bytes = tensors.map(|tensor| tensor.data.len()).sum();
    let mut weight = Weight::new(name, layer(name), format!("INT{}", settings.bits), &shape, bytes);
    weight.group_size = Some(settings.group_size.inputs(shape[1]));
    Some(weight)
}

fn layer(name: &str) -> Option<usize> {
    layer_of(name, "model.layers.")
}

fn has_chat_template(path: &Path) -> Result<bool, CheckpointError> {
    let own_file = ["chat_template.jinja", "chat_template.json"].iter().any(|file| path.join(file).exists());
    let config = Fields::read_if_present(&path.join("tokenizer_config.json"))?;
    Ok(own_file || config.is_some_and(|config| config.value("chat_template").is_some()))
}
