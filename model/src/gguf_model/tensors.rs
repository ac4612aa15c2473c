//! Which tensor of the GGUF file is which tensor of a Hugging Face checkpoint, and its shape.

use std::collections::BTreeSet;

use crate::config::{Architecture, ModelConfig};
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

/// Not a weight: it holds the scaling of the rotary embedding, which config.json says.
const ROPE_TENSOR: &str = "rope_freqs.weight";

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorPlan {
    /// Its name in the GGUF file.
    pub(crate) source: String,
    /// Its name in the checkpoint.
    pub(crate) name: String,
    /// Its shape in both.
    pub(crate) shape: Vec<usize>,
    /// In which order the file has its rows.
    pub(crate) rows: RowOrder,
}

/// The order of the rows in the GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// As in the checkpoint.
    Same,
    /// The two halves of each head interleaved: llama.cpp rotates neighbours, Hugging Face halves.
    InterleavedHalves {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The row of the file that is row `row` of the checkpoint.
    pub(crate) fn source_row(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::InterleavedHalves { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// Every tensor of the checkpoint, in the order of the layers. Checks that the file has each of them with the shape
/// that the metadata imply, in a type that can be decoded, and nothing else.
pub(super) fn plan(gguf: &GgufFile, config: &ModelConfig) -> Result<Vec<TensorPlan>, CheckpointError> {
    let mut plan = Plan { gguf, tensors: Vec::new() };
    let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
    plan.add("token_embd.weight", "model.embed_tokens.weight", &[vocabulary, hidden], RowOrder::Same)?;
    for layer in 0..config.layers {
        add_layer(&mut plan, config, layer)?;
    }
    plan.add("output_norm.weight", "model.norm.weight", &[hidden], RowOrder::Same)?;
    if !config.tie_word_embeddings {
        plan.add("output.weight", "lm_head.weight", &[vocabulary, hidden], RowOrder::Same)?;
    }
    let planned: BTreeSet<&str> = plan.tensors.iter().map(|tensor| tensor.source.as_str()).collect();
    let other = gguf.tensors().find(|tensor| !planned.contains(tensor.name) && tensor.name != ROPE_TENSOR);
    match other {
        None => Ok(plan.tensors),
        Some(tensor) => Err(CheckpointError::Unsupported {
            file: gguf.path().to_owned(),
            item: format!("tensor \"{}\"", tensor.name),
            found: format!(
                "one that a {:?} model of {} layers does not have",
                config.architecture, config.layers
            ),
            supported: "the tensors of the architecture, all of which are read".to_owned(),
        }),
    }
}

fn add_layer(plan: &mut Plan<'_>, config: &ModelConfig, layer: usize) -> Result<(), CheckpointError> {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let rotary = match config.architecture {
        Architecture::Llama | Architecture::Mistral => {
            RowOrder::InterleavedHalves { head_dim: config.head_dim }
        }
        Architecture::Qwen2 | Architecture::Qwen3 => RowOrder::Same,
    };
    let names =
        |source: &str, name: &str| (format!("blk.{layer}.{source}"), format!("model.layers.{layer}.{name}"));
    let norms = [
        ("attn_norm", "input_layernorm", hidden, true),
        ("attn_q_norm", "self_attn.q_norm", config.head_dim, config.query_key_norm),
        ("attn_k_norm", "self_attn.k_norm", config.head_dim, config.query_key_norm),
        ("ffn_norm", "post_attention_layernorm", hidden, true),
    ];
    for (source, name, width, _) in norms.into_iter().filter(|&(.., present)| present) {
        let (source, name) = names(source, name);
        plan.add(&format!("{source}.weight"), &format!("{name}.weight"), &[width], RowOrder::Same)?;
    }
    let (bias, output_bias, mlp_bias) =
        (config.attention_bias, config.attention_output_bias, config.mlp_bias);
    for (source, name, shape, bias, rows) in [
        ("attn_q", "self_attn.q_proj", [queries, hidden], bias, rotary),
        ("attn_k", "self_attn.k_proj", [keys, hidden], bias, rotary),
        ("attn_v", "self_attn.v_proj", [keys, hidden], bias, RowOrder::Same),
        ("attn_output", "self_attn.o_proj", [hidden, queries], output_bias, RowOrder::Same),
        ("ffn_gate", "mlp.gate_proj", [intermediate, hidden], mlp_bias, RowOrder::Same),
        ("ffn_up", "mlp.up_proj", [intermediate, hidden], mlp_bias, RowOrder::Same),
        ("ffn_down", "mlp.down_proj", [hidden, intermediate], mlp_bias, RowOrder::Same),
    ] {
        let (source, name) = names(source, name);
        plan.add(&format!("{source}.weight"), &format!("{name}.weight"), &shape, rows)?;
        if bias {
            plan.add(&format!("{source}.bias"), &format!("{name}.bias"), &shape[..1], rows)?;
        }
    }
    Ok(())
}

struct Plan<'a> {
    gguf: &'a GgufFile,
    tensors: Vec<TensorPlan>,
}

impl Plan<'_> {
    fn add(
        &mut self,
        source: &str,
        name: &str,
        shape: &[usize],
        rows: RowOrder,
    ) -> Result<(), CheckpointError> {
        let file = self.gguf.path();
        let help = "the tensors do not fit the metadata: fetch the file again or convert the model again";
        let Some(tensor) = self.gguf.tensor(source) else {
            return Err(CheckpointError::tensor(file, source, "missing", format!("{shape:?}"), help));
        };
        if tensor.shape != shape {
            let found = format!("of shape {:?}", tensor.shape);
            return Err(CheckpointError::tensor(file, source, found, format!("{shape:?}"), help));
        }
        tensor.block_type(file)?;
        self.tensors.push(TensorPlan {
            source: source.to_owned(),
            name: name.to_owned(),
            shape: shape.to_vec(),
            rows,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_is_undone() {
        // llama.cpp's permute of 2 heads of 6 rows: reshape(2, 2, 3).swapaxes(1, 2).
        let stored = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let rows = RowOrder::InterleavedHalves { head_dim: 6 };
        let restored: Vec<usize> = (0..12).map(|row| stored[rows.source_row(row)]).collect();
        assert_eq!(restored, (0..12).collect::<Vec<_>>());
    }
}
