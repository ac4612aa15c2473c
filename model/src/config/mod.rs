//! config.json: the shape of a model.
//!
//! Both generations of Hugging Face files: `rope_theta`, `rope_scaling`, `torch_dtype`, and transformers 5's
//! `rope_parameters`, `dtype`, `layer_types`. End-of-sequence ids also come from generation_config.json,
//! the quantization also from quantize_config.json, where these lie beside.
//!
//! Refused by name, never guessed: unknown architectures, activations, rope types, element types,
//! quantization methods, and layers that mix sliding and full attention.

mod fields;
mod rope;
#[cfg(test)]
mod tests;

use std::path::Path;

use nibble_kernels::tensor::FloatType;

pub(crate) use fields::Fields;
pub use rope::{RopeParameters, RopeScaling};

use crate::error::CheckpointError;
use crate::formats::QuantizationConfig;

/// The decoder architectures Nibble runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2, 3, 3.1 and later; SmolLM2 and others of this shape.
    Llama,
    /// Mistral: Llama with an optional sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: a norm on each query and key head.
    Qwen3,
}

impl Architecture {
    const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

    fn parse(config: &Fields) -> Result<Self, CheckpointError> {
        let classes: Option<Vec<String>> = config.optional("architectures", "a list of class names")?;
        if let Some(class) = classes.as_ref().and_then(|classes| classes.first()) {
            return match class.as_str() {
                "LlamaForCausalLM" => Ok(Self::Llama),
                "MistralForCausalLM" => Ok(Self::Mistral),
                "Qwen2ForCausalLM" => Ok(Self::Qwen2),
                "Qwen3ForCausalLM" => Ok(Self::Qwen3),
                other => Err(config.unsupported("architectures", other, Self::SUPPORTED)),
            };
        }
        match config.required::<String>("model_type", "a string")?.as_str() {
            "llama" => Ok(Self::Llama),
            "mistral" => Ok(Self::Mistral),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            other => Err(config.unsupported("model_type", other, "llama, mistral, qwen2, qwen3")),
        }
    }
}

/// The shape of a decoder model, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which architecture.
    pub architecture: Architecture,
    /// Rows of the embedding table and of the output head.
    pub vocabulary_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_epsilon: f32,
    /// Rotary position embedding.
    pub rope: RopeParameters,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub attention_output_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Whether each query and key head is RMS-normed before the rotation.
    pub query_key_norm: bool,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Every layer attends to this many last tokens only; `None` when it reaches the whole context.
    pub sliding_window: Option<usize>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation, of config.json and generation_config.json, without repetition.
    pub eos_token_ids: Vec<u32>,
    /// Element type of the unquantized weights, as declared.
    pub float_type: FloatType,
    /// How the linear layers are quantized, if they are.
    pub quantization: Option<QuantizationConfig>,
}

impl ModelConfig {
    /// Reads config.json at `path`, and generation_config.json and quantize_config.json beside it.
    ///
    /// # Errors
    /// Names the file and the field that is missing, malformed, inconsistent or not supported.
    pub fn from_file(path: &Path) -> Result<Self, CheckpointError> {
        let config = Fields::read(path)?;
        let architecture = Architecture::parse(&config)?;
        require_silu(&config)?;
        let (layers, heads) = (config.size("num_hidden_layers")?, config.size("num_attention_heads")?);
        let max_position_embeddings = config.size("max_position_embeddings")?;
        let bias_switch = match architecture {
            Architecture::Llama | Architecture::Qwen3 => config.flag("attention_bias", false)?,
            Architecture::Mistral | Architecture::Qwen2 => false,
        };
        Ok(Self {
            architecture,
            vocabulary_size: config.size("vocab_size")?,
            hidden_size: config.size("hidden_size")?,
            intermediate_size: config.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: key_value_heads(&config, heads)?,
            head_dim: head_dim(&config, heads)?,
            rms_norm_epsilon: config.positive("rms_norm_eps", 1e-6)?,
            rope: rope::parse(&config)?,
            tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
            attention_bias: bias_switch || architecture == Architecture::Qwen2,
            attention_output_bias: bias_switch,
            mlp_bias: architecture == Architecture::Llama && config.flag("mlp_bias", false)?,
            query_key_norm: architecture == Architecture::Qwen3,
            max_position_embeddings,
            sliding_window: sliding_window(&config, architecture, layers)?
                .filter(|&window| window < max_position_embeddings),
            bos_token_id: config.ids("bos_token_id")?.first().copied(),
            eos_token_ids: eos_token_ids(&config, path)?,
            float_type: float_type(&config)?,
            quantization: quantization(&config, path)?,
        })
    }
}

fn require_silu(config: &Fields) -> Result<(), CheckpointError> {
    match config.optional::<String>("hidden_act", "a string")?.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(config.unsupported("hidden_act", other, "silu")),
    }
}

fn key_value_heads(config: &Fields, heads: usize) -> Result<usize, CheckpointError> {
    const NAME: &str = "num_key_value_heads";
    let kv_heads = if config.value(NAME).is_some() { config.size(NAME)? } else { heads };
    if heads.is_multiple_of(kv_heads) {
        Ok(kv_heads)
    } else {
        Err(config.mismatch(NAME, kv_heads, format!("a divisor of num_attention_heads {heads}")))
    }
}

fn head_dim(config: &Fields, heads: usize) -> Result<usize, CheckpointError> {
    let head_dim = if config.value("head_dim").is_some() {
        config.size("head_dim")?
    } else {
        let hidden_size = config.size("hidden_size")?;
        if hidden_size % heads != 0 {
            let expected = format!("a multiple of num_attention_heads {heads}, or a head_dim beside");
            return Err(config.mismatch("hidden_size", hidden_size, expected));
        }
        hidden_size / heads
    };
    if head_dim % 2 == 0 {
        Ok(head_dim)
    } else {
        Err(config.mismatch("head_dim", head_dim, "an even number, for the rotary embedding"))
    }
}

fn sliding_window(
    config: &Fields,
    architecture: Architecture,
    layers: usize,
) -> Result<Option<usize>, CheckpointError> {
    const NAME: &str = "sliding_window";
    let window = if config.value(NAME).is_some() { Some(config.size(NAME)?) } else { None };
    if let Some(kinds) = config.optional::<Vec<String>>("layer_types", "a list of strings")? {
        if kinds.len() != layers {
            let expected = format!("one entry for each of num_hidden_layers {layers}");
            return Err(config.mismatch("layer_types", format!("a list of {}", kinds.len()), expected));
        }
        const SUPPORTED: &str = "full_attention or sliding_attention, the same in every layer";
        if let Some(other) =
            kinds.iter().find(|kind| !matches!(kind.as_str(), "full_attention" | "sliding_attention"))
        {
            return Err(config.unsupported("layer_types", other, SUPPORTED));
        }
        let sliding = kinds.iter().filter(|kind| *kind == "sliding_attention").count();
        return match sliding {
            0 => Ok(None),
            _ if sliding == layers => config.size(NAME).map(Some),
            _ => Err(config.unsupported(
                "layer_types",
                format!("{sliding} sliding_attention and {} full_attention", layers - sliding),
                SUPPORTED,
            )),
        };
    }
    match architecture {
        Architecture::Llama => Ok(None),
        Architecture::Mistral => Ok(window),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            if !config.flag("use_sliding_window", false)? {
                return Ok(None);
            }
            // The first `max_window_layers` layers see the whole context, the others a window.
            let full: usize = config.required("max_window_layers", "a number of layers")?;
            match full {
                0 => Ok(window),
                _ if full >= layers => Ok(None),
                _ => Err(config.unsupported(
                    "max_window_layers",
                    full,
                    format!("0 or num_hidden_layers {layers}: the same attention in every layer"),
                )),
            }
        }
    }
}

fn eos_token_ids(config: &Fields, path: &Path) -> Result<Vec<u32>, CheckpointError> {
    let mut ids = config.ids("eos_token_id")?;
    if let Some(generation) = Fields::read_if_present(&path.with_file_name("generation_config.json"))? {
        ids.extend(generation.ids("eos_token_id")?);
    }
    let mut unique = Vec::with_capacity(ids.len());
    for id in ids {
        if !unique.contains(&id) {
            unique.push(id);
        }
    }
    Ok(unique)
}

fn float_type(config: &Fields) -> Result<FloatType, CheckpointError> {
    let name = if config.value("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.optional::<String>(name, "a string")?.as_deref() {
        None | Some("float32") => Ok(FloatType::F32),
        Some("float16") => Ok(FloatType::F16),
        Some("bfloat16") => Ok(FloatType::BF16),
        Some(other) => Err(config.unsupported(name, other, "float32, float16, bfloat16")),
    }
}

fn quantization(config: &Fields, path: &Path) -> Result<Option<QuantizationConfig>, CheckpointError> {
    if let Some(fields) = config.object("quantization_config")? {
        return QuantizationConfig::parse(&fields).map(Some);
    }
    Fields::read_if_present(&path.with_file_name("quantize_config.json"))?
        .map(|fields| QuantizationConfig::parse(&fields))
        .transpose()
}
