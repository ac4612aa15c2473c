//! The shape of a model, from the metadata of a GGUF file.

use nibble_kernels::tensor::FloatType;

use super::rope;
use crate::config::{Architecture, ModelConfig};
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

const SUPPORTED: &str = "llama (Llama, Mistral, SmolLM), qwen2, qwen3";

/// Reads the shape of the model. Token ids are the tokenizer's part and left empty.
pub(super) fn read(gguf: &GgufFile, float_type: FloatType) -> Result<ModelConfig, CheckpointError> {
    const NAME: &str = "general.architecture";
    let name = gguf.string(NAME)?.ok_or_else(|| gguf.mismatch(NAME, "missing", "an architecture"))?;
    let architecture = match name {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        other => return Err(gguf.unsupported(NAME, format!("\"{other}\""), SUPPORTED)),
    };
    if let Some(parts) = gguf.integer("split.count")?.filter(|&parts| parts > 1) {
        let supported = "one file; join the parts with llama-gguf-split --merge";
        return Err(gguf.unsupported("split.count", parts, supported));
    }
    let metadata = Metadata { gguf, architecture: name };
    if let Some(experts) = metadata.integer("expert_count")?.filter(|&experts| experts > 0) {
        let key = metadata.key("expert_count");
        return Err(gguf.unsupported(&key, experts, "models without a mixture of experts"));
    }
    let (hidden_size, heads) = (metadata.size("embedding_length")?, metadata.size("attention.head_count")?);
    let kv_heads = metadata.optional_size("attention.head_count_kv")?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of attention.head_count {heads}");
        return Err(metadata.mismatch("attention.head_count_kv", kv_heads, expected));
    }
    let head_dim = head_dim(&metadata, hidden_size, heads)?;
    let has = |name: &str| gguf.tensor(name).is_some();
    Ok(ModelConfig {
        architecture,
        vocabulary_size: vocabulary_size(gguf)?,
        hidden_size,
        intermediate_size: metadata.size("feed_forward_length")?,
        layers: metadata.size("block_count")?,
        heads,
        kv_heads,
        head_dim,
        rms_norm_epsilon: metadata.positive("attention.layer_norm_rms_epsilon", None)?,
        rope: rope::read(&metadata, head_dim)?,
        tie_word_embeddings: !has("output.weight"),
        attention_bias: has("blk.0.attn_q.bias"),
        attention_output_bias: has("blk.0.attn_output.bias")
            || architecture == Architecture::Llama && has("blk.0.attn_q.bias"),
        mlp_bias: has("blk.0.ffn_gate.bias"),
        query_key_norm: architecture == Architecture::Qwen3,
        max_position_embeddings: metadata.size("context_length")?,
        sliding_window: None,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        float_type,
        quantization: None,
    })
}

/// Rows of the embedding table: the metadata need not say.
fn vocabulary_size(gguf: &GgufFile) -> Result<usize, CheckpointError> {
    const NAME: &str = "token_embd.weight";
    let help = "the file is incomplete: fetch it again or convert the model again";
    match gguf.tensor(NAME).map(|tensor| tensor.shape) {
        Some(&[rows, _]) if rows > 0 => Ok(rows),
        Some(shape) => {
            let found = format!("of shape {shape:?}");
            Err(CheckpointError::tensor(gguf.path(), NAME, found, "a matrix", help))
        }
        None => Err(CheckpointError::tensor(gguf.path(), NAME, "missing", "present", help)),
    }
}

fn head_dim(metadata: &Metadata<'_>, hidden_size: usize, heads: usize) -> Result<usize, CheckpointError> {
    let head_dim = match metadata.optional_size("attention.key_length")? {
        Some(size) => size,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a multiple of attention.head_count {heads}");
            return Err(metadata.mismatch("embedding_length", hidden_size, expected));
        }
    };
    if let Some(size) = metadata.optional_size("attention.value_length")?.filter(|&size| size != head_dim) {
        let expected = format!("{head_dim}, the width of a key");
        return Err(metadata.mismatch("attention.value_length", size, expected));
    }
    if let Some(size) = metadata.optional_size("rope.dimension_count")?.filter(|&size| size != head_dim) {
        let supported = format!("{head_dim}: rotation of the whole head");
        return Err(metadata.gguf.unsupported(&metadata.key("rope.dimension_count"), size, supported));
    }
    match head_dim % 2 {
        0 => Ok(head_dim),
        _ => Err(metadata.mismatch("attention.key_length", head_dim, "an even number, for the rotation")),
    }
}

/// The metadata of one architecture: keys that begin with its name.
pub(super) struct Metadata<'a> {
    pub(super) gguf: &'a GgufFile,
    pub(super) architecture: &'a str,
}

impl Metadata<'_> {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    pub(super) fn mismatch(
        &self,
        name: &str,
        found: impl ToString,
        expected: impl ToString,
    ) -> CheckpointError {
        self.gguf.mismatch(&self.key(name), found, expected)
    }

    fn integer(&self, name: &str) -> Result<Option<u64>, CheckpointError> {
        self.gguf.integer(&self.key(name))
    }

    /// An integer of at least one that fits 32 bits, as every size of a model does.
    pub(super) fn optional_size(&self, name: &str) -> Result<Option<usize>, CheckpointError> {
        self.integer(name)?
            .map(|value| match u32::try_from(value) {
                Ok(size @ 1..) => Ok(size as usize),
                _ => Err(self.mismatch(name, value, "an integer from 1 to 2^32 - 1")),
            })
            .transpose()
    }

    fn size(&self, name: &str) -> Result<usize, CheckpointError> {
        self.optional_size(name)?.ok_or_else(|| self.mismatch(name, "missing", "a positive integer"))
    }

    /// A finite number above zero, or `default` when absent.
    pub(super) fn positive(&self, name: &str, default: Option<f32>) -> Result<f32, CheckpointError> {
        match self.gguf.float(&self.key(name))?.map(|value| value as f32).or(default) {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(self.mismatch(name, value, "a positive number")),
            None => Err(self.mismatch(name, "missing", "a positive number")),
        }
    }
}
