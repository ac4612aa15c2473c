//! Runs single decoder layers over whole sequences: how the quantizer goes through a model that it never
//! holds in memory.

use nibble_kernels::backend::Backend;

use super::ModelError;
use super::batch::{BLOCK_SIZE, Batch};
use super::decoder_layer::{Activations, DecoderLayer, LayerCache, LayerContext};
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
            step: Step::new(&backend),
            activations: Activations::new(&backend, config, max_tokens),
            cache: LayerCache::new(&backend, config, blocks),
            config: config.clone(),
            backend,
            blocks,
        })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Runs `layer` over one sequence: `hidden`, row-major `[tokens, hidden_size]`, is the residual stream
    /// before the layer and, on return, after it.
    ///
    /// # Errors
    /// When the sequence is longer than this runner was made for.
    ///
    /// # Panics
    /// When `hidden` is not a whole number of rows.
    pub fn run(&mut self, layer: &DecoderLayer<B>, hidden: &mut [f32]) -> Result<(), ModelError> {
        assert!(hidden.len().is_multiple_of(self.config.hidden_size), "hidden states are whole rows");
        let tokens = hidden.len() / self.config.hidden_size;
        let batch = Batch::single(&vec![0; tokens], 0, (0..self.blocks as u32).collect());
        let limits = BatchLimits {
            vocabulary: self.config.vocabulary_size,
            positions: self.rotary.positions,
            blocks: self.blocks,
        };
        self.step.set(&self.backend, &batch, limits)?;
        self.backend.write(hidden, &mut self.activations.residual)?;
        let context = LayerContext {
            backend: &self.backend,
            config: &self.config,
            rotary: &self.rotary,
            step: &self.step,
        };
        layer.forward(&context, &mut self.cache, &mut self.activations, true)?;
        let mut addend = vec![0.0; hidden.len()];
        self.backend.read(&self.activations.residual, 0..hidden.len(), hidden)?;
        self.backend.read(&self.activations.addend, 0..addend.len(), &mut addend)?;
        for (hidden, addend) in hidden.iter_mut().zip(addend) {
            *hidden += addend;
        }
        Ok(())
    }
}
