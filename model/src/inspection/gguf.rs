//! What a GGUF file holds.

use std::collections::BTreeMap;
use std::path::Path;

use nibble_kernels::tensor::FloatType;
use serde_json::json;

use super::{Contents, Inspection, Shape, Weight, layer_of};
use crate::error::CheckpointError;
use crate::gguf::{GgufFile, GgufTensor};
use crate::gguf_model;

pub(super) fn inspect(path: &Path) -> Result<Inspection, CheckpointError> {
    let gguf = GgufFile::open(path)?;
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in gguf.tensors() {
        *types.entry(tensor.element_type.to_string()).or_default() += 1;
    }
    let contents = Contents {
        format: "gguf",
        architecture: gguf.string("general.architecture")?.unwrap_or("unknown").to_owned(),
        // A file that cannot be imported can be looked into all the same.
        shape: gguf_model::shape(&gguf, FloatType::F16).ok().as_ref().map(Shape::of),
        quantization: Some(json!({ "tensors_by_type": types })),
        tokenizer: gguf.metadata("tokenizer.ggml.tokens").is_some(),
        chat_template: gguf.metadata("tokenizer.chat_template").is_some(),
        weights: gguf.tensors().map(weight).collect(),
    };
    Ok(contents.summarize(path))
}

fn weight(tensor: GgufTensor<'_>) -> Weight {
    let layer = layer_of(tensor.name, "blk.");
    let (dtype, bytes) = (tensor.element_type, tensor.data.len());
    let mut weight = Weight::new(tensor.name, layer, dtype, tensor.shape, bytes);
    // Of a type that is one element wide nothing is shared.
    weight.group_size = dtype.block().map(|(elements, _)| elements).filter(|&elements| elements > 1);
    weight
}
