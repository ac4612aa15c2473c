//! A whole model on a device, and one step through it.

use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;
use nibble_kernels::ops::{embedding, gather_rows, paged_attention, rms_norm};

use super::ModelError;
use super::batch::{Batch, Logits};
use super::decoder_layer::{Activations, DecoderLayer, LayerCache, LayerContext};
use super::linear::{Linear, upload};
use super::rotary::RotaryTables;
use super::step::{BatchLimits, Step};
use crate::checkpoint::{Checkpoint, LinearWeight};
use crate::config::ModelConfig;

/// Rows whose logits are computed at once: bounds the logits buffer of a long prompt.
const LOGIT_ROWS: usize = 64;

/// A model with its weights on a device.
pub struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    embedding: Table<B>,
    layers: Vec<DecoderLayer<B>>,
    final_norm: B::Buffer,
    head: Linear<B>,
    rotary: RotaryTables<B>,
    step: Step<B>,
    activations: Activations<B>,
    activation_rows: usize,
    output: OutputBuffers<B>,
}

/// The embedding table, or that the output head is it.
enum Table<B: Backend> {
    Own(B::DenseMatrix),
    Head,
}

/// Buffers of the output head, for up to [`LOGIT_ROWS`] rows.
struct OutputBuffers<B: Backend> {
    residual: B::Buffer,
    addend: B::Buffer,
    normed: B::Buffer,
    logits: B::Buffer,
}

/// The keys and values of every layer.
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
    blocks: usize,
}

/// Bytes that a KV block takes in all layers of a model; elements are 32-bit floats.
pub fn kv_block_bytes(config: &ModelConfig) -> usize {
    let elements = paged_attention::cache_elements(1, config.kv_heads, config.head_dim);
    2 * elements * size_of::<f32>() * config.layers
}

impl<B: Backend> KvCache<B> {
    /// Number of blocks, of [`super::BLOCK_SIZE`] tokens each.
    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

impl<B: Backend> Model<B> {
    /// Reads every weight of `checkpoint` and packs it for `backend`, one tensor at a time. Sequences may be
    /// up to `max_positions` tokens long.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device has no kernel for it.
    pub fn load(backend: B, checkpoint: &Checkpoint, max_positions: usize) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        paged_attention::check_heads(config.heads, config.kv_heads, config.head_dim)?;
        let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
        let table = checkpoint.dense("model.embed_tokens.weight", vocabulary, hidden)?;
        let (embedding, head) = if config.tie_word_embeddings {
            checkpoint.refuse_quantized("lm_head", "none: tie_word_embeddings takes the embedding table")?;
            (Table::Head, Linear::pack_dense(&backend, "lm_head", &table)?)
        } else {
            let head: LinearWeight<'_> = checkpoint.linear("lm_head", vocabulary, hidden)?;
            let table = backend.pack_dense("model.embed_tokens", &table)?;
            (Table::Own(table), Linear::pack(&backend, "lm_head", &head, None)?)
        };
        let layers = (0..config.layers)
            .map(|index| DecoderLayer::load(&backend, checkpoint, index))
            .collect::<Result<_, _>>()?;
        let final_norm = upload(&backend, &checkpoint.vector("model.norm.weight", hidden)?)?;
        Ok(Self {
            rotary: RotaryTables::new(&backend, &config, max_positions)?,
            step: Step::new(&backend),
            activations: Activations::new(&backend, &config, 0),
            activation_rows: 0,
            output: OutputBuffers {
                residual: backend.buffer(LOGIT_ROWS * hidden),
                addend: backend.buffer(LOGIT_ROWS * hidden),
                normed: backend.buffer(LOGIT_ROWS * hidden),
                logits: backend.buffer(LOGIT_ROWS * vocabulary),
            },
            backend,
            config,
            embedding,
            layers,
            final_norm,
            head,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Longest sequence this model was loaded for, in tokens.
    pub fn max_positions(&self) -> usize {
        self.rotary.positions
    }

    /// A zeroed cache of `blocks` blocks for every layer.
    pub fn kv_cache(&self, blocks: usize) -> KvCache<B> {
        let layer = |_| LayerCache::new(&self.backend, &self.config, blocks);
        KvCache { layers: (0..self.config.layers).map(layer).collect(), blocks }
    }

    /// Runs one step and returns the logits of the rows that want them.
    ///
    /// # Errors
    /// When the batch breaks a rule of [`Batch`] or does not fit the model or the cache.
    pub fn forward(&mut self, batch: &Batch, cache: &mut KvCache<B>) -> Result<Logits, ModelError> {
        let limits = BatchLimits {
            vocabulary: self.config.vocabulary_size,
            positions: self.rotary.positions,
            blocks: cache.blocks,
        };
        self.step.set(&self.backend, batch, limits)?;
        let rows = self.step.rows;
        if rows > self.activation_rows {
            self.activation_rows = rows.next_power_of_two();
            self.activations = Activations::new(&self.backend, &self.config, self.activation_rows);
        }
        self.embed(rows)?;
        let context = LayerContext {
            backend: &self.backend,
            config: &self.config,
            rotary: &self.rotary,
            step: &self.step,
        };
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            layer.forward(&context, cache, &mut self.activations, index == 0)?;
        }
        Ok(self.logits(&batch.logit_rows)?)
    }

    fn embed(&mut self, rows: usize) -> Result<(), KernelError> {
        let table = match &self.embedding {
            Table::Own(table) => Some(table),
            Table::Head => self.head.dense(),
        };
        let Some(table) = table else {
            unreachable!("a head that shares the embedding table is dense: `load` packs it so");
        };
        self.backend.embedding(embedding::Args {
            token_ids: &self.step.token_ids,
            table,
            output: &mut self.activations.residual,
            rows,
        })
    }

    /// Final norm and output head, [`LOGIT_ROWS`] rows at a time.
    fn logits(&mut self, rows: &[usize]) -> Result<Logits, KernelError> {
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocabulary_size);
        let mut values = vec![0.0; rows.len() * vocabulary];
        let mut indices = self.backend.indices(LOGIT_ROWS.min(rows.len()));
        for (chunk, values) in rows.chunks(LOGIT_ROWS).zip(values.chunks_mut(LOGIT_ROWS * vocabulary)) {
            let chunk: Vec<u32> = chunk.iter().map(|&row| row as u32).collect();
            self.backend.write_indices(&chunk, &mut indices)?;
            let OutputBuffers { residual, addend, normed, logits } = &mut self.output;
            for (input, output) in
                [(&self.activations.residual, &mut *residual), (&self.activations.addend, &mut *addend)]
            {
                let args =
                    gather_rows::Args { input, rows: &indices, output, count: chunk.len(), width: hidden };
                self.backend.gather_rows(args)?;
            }
            self.backend.rms_norm(rms_norm::Args {
                residual,
                addend: Some(addend),
                weight: &self.final_norm,
                output: normed,
                rows: chunk.len(),
                width: hidden,
                epsilon: self.config.rms_norm_epsilon,
            })?;
            self.head.forward(&self.backend, normed, logits, chunk.len())?;
            self.backend.read(logits, 0..chunk.len() * vocabulary, values)?;
        }
        Ok(Logits { rows: rows.len(), vocabulary, values })
    }
}
