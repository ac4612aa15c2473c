//! A whole model on a device, and one step through it.

use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;
use nibble_kernels::ops::sample::{self, NoToken, Sampled};
use nibble_kernels::ops::{embedding, paged_attention};

use super::ModelError;
use super::batch::{Batch, Logits};
use super::decoder_layer::{Activations, DecoderLayer, LayerCache, LayerContext};
use super::linear::Linear;
use super::output_stage::{FinalNorm, OutputStage, load_output_head};
use super::rotary::RotaryTables;
use super::step::{BatchLimits, Step};
use super::streamed::EMBEDDING;
use crate::checkpoint::{Checkpoint, EmbeddingRows};
use crate::config::ModelConfig;

/// A model with its weights on a device.
pub struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    embedding: Table<B>,
    layers: Vec<DecoderLayer<B>>,
    head: Linear<B>,
    rotary: RotaryTables<B>,
    step: Step<B>,
    activations: Activations<B>,
    activation_rows: usize,
    output: OutputStage<B>,
}

/// The embedding table, or that the output head is it.
pub(super) enum Table<B: Backend> {
    Own(B::DenseMatrix),
    Head,
    /// In its file, from which the host reads the rows of each step.
    File {
        rows: EmbeddingRows,
        values: Vec<f32>,
    },
}

/// Every weight of a model on a device.
pub(super) struct Weights<B: Backend> {
    pub(super) embedding: Table<B>,
    pub(super) layers: Vec<DecoderLayer<B>>,
    pub(super) final_norm: FinalNorm<B>,
    pub(super) head: Linear<B>,
}

/// The keys and values of every layer.
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
    blocks: usize,
}

/// Bytes that a KV block takes in all layers of a model on a device whose keys and values have `element_bytes` bytes.
pub fn kv_block_bytes(config: &ModelConfig, element_bytes: usize) -> usize {
    let elements = paged_attention::cache_elements(1, config.kv_heads, config.head_dim);
    2 * elements * element_bytes * config.layers
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
        let config = checkpoint.config();
        paged_attention::check_heads(config.heads, config.kv_heads, config.head_dim)?;
        let head = load_output_head(&backend, checkpoint)?;
        let embedding = if let Some(rows) = checkpoint.embedding_rows(EMBEDDING) {
            Table::File { rows, values: Vec::new() }
        } else if config.tie_word_embeddings && head.dense().is_some() {
            Table::Head
        } else {
            let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
            let table = checkpoint.dense(EMBEDDING, vocabulary, hidden)?;
            Table::Own(backend.pack_dense(EMBEDDING.trim_end_matches(".weight"), &table)?)
        };
        let layers = (0..config.layers)
            .map(|index| DecoderLayer::load(&backend, checkpoint, index))
            .collect::<Result<_, _>>()?;
        let final_norm = FinalNorm::load(&backend, checkpoint)?;
        let weights = Weights { embedding, layers, final_norm, head };
        Ok(Self::with_weights(backend, config, weights, max_positions)?)
    }

    /// A model with given weights.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub(super) fn with_weights(
        backend: B,
        config: &ModelConfig,
        weights: Weights<B>,
        max_positions: usize,
    ) -> Result<Self, KernelError> {
        let Weights { embedding, layers, final_norm, head } = weights;
        Ok(Self {
            rotary: RotaryTables::new(&backend, config, max_positions)?,
            step: Step::new(&backend)?,
            activations: Activations::new(&backend, config, 0)?,
            activation_rows: 0,
            output: OutputStage::with_norm(&backend, config, final_norm)?,
            backend,
            config: config.clone(),
            embedding,
            layers,
            head,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Longest sequence this model was loaded for, in tokens.
    pub fn max_positions(&self) -> usize {
        self.rotary.positions
    }

    /// A zeroed cache of `blocks` blocks for every layer.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn kv_cache(&self, blocks: usize) -> Result<KvCache<B>, ModelError> {
        let layer = |_| LayerCache::new(&self.backend, &self.config, blocks);
        Ok(KvCache { layers: (0..self.config.layers).map(layer).collect::<Result<_, _>>()?, blocks })
    }

    /// Runs one step and returns the logits of the rows that want them.
    ///
    /// # Errors
    /// When the batch breaks a rule of [`Batch`] or does not fit the model or the cache.
    pub fn forward(&mut self, batch: &Batch, cache: &mut KvCache<B>) -> Result<Logits, ModelError> {
        self.run(batch, cache)?;
        let Activations { residual, addend, .. } = &self.activations;
        Ok(self.output.logits(&self.backend, &self.head, residual, addend, &batch.logit_rows)?)
    }

    /// Runs one step, for [`Model::sample`] and [`Model::hidden_states`] to follow; does not wait for the device.
    ///
    /// # Errors
    /// Those of [`Model::forward`].
    pub fn run(&mut self, batch: &Batch, cache: &mut KvCache<B>) -> Result<(), ModelError> {
        let limits = BatchLimits {
            vocabulary: self.config.vocabulary_size,
            positions: self.rotary.positions,
            blocks: cache.blocks,
        };
        self.step.set(&self.backend, batch, limits)?;
        let rows = self.step.rows;
        if rows > self.activation_rows {
            self.activation_rows = rows.next_power_of_two();
            self.activations = Activations::new(&self.backend, &self.config, self.activation_rows)?;
        }
        self.embed(&batch.token_ids)?;
        let context = LayerContext {
            backend: &self.backend,
            config: &self.config,
            rotary: &self.rotary,
            step: &self.step,
        };
        for (index, (layer, cache)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            layer.forward(&context, cache, &mut self.activations, index == 0)?;
        }
        Ok(())
    }

    /// What `wanted` says of each of `logit_rows`, rows of the batch that was given to [`Model::run`] last, sampled on
    /// the device.
    ///
    /// # Errors
    /// When there are not as many rows, or the device does not sample or refuses.
    pub fn sample(
        &mut self,
        logit_rows: &[usize],
        wanted: &[sample::Row],
    ) -> Result<Vec<Result<Sampled, NoToken>>, ModelError> {
        let Activations { residual, addend, .. } = &self.activations;
        Ok(self.output.sample(&self.backend, &self.head, (residual, addend), logit_rows, wanted)?)
    }

    /// The hidden states behind the final norm, `[rows, hidden_size]`, of [`Batch::hidden_rows`] of the batch that was
    /// given to [`Model::forward`] last. They have the same bits in any batch, as logits have.
    ///
    /// # Errors
    /// When the batch is not that one, or the device refuses.
    pub fn hidden_states(&mut self, batch: &Batch) -> Result<Vec<f32>, ModelError> {
        let Activations { residual, addend, .. } = &self.activations;
        Ok(self.output.hidden_states(&self.backend, residual, addend, &batch.hidden_rows)?)
    }

    fn embed(&mut self, token_ids: &[u32]) -> Result<(), ModelError> {
        let table = match &mut self.embedding {
            Table::File { rows, values } => {
                values.resize(token_ids.len() * self.config.hidden_size, 0.0);
                rows.read(&self.config, token_ids, values)?;
                return Ok(self.backend.write(values, &mut self.activations.residual)?);
            }
            Table::Own(table) => Some(&*table),
            Table::Head => self.head.dense(),
        };
        let Some(table) = table else {
            unreachable!("a head that shares the embedding table is dense: `load` packs it so");
        };
        Ok(self.backend.embedding(embedding::Args {
            token_ids: &self.step.token_ids,
            table,
            output: &mut self.activations.residual,
            rows: token_ids.len(),
        })?)
    }
}
