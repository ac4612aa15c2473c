//! From a GGUF file to a Hugging Face directory that Nibble and transformers open.
//!
//! ```text
//! config.json, generation_config.json          from the metadata
//! tokenizer.json, tokenizer_config.json,       from the vocabulary in the metadata
//! chat_template.jinja
//! model.safetensors, or shards and an index    decoded blocks, [`weights`]
//! ```
//!
//! What the file holds [`crate::gguf_model`] says. Everything but the elements is checked before the first byte is
//! written, and the directory gets its name when it is complete. One tensor is in memory at a time.
//!
//! Quantized blocks are decoded to the nearest value of the chosen float type. A value beyond its range is refused, not
//! clamped: the model would no longer be the one in the file.

mod config_json;
mod weights;

use std::path::Path;

use nibble_kernels::tensor::FloatType;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::CheckpointWriter;
use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::gguf_model::GgufModel;

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct ImportOptions {
    /// Element type of every tensor.
    pub float_type: FloatType,
    /// Largest size of a weight file, in bytes.
    pub max_shard_bytes: u64,
}

/// How far an import is.
#[derive(Clone, Copy, Debug)]
pub struct ImportProgress<'a> {
    /// Tensors that are written.
    pub tensors_done: usize,
    /// Tensors in all.
    pub tensors: usize,
    /// The tensor written last, by its new name.
    pub tensor: &'a str,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct ImportSummary {
    /// The model's shape.
    pub config: ModelConfig,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of their elements.
    pub bytes: u64,
}

/// Writes the model of the GGUF file `source` to the directory `out`, which must not exist.
///
/// # Errors
/// Names the file and the metadata or tensor that is missing, malformed or not supported. `out` is not there then.
pub fn import(
    source: &Path,
    out: &Path,
    options: ImportOptions,
    progress: &mut dyn FnMut(ImportProgress<'_>),
) -> Result<ImportSummary, CheckpointError> {
    let model = GgufModel::open(source, options.float_type)?;
    let (tokenizer, tokenizer_config) = (model.tokenizer()?, model.tokenizer_config()?);
    let (config, tensors) = (model.config(), model.tensors());

    let mut writer = CheckpointWriter::create(out, options.max_shard_bytes)?;
    let mut bytes = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let elements = weights::convert(&model, tensor, options.float_type)?;
        writer.tensor(&tensor.name, dtype(options.float_type), &tensor.shape, &elements)?;
        bytes += elements.len() as u64;
        progress(ImportProgress { tensors_done: index + 1, tensors: tensors.len(), tensor: &tensor.name });
    }
    let config_json = config_json::config_json(config, model.padding_token());
    let generation = generation_config(config, model.padding_token());
    for (name, value) in [
        ("config.json", &config_json),
        ("generation_config.json", &generation),
        ("tokenizer.json", &tokenizer.json),
        ("tokenizer_config.json", &tokenizer_config),
    ] {
        writer.file(name, format!("{value:#}\n").as_bytes())?;
    }
    if let Some(template) = model.chat_template()? {
        writer.file("chat_template.jinja", template.as_bytes())?;
    }
    writer.finish()?;
    Ok(ImportSummary { config: config.clone(), tensors: tensors.len(), bytes })
}

fn dtype(float_type: FloatType) -> Dtype {
    match float_type {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    }
}

fn generation_config(config: &ModelConfig, pad: Option<u32>) -> Value {
    let mut json = json!({ "_from_model_config": true });
    if let Some(bos) = config.bos_token_id {
        json["bos_token_id"] = bos.into();
    }
    match config.eos_token_ids.as_slice() {
        [] => {}
        [eos] => json["eos_token_id"] = (*eos).into(),
        several => json["eos_token_id"] = json!(several),
    }
    if let Some(pad) = pad {
        json["pad_token_id"] = pad.into();
    }
    json
}
