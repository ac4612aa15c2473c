//! The calibration sequences on their way through the model.

use nibble_kernels::backend::Backend;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::{DecoderLayer, LayerRunner, LinearRole};

use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::hessian::{Hessian, HessianSum};
use crate::threads::Threads;

/// The four inputs of a decoder layer that linear layers multiply, in the order they are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinearInput {
    Attention,
    AttentionOutput,
    FeedForward,
    Gated,
}

impl LinearInput {
    /// All of them, in the order they are computed.
    pub(super) const ALL: [Self; 4] =
        [Self::Attention, Self::AttentionOutput, Self::FeedForward, Self::Gated];

    /// The linear layers that multiply it.
    pub(super) fn roles(self) -> &'static [LinearRole] {
        match self {
            Self::Attention => &[LinearRole::Query, LinearRole::Key, LinearRole::Value],
            Self::AttentionOutput => &[LinearRole::AttentionOutput],
            Self::FeedForward => &[LinearRole::Gate, LinearRole::Up],
            Self::Gated => &[LinearRole::Down],
        }
    }
}

/// The hidden states of every calibration sequence at one place of the model.
pub(super) struct Activations<B: Backend> {
    runner: LayerRunner<B>,
    sequences: Vec<Sequence>,
    hidden_size: usize,
    attention_size: usize,
    gated_size: usize,
}

struct Sequence {
    tokens: usize,
    /// The residual stream, `[tokens, hidden_size]`.
    hidden: Vec<f32>,
    /// The input of the attention output projection, `[tokens, heads * head_dim]`.
    attention: Vec<f32>,
}

impl<B: Backend> Activations<B> {
    /// The embeddings of the calibration tokens, read row by row from the checkpoint.
    pub(super) fn embed(
        backend: B,
        checkpoint: &Checkpoint,
        calibration: &Calibration,
    ) -> Result<Self, QuantizeError> {
        let config = checkpoint.config();
        let hidden_size = config.hidden_size;
        let table = checkpoint.dense("model.embed_tokens.weight", config.vocabulary_size, hidden_size)?;
        let row = |&token: &u32| {
            let first = token as usize * hidden_size;
            (first..first + hidden_size).map(|element| table.values().get(element))
        };
        let attention_size = config.heads * config.head_dim;
        let sequence = |tokens: &Vec<u32>| Sequence {
            tokens: tokens.len(),
            hidden: tokens.iter().flat_map(row).collect(),
            attention: vec![0.0; tokens.len() * attention_size],
        };
        Ok(Self {
            runner: LayerRunner::new(backend, config, calibration.sequence_length())?,
            sequences: calibration.sequences().iter().map(sequence).collect(),
            hidden_size,
            attention_size,
            gated_size: config.intermediate_size,
        })
    }

    /// The device.
    pub(super) fn backend(&self) -> &B {
        self.runner.backend()
    }

    /// Brings every sequence to `input`, by the linear layers before it as they now are, and sums its Hessian.
    pub(super) fn hessian(
        &mut self,
        layer: &DecoderLayer<B>,
        input: LinearInput,
        threads: &Threads,
    ) -> Result<Hessian, QuantizeError> {
        let width = match input {
            LinearInput::Attention | LinearInput::FeedForward => self.hidden_size,
            LinearInput::AttentionOutput => self.attention_size,
            LinearInput::Gated => self.gated_size,
        };
        let mut sum = HessianSum::new(width);
        let mut values = Vec::new();
        let runner = &mut self.runner;
        for Sequence { tokens, hidden, attention } in &mut self.sequences {
            values.resize(*tokens * width, 0.0);
            match input {
                LinearInput::Attention => runner.attention_input(layer, hidden, &mut values)?,
                LinearInput::AttentionOutput => {
                    runner.attention(layer, hidden, attention)?;
                    values.copy_from_slice(attention);
                }
                LinearInput::FeedForward => {
                    runner.add_attention(layer, attention, hidden)?;
                    runner.feed_forward_input(layer, hidden, &mut values)?;
                }
                LinearInput::Gated => runner.gated(layer, hidden, &mut values)?,
            }
            threads.run(|par| sum.add(&values, par));
        }
        Ok(sum.finish())
    }

    /// Brings every sequence to the end of `layer`, all of whose inputs it has passed.
    pub(super) fn finish_layer(&mut self, layer: &DecoderLayer<B>) -> Result<(), QuantizeError> {
        for sequence in &mut self.sequences {
            self.runner.add_feed_forward(layer, &mut sequence.hidden)?;
        }
        Ok(())
    }
}
