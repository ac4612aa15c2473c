//! What a model holds: shape, weights, quantization, tokenizer; for people and for scripts.
//!
//! A weight is what one name stands for: the tensors of a quantized layer are one weight of the matrix's own shape.
//! Bits per weight are all bytes of its tensors, scales and indices included, over the elements of the matrix.

mod directory;
mod gguf;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::{ModelConfig, RopeScaling};
use crate::error::CheckpointError;

/// What a model holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The directory or file.
    pub path: PathBuf,
    /// `safetensors` or `gguf`.
    pub format: &'static str,
    /// The architecture, as config.json or the GGUF metadata name it.
    pub architecture: String,
    /// The sizes; `None` for a GGUF file of an architecture that is not supported.
    pub shape: Option<Shape>,
    /// Elements of all weights.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// `8 * bytes / parameters`.
    pub bits_per_weight: f64,
    /// How linear layers are quantized, as the files say: `quantization_config`, or the types of a GGUF file.
    pub quantization: Option<serde_json::Value>,
    /// Whether there is a tokenizer.
    pub tokenizer: bool,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// Kinds of decoder layers.
    pub layers: Vec<LayerKind>,
    /// Every weight, in the order of the model.
    pub weights: Vec<Weight>,
}

/// The sizes of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shape {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocabulary_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How they are stretched: `none`, `linear`, `llama3`.
    pub rope_scaling: &'static str,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Decoder layers with the same weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerKind {
    /// Which, ascending.
    pub layers: Vec<usize>,
    /// Elements of one layer.
    pub parameters: u64,
    /// Bytes of one layer.
    pub bytes: u64,
    /// `8 * bytes / parameters`.
    pub bits_per_weight: f64,
}

/// One weight.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Weight {
    /// Its name; that of the layer for a quantized one.
    pub name: String,
    /// The decoder layer it belongs to, if it does.
    pub layer: Option<usize>,
    /// How its elements are stored: `F16`, `Q4_K`, `INT4`.
    pub dtype: String,
    /// Its shape, `[out_features, in_features]` for a matrix.
    pub shape: Vec<usize>,
    /// Its elements.
    pub parameters: u64,
    /// The bytes of its tensors.
    pub bytes: u64,
    /// `8 * bytes / parameters`.
    pub bits_per_weight: f64,
    /// Elements that share a scale; `None` for one that is not quantized.
    pub group_size: Option<usize>,
}

/// Looks into the model at `path`: a directory or a GGUF file.
///
/// # Errors
/// Names what is missing, damaged or not supported.
pub fn inspect(path: &Path) -> Result<Inspection, CheckpointError> {
    if path.is_dir() { directory::inspect(path) } else { gguf::inspect(path) }
}

/// What the two kinds of files have in common.
struct Contents {
    format: &'static str,
    architecture: String,
    shape: Option<Shape>,
    quantization: Option<serde_json::Value>,
    tokenizer: bool,
    chat_template: bool,
    weights: Vec<Weight>,
}

impl Contents {
    fn summarize(mut self, path: &Path) -> Inspection {
        // Outside of the layers first, then layer by layer: names sort 10 before 2.
        self.weights.sort_by(|a, b| (a.layer, &a.name).cmp(&(b.layer, &b.name)));
        let parameters = self.weights.iter().map(|weight| weight.parameters).sum();
        let bytes = self.weights.iter().map(|weight| weight.bytes).sum();
        Inspection {
            path: path.to_owned(),
            format: self.format,
            architecture: self.architecture,
            shape: self.shape,
            parameters,
            bytes,
            bits_per_weight: bits_per_weight(bytes, parameters),
            quantization: self.quantization,
            tokenizer: self.tokenizer,
            chat_template: self.chat_template,
            layers: kinds(&self.weights),
            weights: self.weights,
        }
    }
}

impl Inspection {
    /// The weights of a decoder layer, or those outside of the layers.
    pub fn weights_of(&self, layer: Option<usize>) -> impl Iterator<Item = &Weight> {
        self.weights.iter().filter(move |weight| weight.layer == layer)
    }
}

impl Weight {
    fn new(name: &str, layer: Option<usize>, dtype: impl ToString, shape: &[usize], bytes: usize) -> Self {
        let parameters = shape.iter().map(|&size| size as u64).product();
        let bytes = bytes as u64;
        Self {
            name: name.to_owned(),
            layer,
            dtype: dtype.to_string(),
            shape: shape.to_vec(),
            parameters,
            bytes,
            bits_per_weight: bits_per_weight(bytes, parameters),
            group_size: None,
        }
    }

    /// Its name within its layer.
    pub fn short_name(&self) -> &str {
        match self.layer {
            Some(layer) => self.name.split_once(&format!(".{layer}.")).map_or(&self.name, |(_, name)| name),
            None => &self.name,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        self.short_name() == other.short_name()
            && (&self.dtype, &self.shape, self.bytes, self.group_size)
                == (&other.dtype, &other.shape, other.bytes, other.group_size)
    }
}

impl Shape {
    fn of(config: &ModelConfig) -> Self {
        Self {
            layers: config.layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            vocabulary_size: config.vocabulary_size,
            max_position_embeddings: config.max_position_embeddings,
            rope_theta: config.rope.theta,
            rope_scaling: match config.rope.scaling {
                RopeScaling::None => "none",
                RopeScaling::Linear { .. } => "linear",
                RopeScaling::Llama3 { .. } => "llama3",
            },
            tie_word_embeddings: config.tie_word_embeddings,
        }
    }
}

/// The layer number after `prefix` in a tensor's name.
fn layer_of(name: &str, prefix: &str) -> Option<usize> {
    name.strip_prefix(prefix)?.split_once('.')?.0.parse().ok()
}

fn bits_per_weight(bytes: u64, parameters: u64) -> f64 {
    if parameters == 0 { 0.0 } else { 8.0 * bytes as f64 / parameters as f64 }
}

/// The kinds of layers, by their first. `weights` are sorted by layer, then by name.
fn kinds(weights: &[Weight]) -> Vec<LayerKind> {
    let mut kinds: Vec<(&[Weight], LayerKind)> = Vec::new();
    for weights in weights.chunk_by(|a, b| a.layer == b.layer) {
        let Some(layer) = weights.first().and_then(|weight| weight.layer) else { continue };
        let alike = |(other, _): &&mut (&[Weight], LayerKind)| {
            other.len() == weights.len() && other.iter().zip(weights).all(|(a, b)| a.is_like(b))
        };
        if let Some((_, kind)) = kinds.iter_mut().find(alike) {
            kind.layers.push(layer);
            continue;
        }
        let parameters = weights.iter().map(|weight| weight.parameters).sum();
        let bytes = weights.iter().map(|weight| weight.bytes).sum();
        let bits_per_weight = bits_per_weight(bytes, parameters);
        kinds.push((weights, LayerKind { layers: vec![layer], parameters, bytes, bits_per_weight }));
    }
    kinds.into_iter().map(|(_, kind)| kind).collect()
}
