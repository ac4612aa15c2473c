//! From a GGUF file to a Hugging Face directory that Nibble and transformers open.
//!
//! ```text
//! config.json, generation_config.json          from the metadata, [`architecture`] and [`rope`]
//! tokenizer.json, tokenizer_config.json,       from the vocabulary in the metadata, [`tokenizer`]
//! chat_template.jinja
//! model.safetensors, or shards and an index    decoded blocks, [`weights`]; names and shapes: [`tensors`]
//! ```
//!
//! Everything but the elements is checked before the first byte is written, and the directory gets its name when
//! it is complete. One tensor is in memory at a time.
//!
//! llama.cpp stores the query and key projections of Llama models with the two halves of each head interleaved;
//! that is undone here. Quantized blocks are decoded to the nearest value of the chosen float type. A value beyond
//! its range is refused, not clamped: the model would no longer be the one in the file.
//!
//! Refused by name: other architectures than llama, qwen2 and qwen3, mixtures of experts, files of several
//! parts, tensors that the architecture has no place for.

mod architecture;
mod rope;
mod tensors;
mod tokenizer;
mod weights;

use std::path::Path;

use nibble_kernels::tensor::FloatType;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::CheckpointWriter;
use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

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
    let gguf = GgufFile::open(source)?;
    let mut config = shape(&gguf, options.float_type)?;
    let plan = tensors::plan(&gguf, &config)?;
    let tokenizer = tokenizer::read(&gguf, &config)?;
    config.bos_token_id = tokenizer.bos;
    config.eos_token_ids.clone_from(&tokenizer.eos);

    let mut writer = CheckpointWriter::create(out, options.max_shard_bytes)?;
    let mut bytes = 0;
    for (index, tensor) in plan.iter().enumerate() {
        let elements = weights::convert(&gguf, tensor, options.float_type)?;
        writer.tensor(&tensor.name, dtype(options.float_type), &tensor.shape, &elements)?;
        bytes += elements.len() as u64;
        progress(ImportProgress { tensors_done: index + 1, tensors: plan.len(), tensor: &tensor.name });
    }
    let config_json = architecture::config_json(&config, tokenizer.pad);
    let generation = generation_config(&config, tokenizer.pad);
    for (name, value) in [
        ("config.json", &config_json),
        ("generation_config.json", &generation),
        ("tokenizer.json", &tokenizer.tokenizer),
        ("tokenizer_config.json", &tokenizer.config),
    ] {
        writer.file(name, format!("{value:#}\n").as_bytes())?;
    }
    if let Some(template) = &tokenizer.chat_template {
        writer.file("chat_template.jinja", template.as_bytes())?;
    }
    writer.finish()?;
    Ok(ImportSummary { config, tensors: plan.len(), bytes })
}

/// The shape of the model in `gguf`, written in `float_type`. Token ids are left empty.
///
/// # Errors
/// Names the metadata that is missing, malformed or not supported.
pub(crate) fn shape(gguf: &GgufFile, float_type: FloatType) -> Result<ModelConfig, CheckpointError> {
    architecture::read(gguf, float_type)
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
