//! Runs single decoder layers, or their parts, over whole sequences: how to go through a model that is never
//! held in memory.
//!
//! A layer has four inputs that linear layers multiply, and each is reached on its own, so that the linear
//! layers before it can be quantized first and none runs more often than it must:
//!
//! ```text
//! attention_input = rms_norm(hidden)                 query, key, value
//! attention       = attend(attention_input)          output projection
//! hidden         += attention_output(attention)
//! feed_forward_input = rms_norm(hidden)              gate, up
//! gated           = silu(gate(..)) * up(..)          down
//! hidden         += down(gated)
//! ```

use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;

use super::ModelError;
use super::batch::{BLOCK_SIZE, Batch};
use super::decoder_layer::{Activations, DecoderLayer, LayerCache, LayerContext, hidden_norm};
use super::output_stage::FinalNorm;
use super::rotary::RotaryTables;
use super::step::{BatchLimits, Step};
use crate::config::ModelConfig;

/// One layer's worth of buffers, for one sequence at a time.
pub struct LayerRunner<B: Backend> {
    backend: B,
    config: ModelConfig,
    rotary: RotaryTables<B>,
    step: Step<B>,
    activations: Activations<B>,
    cache: LayerCache<B>,
    blocks: usize,
}

impl<B: Backend> LayerRunner<B> {
    /// Buffers for sequences of up to `max_tokens` tokens.
    ///
    /// # Errors
    /// When the device refuses a buffer.
    pub fn new(backend: B, config: &ModelConfig, max_tokens: usize) -> Result<Self, ModelError> {
        let blocks = max_tokens.div_ceil(BLOCK_SIZE);
        Ok(Self {
            rotary: RotaryTables::new(&backend, config, max_tokens)?,
            step: Step::new(&backend)?,
            activations: Activations::new(&backend, config, max_tokens)?,
            cache: LayerCache::new(&backend, config, blocks)?,
            config: config.clone(),
            backend,
            blocks,
        })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Gives the device back.
    pub fn into_backend(self) -> B {
        self.backend
    }

    /// Brings `hidden`, the residual stream of a sequence, `[tokens, hidden_size]`, through the whole `layer`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for.
    pub fn forward(&mut self, layer: &DecoderLayer<B>, hidden: &mut [f32]) -> Result<(), ModelError> {
        self.start(hidden)?;
        let context = context(&self.backend, &self.config, &self.rotary, &self.step);
        layer.forward(&context, &mut self.cache, &mut self.activations, true)?;
        self.backend.read(&self.activations.residual, 0..hidden.len(), hidden)?;
        self.add(hidden)
    }

    /// Copies what query, key and value of `layer` multiply to `input`, `[tokens, hidden_size]`, for a sequence
    /// whose residual stream before the layer is `hidden`, `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn attention_input(
        &mut self,
        layer: &DecoderLayer<B>,
        hidden: &[f32],
        input: &mut [f32],
    ) -> Result<(), ModelError> {
        self.start(hidden)?;
        layer.attention_input(
            &context(&self.backend, &self.config, &self.rotary, &self.step),
            &mut self.activations,
            false,
        )?;
        Ok(self.backend.read(&self.activations.normed, 0..hidden.len(), input)?)
    }

    /// Copies what the output projection of `layer` multiplies to `attention`, `[tokens, heads * head_dim]`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn attention(
        &mut self,
        layer: &DecoderLayer<B>,
        hidden: &[f32],
        attention: &mut [f32],
    ) -> Result<(), ModelError> {
        let tokens = self.start(hidden)?;
        let context = context(&self.backend, &self.config, &self.rotary, &self.step);
        layer.attention_input(&context, &mut self.activations, false)?;
        layer.attend(&context, &mut self.cache, &mut self.activations)?;
        let elements = tokens * self.config.heads * self.config.head_dim;
        Ok(self.backend.read(&self.activations.attention, 0..elements, attention)?)
    }

    /// Adds the output projection of `attention` to `hidden`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn add_attention(
        &mut self,
        layer: &DecoderLayer<B>,
        attention: &[f32],
        hidden: &mut [f32],
    ) -> Result<(), ModelError> {
        let tokens = self.start(hidden)?;
        KernelError::check(
            "add_attention",
            "attention",
            attention.len(),
            tokens * self.config.heads * self.config.head_dim,
        )?;
        self.backend.write(attention, &mut self.activations.attention)?;
        layer.project_attention(
            &context(&self.backend, &self.config, &self.rotary, &self.step),
            &mut self.activations,
        )?;
        self.add(hidden)
    }

    /// Copies what gate and up of `layer` multiply to `input`, `[tokens, hidden_size]`, for a sequence whose
    /// residual stream after attention is `hidden`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn feed_forward_input(
        &mut self,
        layer: &DecoderLayer<B>,
        hidden: &[f32],
        input: &mut [f32],
    ) -> Result<(), ModelError> {
        self.start(hidden)?;
        layer.feed_forward_input(
            &context(&self.backend, &self.config, &self.rotary, &self.step),
            &mut self.activations,
            false,
        )?;
        Ok(self.backend.read(&self.activations.normed, 0..hidden.len(), input)?)
    }

    /// Copies what down of `layer` multiplies to `gated`, `[tokens, intermediate_size]`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn gated(
        &mut self,
        layer: &DecoderLayer<B>,
        hidden: &[f32],
        gated: &mut [f32],
    ) -> Result<(), ModelError> {
        let tokens = self.gate(layer, hidden)?;
        let elements = tokens * self.config.intermediate_size;
        Ok(self.backend.read(&self.activations.gated, 0..elements, gated)?)
    }

    /// Adds the down projection of `gated`, `[tokens, intermediate_size]`, to `hidden`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn add_gated(
        &mut self,
        layer: &DecoderLayer<B>,
        gated: &[f32],
        hidden: &mut [f32],
    ) -> Result<(), ModelError> {
        let tokens = self.start(hidden)?;
        KernelError::check("add_gated", "gated", gated.len(), tokens * self.config.intermediate_size)?;
        self.backend.write(gated, &mut self.activations.gated)?;
        layer.project_gated(
            &context(&self.backend, &self.config, &self.rotary, &self.step),
            &mut self.activations,
        )?;
        self.add(hidden)
    }

    /// Adds the feed-forward block of `layer` to `hidden`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for.
    pub fn add_feed_forward(
        &mut self,
        layer: &DecoderLayer<B>,
        hidden: &mut [f32],
    ) -> Result<(), ModelError> {
        self.gate(layer, hidden)?;
        layer.project_gated(
            &context(&self.backend, &self.config, &self.rotary, &self.step),
            &mut self.activations,
        )?;
        self.add(hidden)
    }

    /// Copies what the output head multiplies to `input`, `[tokens, hidden_size]`, for a sequence whose residual stream
    /// behind the last layer is `hidden`.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for, or a buffer has another length.
    pub fn output_head_input(
        &mut self,
        norm: &FinalNorm<B>,
        hidden: &[f32],
        input: &mut [f32],
    ) -> Result<(), ModelError> {
        self.start(hidden)?;
        let context = context(&self.backend, &self.config, &self.rotary, &self.step);
        hidden_norm(&context, &mut self.activations, &norm.weight, false)?;
        Ok(self.backend.read(&self.activations.normed, 0..hidden.len(), input)?)
    }

    fn gate(&mut self, layer: &DecoderLayer<B>, hidden: &[f32]) -> Result<usize, ModelError> {
        let tokens = self.start(hidden)?;
        let context = context(&self.backend, &self.config, &self.rotary, &self.step);
        layer.feed_forward_input(&context, &mut self.activations, false)?;
        layer.gate(&context, &mut self.activations)?;
        Ok(tokens)
    }

    /// Copies a sequence's residual stream to the device and returns its tokens.
    fn start(&mut self, hidden: &[f32]) -> Result<usize, ModelError> {
        let tokens = hidden.len() / self.config.hidden_size;
        KernelError::check("layer", "hidden", hidden.len(), tokens * self.config.hidden_size)?;
        let batch = Batch::single(&vec![0; tokens], 0, (0..self.blocks as u32).collect());
        let limits = BatchLimits {
            vocabulary: self.config.vocabulary_size,
            positions: self.rotary.positions,
            blocks: self.blocks,
        };
        self.step.set(&self.backend, &batch, limits)?;
        self.backend.write(hidden, &mut self.activations.residual)?;
        Ok(tokens)
    }

    /// Adds the layer's last output to `hidden`.
    fn add(&self, hidden: &mut [f32]) -> Result<(), ModelError> {
        let mut addend = vec![0.0; hidden.len()];
        self.backend.read(&self.activations.addend, 0..addend.len(), &mut addend)?;
        for (hidden, addend) in hidden.iter_mut().zip(addend) {
            *hidden += addend;
        }
        Ok(())
    }
}

fn context<'a, B: Backend>(
    backend: &'a B,
    config: &'a ModelConfig,
    rotary: &'a RotaryTables<B>,
    step: &'a Step<B>,
) -> LayerContext<'a, B> {
    LayerContext { backend, config, rotary, step }
}
