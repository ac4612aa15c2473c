//! What comes after the last decoder layer: the final norm and the output head.
//!
//! ```text
//! logits = head(rms_norm(residual + addend))          [rows, vocabulary]
//! ```

use nibble_kernels::KernelError;
use nibble_kernels::backend::{Activations, Backend};
use nibble_kernels::ops::sample::{self, NoToken, Sampled};
use nibble_kernels::ops::{gather_rows, rms_norm};
use nibble_kernels::tensor::QuantizedMatrix;

use super::ModelError;
use super::batch::Logits;
use super::linear::{Linear, LinearSpec, upload};
use super::streamed::EMBEDDING;
use crate::checkpoint::{Checkpoint, LinearWeight};
use crate::config::ModelConfig;

/// Rows whose logits are computed at once: bounds the logits buffer of a long prompt.
const LOGIT_ROWS: usize = 128;

/// Bits of a head that is rounded when it is loaded, and its inputs that share a scale.
const ROUNDED_BITS: u32 = 8;
const ROUNDED_GROUP: usize = 128;

/// The final norm, and buffers for up to [`LOGIT_ROWS`] rows.
pub(crate) struct OutputStage<B: Backend> {
    final_norm: FinalNorm<B>,
    residual: B::Buffer,
    addend: B::Buffer,
    normed: B::Buffer,
    logits: B::Buffer,
    rows: B::Indices,
    hidden: usize,
    vocabulary: usize,
    epsilon: f32,
}

/// The weight of the norm between the last decoder layer and the output head.
pub struct FinalNorm<B: Backend> {
    pub(super) weight: B::Buffer,
}

impl<B: Backend> FinalNorm<B> {
    /// Reads it from `checkpoint`.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn load(backend: &B, checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let weight = checkpoint.vector("model.norm.weight", checkpoint.config().hidden_size)?;
        Ok(Self { weight: upload(backend, &weight)? })
    }
}

/// Final norm and output head of a model whose decoder layers are not in memory.
pub struct OutputHead<B: Backend> {
    backend: B,
    stage: OutputStage<B>,
    head: Linear<B>,
}

impl<B: Backend> OutputHead<B> {
    /// Reads both from `checkpoint`.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device has no kernel for it.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let head = load_output_head(&backend, checkpoint)?;
        Self::with(backend, checkpoint, head)
    }

    /// Reads the norm from `checkpoint`, whose own output head `head` takes the place of.
    ///
    /// # Errors
    /// When the norm is missing or malformed.
    pub fn with(backend: B, checkpoint: &Checkpoint, head: Linear<B>) -> Result<Self, ModelError> {
        let stage = OutputStage::new(&backend, checkpoint)?;
        Ok(Self { backend, stage, head })
    }

    /// The logits of every row of `hidden`, `[rows, hidden_size]`: the residual stream behind the last layer.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn logits(&mut self, hidden: &[f32]) -> Result<Logits, ModelError> {
        Ok(self.stage.logits_of_hidden(&self.backend, &self.head, hidden)?)
    }

    /// Gives the device back.
    pub fn into_backend(self) -> B {
        self.backend
    }
}

/// The output head of `checkpoint`: its own matrix, or the embedding table where the two are tied, packed as
/// [`pack_output_head`] does.
///
/// # Errors
/// When a tensor is missing or malformed, or the device has no kernel for it.
pub(crate) fn load_output_head<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
) -> Result<Linear<B>, ModelError> {
    let config = checkpoint.config();
    let spec = LinearSpec::output_head(config);
    let weight = if config.tie_word_embeddings {
        checkpoint.refuse_quantized(&spec.name, "none: tie_word_embeddings takes the embedding table")?;
        checkpoint.weight(EMBEDDING, spec.out_features, spec.in_features)?
    } else {
        checkpoint.linear(&spec.name, spec.out_features, spec.in_features)?
    };
    Ok(pack_output_head(backend, config, weight)?)
}

/// Bytes of the output head that is made of the embedding table of `checkpoint` and stands beside it, where the two are
/// tied and the device rounds `activations` and with them a dense head; 0 where there is no such copy in memory.
pub fn rounded_copy_bytes(checkpoint: &Checkpoint, activations: Activations) -> u64 {
    let config = checkpoint.config();
    let stays_in_the_file = checkpoint.embedding_rows(EMBEDDING).is_some();
    if !config.tie_word_embeddings || !rounds_head(config, activations) || stays_in_the_file {
        return 0;
    }
    let codes = config.hidden_size * ROUNDED_BITS as usize / 8;
    let scales = config.hidden_size.div_ceil(ROUNDED_GROUP) * size_of::<f32>();
    (config.vocabulary_size * (codes + scales)) as u64
}

/// Whether a dense output head is rounded when it is loaded.
fn rounds_head(config: &ModelConfig, activations: Activations) -> bool {
    activations == Activations::Integer && config.quantization.is_some()
}

/// Packs an output head. A dense one of a quantized model is rounded where the device rounds activations.
///
/// # Errors
/// When the device has no kernel for it.
pub(crate) fn pack_output_head<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    weight: LinearWeight<'_>,
) -> Result<Linear<B>, KernelError> {
    let weight = match weight {
        LinearWeight::Dense(matrix) if rounds_head(config, backend.activations()) => {
            LinearWeight::Quantized(QuantizedMatrix::round_to_nearest(&matrix, ROUNDED_BITS, ROUNDED_GROUP)?)
        }
        weight => weight,
    };
    Linear::pack(backend, &LinearSpec::output_head(config).name, &weight, None)
}

impl<B: Backend> OutputStage<B> {
    /// Reads the final norm.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub(crate) fn new(backend: &B, checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let norm = FinalNorm::load(backend, checkpoint)?;
        Ok(Self::with_norm(backend, checkpoint.config(), norm)?)
    }

    /// Buffers around `final_norm`.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub(crate) fn with_norm(
        backend: &B,
        config: &ModelConfig,
        final_norm: FinalNorm<B>,
    ) -> Result<Self, KernelError> {
        let (hidden, vocabulary) = (config.hidden_size, config.vocabulary_size);
        Ok(Self {
            final_norm,
            residual: backend.buffer(LOGIT_ROWS * hidden)?,
            addend: backend.buffer(LOGIT_ROWS * hidden)?,
            normed: backend.buffer(LOGIT_ROWS * hidden)?,
            logits: backend.buffer(LOGIT_ROWS * vocabulary)?,
            rows: backend.indices(LOGIT_ROWS)?,
            hidden,
            vocabulary,
            epsilon: config.rms_norm_epsilon,
        })
    }

    /// The logits of `rows` of a step whose last layer left `residual` and `addend`, `[step rows, hidden_size]`.
    ///
    /// # Errors
    /// When a row is outside the buffers.
    pub(crate) fn logits(
        &mut self,
        backend: &B,
        head: &Linear<B>,
        residual: &B::Buffer,
        addend: &B::Buffer,
        rows: &[usize],
    ) -> Result<Logits, KernelError> {
        let mut values = vec![0.0; rows.len() * self.vocabulary];
        for (chunk, values) in rows.chunks(LOGIT_ROWS).zip(values.chunks_mut(LOGIT_ROWS * self.vocabulary)) {
            self.gather(backend, residual, addend, chunk)?;
            self.finish(backend, head, chunk.len(), true, values)?;
        }
        Ok(Logits { rows: rows.len(), vocabulary: self.vocabulary, values })
    }

    /// What `wanted` says of the logits of `rows` of a step, as for [`OutputStage::logits`], sampled on the device.
    ///
    /// # Errors
    /// When a row is outside the buffers, or the device does not sample.
    pub(crate) fn sample(
        &mut self,
        backend: &B,
        head: &Linear<B>,
        (residual, addend): (&B::Buffer, &B::Buffer),
        rows: &[usize],
        wanted: &[sample::Row],
    ) -> Result<Vec<Result<Sampled, NoToken>>, KernelError> {
        let sampler = backend.sampler();
        KernelError::require(sampler.is_some(), "sample", "device", "none", "must be one that samples")?;
        KernelError::check("sample", "rows", wanted.len(), rows.len())?;
        let mut sampled = Vec::with_capacity(rows.len());
        for (chunk, wanted) in rows.chunks(LOGIT_ROWS).zip(wanted.chunks(LOGIT_ROWS)) {
            self.gather(backend, residual, addend, chunk)?;
            self.norm(backend, chunk.len(), true)?;
            head.forward(backend, &self.normed, &mut self.logits, chunk.len())?;
            if let Some(sampler) = sampler {
                let args = sample::Args { logits: &self.logits, vocabulary: self.vocabulary, rows: wanted };
                sampled.extend(sampler.sample(args)?);
            }
        }
        Ok(sampled)
    }

    /// The hidden states behind the final norm, `[rows, hidden_size]`, of `rows` of a step, as for
    /// [`OutputStage::logits`].
    ///
    /// # Errors
    /// When a row is outside the buffers.
    pub(crate) fn hidden_states(
        &mut self,
        backend: &B,
        residual: &B::Buffer,
        addend: &B::Buffer,
        rows: &[usize],
    ) -> Result<Vec<f32>, KernelError> {
        let mut values = vec![0.0; rows.len() * self.hidden];
        for (chunk, values) in rows.chunks(LOGIT_ROWS).zip(values.chunks_mut(LOGIT_ROWS * self.hidden)) {
            self.gather(backend, residual, addend, chunk)?;
            self.norm(backend, chunk.len(), true)?;
            backend.read(&self.normed, 0..values.len(), values)?;
        }
        Ok(values)
    }

    /// Copies `rows` of a step to the buffers.
    fn gather(
        &mut self,
        backend: &B,
        residual: &B::Buffer,
        addend: &B::Buffer,
        rows: &[usize],
    ) -> Result<(), KernelError> {
        let indices: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        backend.write_indices(&indices, &mut self.rows)?;
        for (input, output) in [(residual, &mut self.residual), (addend, &mut self.addend)] {
            let (rows, count, width) = (&self.rows, rows.len(), self.hidden);
            backend.gather_rows(gather_rows::Args { input, rows, output, count, width })?;
        }
        Ok(())
    }

    /// The logits of every row of `hidden`, `[rows, hidden_size]`: the residual stream behind the last layer,
    /// its output added.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn logits_of_hidden(
        &mut self,
        backend: &B,
        head: &Linear<B>,
        hidden: &[f32],
    ) -> Result<Logits, KernelError> {
        let rows = hidden.len() / self.hidden;
        let mut values = vec![0.0; rows * self.vocabulary];
        for (hidden, values) in
            hidden.chunks(LOGIT_ROWS * self.hidden).zip(values.chunks_mut(LOGIT_ROWS * self.vocabulary))
        {
            backend.write(hidden, &mut self.residual)?;
            self.finish(backend, head, hidden.len() / self.hidden, false, values)?;
        }
        Ok(Logits { rows, vocabulary: self.vocabulary, values })
    }

    /// Norm and head of the first `rows` rows of the buffers; `add` says that there is an addend to add first.
    fn finish(
        &mut self,
        backend: &B,
        head: &Linear<B>,
        rows: usize,
        add: bool,
        values: &mut [f32],
    ) -> Result<(), KernelError> {
        self.norm(backend, rows, add)?;
        head.forward(backend, &self.normed, &mut self.logits, rows)?;
        backend.read(&self.logits, 0..rows * self.vocabulary, values)
    }

    /// Norm of the first `rows` rows of the buffers.
    fn norm(&mut self, backend: &B, rows: usize, add: bool) -> Result<(), KernelError> {
        backend.rms_norm(rms_norm::Args {
            residual: &mut self.residual,
            addend: add.then_some(&self.addend),
            weight: &self.final_norm.weight,
            output: &mut self.normed,
            rows,
            width: self.hidden,
            epsilon: self.epsilon,
        })
    }
}
