//! One decoder layer: attention and gated feed-forward, each on a normed copy of the residual stream.
//!
//! ```text
//! residual += addend;     x = rms_norm(residual)
//! q, k, v = projections(x); (norm q, k heads); rotate; write cache; a = attention(q, cache)
//! residual += o(a);       x = rms_norm(residual)
//! addend   = down(silu(gate(x)) * up(x))          added by the norm that comes next
//! ```

use std::collections::HashMap;

use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;
use nibble_kernels::ops::{paged_attention, rms_norm, rotary_embedding, silu_mul};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::forward::ModelError;
use crate::forward::linear::{Linear, LinearSpec, upload};
use crate::forward::rotary::RotaryTables;
use crate::forward::step::Step;

/// The linear layers of a decoder layer, in the order they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearRole {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Output projection of attention.
    AttentionOutput,
    /// Gate projection.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
}

impl LinearRole {
    /// All of them, in the order they run.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::AttentionOutput, Self::Gate, Self::Up, Self::Down];

    /// The name and shape of this linear layer in decoder layer `layer`.
    pub fn spec(self, config: &ModelConfig, layer: usize) -> LinearSpec {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let (query, key) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (name, out_features, in_features, bias) = match self {
            Self::Query => ("self_attn.q_proj", query, hidden, config.attention_bias),
            Self::Key => ("self_attn.k_proj", key, hidden, config.attention_bias),
            Self::Value => ("self_attn.v_proj", key, hidden, config.attention_bias),
            Self::AttentionOutput => ("self_attn.o_proj", hidden, query, config.attention_output_bias),
            Self::Gate => ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
            Self::Up => ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
            Self::Down => ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
        };
        LinearSpec { name: format!("model.layers.{layer}.{name}"), out_features, in_features, bias }
    }
}

/// The norms of a decoder layer that linear layers come after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormRole {
    /// Before attention.
    Input,
    /// Before the feed-forward block.
    PostAttention,
}

impl NormRole {
    /// The name of its weight in decoder layer `layer`.
    pub fn name(self, layer: usize) -> String {
        match self {
            Self::Input => norm_name(layer, INPUT_NORM),
            Self::PostAttention => norm_name(layer, POST_ATTENTION_NORM),
        }
    }
}

const INPUT_NORM: &str = "input_layernorm";
const POST_ATTENTION_NORM: &str = "post_attention_layernorm";
const QUERY_NORM: &str = "self_attn.q_norm";
const KEY_NORM: &str = "self_attn.k_norm";

/// The names and lengths of the norms of decoder layer `layer`.
pub(crate) fn norms(config: &ModelConfig, layer: usize) -> impl Iterator<Item = (String, usize)> {
    let hidden = [(INPUT_NORM, config.hidden_size), (POST_ATTENTION_NORM, config.hidden_size)];
    let heads = [(QUERY_NORM, config.head_dim), (KEY_NORM, config.head_dim)];
    let heads = if config.query_key_norm { &heads[..] } else { &[] }.to_vec();
    hidden.into_iter().chain(heads).map(move |(name, length)| (norm_name(layer, name), length))
}

fn norm_name(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

/// The weights of one decoder layer on a device.
pub struct DecoderLayer<B: Backend> {
    input_norm: B::Buffer,
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    head_norms: Option<HeadNorms<B>>,
    attention_output: Linear<B>,
    post_attention_norm: B::Buffer,
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

struct HeadNorms<B: Backend> {
    query: B::Buffer,
    key: B::Buffer,
}

/// Keys and values of one layer, in the layout of [`paged_attention`].
pub(crate) struct LayerCache<B: Backend> {
    keys: B::Cache,
    values: B::Cache,
}

impl<B: Backend> LayerCache<B> {
    /// A zeroed cache of `blocks` blocks.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub(crate) fn new(backend: &B, config: &ModelConfig, blocks: usize) -> Result<Self, KernelError> {
        let elements = paged_attention::cache_elements(blocks, config.kv_heads, config.head_dim);
        Ok(Self { keys: backend.cache(elements)?, values: backend.cache(elements)? })
    }
}

/// The activations of a step, allocated once for the largest step.
pub(crate) struct Activations<B: Backend> {
    /// `[rows, hidden]`: the sum of everything so far.
    pub(crate) residual: B::Buffer,
    /// `[rows, hidden]`: the output of the block before, not yet added.
    pub(crate) addend: B::Buffer,
    pub(crate) normed: B::Buffer,
    query: B::Buffer,
    normed_query: B::Buffer,
    key: B::Buffer,
    normed_key: B::Buffer,
    value: B::Buffer,
    pub(crate) attention: B::Buffer,
    gate: B::Buffer,
    up: B::Buffer,
    pub(crate) gated: B::Buffer,
}

impl<B: Backend> Activations<B> {
    /// Buffers for steps of up to `rows` rows.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub(crate) fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self, KernelError> {
        let query = rows * config.heads * config.head_dim;
        let key = rows * config.kv_heads * config.head_dim;
        let normed_heads = |elements| backend.buffer(if config.query_key_norm { elements } else { 0 });
        Ok(Self {
            residual: backend.buffer(rows * config.hidden_size)?,
            addend: backend.buffer(rows * config.hidden_size)?,
            normed: backend.buffer(rows * config.hidden_size)?,
            query: backend.buffer(query)?,
            normed_query: normed_heads(query)?,
            key: backend.buffer(key)?,
            normed_key: normed_heads(key)?,
            value: backend.buffer(key)?,
            attention: backend.buffer(query)?,
            gate: backend.buffer(rows * config.intermediate_size)?,
            up: backend.buffer(rows * config.intermediate_size)?,
            gated: backend.buffer(rows * config.intermediate_size)?,
        })
    }
}

/// What a layer needs besides its weights, its cache and the activations.
pub(crate) struct LayerContext<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a ModelConfig,
    pub(crate) rotary: &'a RotaryTables<B>,
    pub(crate) step: &'a Step<B>,
}

impl<B: Backend> DecoderLayer<B> {
    /// Reads layer `index` from `checkpoint`, its linear layers side by side: to unpack and pack them takes longer than to
    /// read them.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device has no kernel for it.
    pub fn load(backend: &B, checkpoint: &Checkpoint, index: usize) -> Result<Self, ModelError> {
        let load = |role: LinearRole| {
            Linear::load(backend, checkpoint, &role.spec(checkpoint.config(), index))
                .map(|linear| (role, linear))
        };
        let mut linears = std::thread::scope(|scope| {
            let loading = LinearRole::ALL.map(|role| scope.spawn(move || load(role)));
            let loaded = loading
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            loaded.collect::<Result<HashMap<_, _>, _>>()
        })?;
        Self::load_with(backend, checkpoint, index, |role| {
            Ok(linears.remove(&role).unwrap_or_else(|| unreachable!("each role is asked for once")))
        })
    }

    /// Reads the norms of layer `index` from `checkpoint` and takes each linear layer from `linear`.
    ///
    /// # Errors
    /// When a norm is missing or malformed, and those of `linear`.
    pub fn load_with<E: From<ModelError>>(
        backend: &B,
        checkpoint: &Checkpoint,
        index: usize,
        linear: impl FnMut(LinearRole) -> Result<Linear<B>, E>,
    ) -> Result<Self, E> {
        let norm = |name: &str, length: usize| -> Result<B::Buffer, ModelError> {
            let values = checkpoint.vector(&norm_name(index, name), length)?;
            Ok(upload(backend, &values)?)
        };
        Self::build(checkpoint.config(), norm, linear)
    }

    /// Makes a layer whose norms, by the last part of their names and their lengths, come from `norm` and whose linear
    /// layers come from `linear`.
    ///
    /// # Errors
    /// Those of `norm` and `linear`.
    pub(super) fn build<E: From<ModelError>>(
        config: &ModelConfig,
        norm: impl Fn(&str, usize) -> Result<B::Buffer, ModelError>,
        mut linear: impl FnMut(LinearRole) -> Result<Linear<B>, E>,
    ) -> Result<Self, E> {
        let head_norms = if config.query_key_norm {
            Some(HeadNorms {
                query: norm(QUERY_NORM, config.head_dim)?,
                key: norm(KEY_NORM, config.head_dim)?,
            })
        } else {
            None
        };
        Ok(Self {
            input_norm: norm(INPUT_NORM, config.hidden_size)?,
            query: linear(LinearRole::Query)?,
            key: linear(LinearRole::Key)?,
            value: linear(LinearRole::Value)?,
            head_norms,
            attention_output: linear(LinearRole::AttentionOutput)?,
            post_attention_norm: norm(POST_ATTENTION_NORM, config.hidden_size)?,
            gate: linear(LinearRole::Gate)?,
            up: linear(LinearRole::Up)?,
            down: linear(LinearRole::Down)?,
        })
    }

    /// Replaces one linear layer, as the quantizer does once it has quantized it.
    pub fn replace(&mut self, role: LinearRole, linear: Linear<B>) {
        *match role {
            LinearRole::Query => &mut self.query,
            LinearRole::Key => &mut self.key,
            LinearRole::Value => &mut self.value,
            LinearRole::AttentionOutput => &mut self.attention_output,
            LinearRole::Gate => &mut self.gate,
            LinearRole::Up => &mut self.up,
            LinearRole::Down => &mut self.down,
        } = linear;
    }

    /// Replaces the weight of a norm, `[hidden_size]`, as the quantizer does when it moves scales from a norm to the
    /// linear layers after it.
    ///
    /// # Errors
    /// When the device refuses the buffer.
    pub fn replace_norm(&mut self, backend: &B, role: NormRole, weight: &[f32]) -> Result<(), KernelError> {
        *match role {
            NormRole::Input => &mut self.input_norm,
            NormRole::PostAttention => &mut self.post_attention_norm,
        } = upload(backend, weight)?;
        Ok(())
    }

    /// Runs the layer over the rows of a step: adds to `residual`, and leaves its last output in `addend`.
    ///
    /// `first` says that there is no addend yet.
    pub(crate) fn forward(
        &self,
        context: &LayerContext<'_, B>,
        cache: &mut LayerCache<B>,
        activations: &mut Activations<B>,
        first: bool,
    ) -> Result<(), KernelError> {
        self.attention_input(context, activations, !first)?;
        self.attend(context, cache, activations)?;
        self.project_attention(context, activations)?;
        self.feed_forward_input(context, activations, true)?;
        self.gate(context, activations)?;
        self.project_gated(context, activations)
    }

    /// The input of query, key and value, in `normed`; `add` says that there is an addend to add first.
    pub(crate) fn attention_input(
        &self,
        context: &LayerContext<'_, B>,
        activations: &mut Activations<B>,
        add: bool,
    ) -> Result<(), KernelError> {
        hidden_norm(context, activations, &self.input_norm, add)
    }

    /// The input of gate and up, in `normed`; `add` says that there is an addend to add first.
    pub(crate) fn feed_forward_input(
        &self,
        context: &LayerContext<'_, B>,
        activations: &mut Activations<B>,
        add: bool,
    ) -> Result<(), KernelError> {
        hidden_norm(context, activations, &self.post_attention_norm, add)
    }

    /// `normed` to `gated`, the input of down.
    pub(crate) fn gate(
        &self,
        context: &LayerContext<'_, B>,
        activations: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        let LayerContext { backend, config, step, .. } = *context;
        let rows = step.rows;
        let layers = [(&self.gate, &mut activations.gate), (&self.up, &mut activations.up)];
        Linear::forward_together(backend, &activations.normed, layers, rows)?;
        backend.silu_mul(silu_mul::Args {
            gate: &activations.gate,
            up: &activations.up,
            output: &mut activations.gated,
            elements: rows * config.intermediate_size,
        })
    }

    /// `gated` to `addend`.
    pub(crate) fn project_gated(
        &self,
        context: &LayerContext<'_, B>,
        activations: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        let LayerContext { backend, step, .. } = *context;
        self.down.forward(backend, &activations.gated, &mut activations.addend, step.rows)
    }

    /// `attention` to `addend`.
    pub(crate) fn project_attention(
        &self,
        context: &LayerContext<'_, B>,
        activations: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        let LayerContext { backend, step, .. } = *context;
        self.attention_output.forward(backend, &activations.attention, &mut activations.addend, step.rows)
    }

    /// `normed` to `attention`, the input of the output projection; writes the cache.
    pub(crate) fn attend(
        &self,
        context: &LayerContext<'_, B>,
        cache: &mut LayerCache<B>,
        activations: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        let LayerContext { backend, config, rotary, step } = *context;
        let (rows, heads, kv_heads, head_dim) = (step.rows, config.heads, config.kv_heads, config.head_dim);
        let layers = [
            (&self.query, &mut activations.query),
            (&self.key, &mut activations.key),
            (&self.value, &mut activations.value),
        ];
        Linear::forward_together(backend, &activations.normed, layers, rows)?;
        if let Some(norms) = &self.head_norms {
            let head_norm = |input: &mut B::Buffer, output: &mut B::Buffer, weight, rows| {
                let epsilon = config.rms_norm_epsilon;
                let args = rms_norm::Args {
                    residual: input,
                    addend: None,
                    weight,
                    output,
                    rows,
                    width: head_dim,
                    epsilon,
                };
                backend.rms_norm(args)
            };
            head_norm(&mut activations.query, &mut activations.normed_query, &norms.query, rows * heads)?;
            head_norm(&mut activations.key, &mut activations.normed_key, &norms.key, rows * kv_heads)?;
            std::mem::swap(&mut activations.query, &mut activations.normed_query);
            std::mem::swap(&mut activations.key, &mut activations.normed_key);
        }
        backend.rotary_embedding(rotary_embedding::Args {
            query: &mut activations.query,
            key: &mut activations.key,
            value: &activations.value,
            cosines: &rotary.cosines,
            sines: &rotary.sines,
            positions: &step.positions,
            slots: &step.slots,
            key_cache: &mut cache.keys,
            value_cache: &mut cache.values,
            rows,
            heads,
            kv_heads,
            head_dim,
        })?;
        backend.paged_attention(paged_attention::Args {
            query: &activations.query,
            key_cache: &cache.keys,
            value_cache: &cache.values,
            sequences: &step.sequences,
            block_tables: &step.block_tables,
            output: &mut activations.attention,
            sequence_count: step.sequence_count,
            rows,
            longest: step.longest,
            longest_rows: step.longest_rows,
            heads,
            kv_heads,
            head_dim,
            window: config.sliding_window.unwrap_or(usize::MAX),
        })
    }
}

/// `residual += addend` where `add` says so, then `normed = rms_norm(residual)`.
pub(super) fn hidden_norm<B: Backend>(
    context: &LayerContext<'_, B>,
    activations: &mut Activations<B>,
    weight: &B::Buffer,
    add: bool,
) -> Result<(), KernelError> {
    context.backend.rms_norm(rms_norm::Args {
        residual: &mut activations.residual,
        addend: add.then_some(&activations.addend),
        weight,
        output: &mut activations.normed,
        rows: context.step.rows,
        width: context.config.hidden_size,
        epsilon: context.config.rms_norm_epsilon,
    })
}
