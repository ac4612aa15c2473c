//! A linear layer in device form, dense or quantized: the forward pass does not ask which.

use arrayvec::ArrayVec;
use nibble_kernels::KernelError;
use nibble_kernels::backend::{Backend, MatrixShape};
use nibble_kernels::ops::{dense_matmul, w4a16_matmul};

use crate::checkpoint::{Checkpoint, LinearWeight};
use crate::config::ModelConfig;
use crate::forward::ModelError;

/// `output = input * weight^T + bias`.
pub struct Linear<B: Backend> {
    weight: Weight<B>,
    bias: Option<B::Buffer>,
}

enum Weight<B: Backend> {
    Dense(B::DenseMatrix),
    Quantized(B::PackedMatrix),
}

/// Which linear layer of a checkpoint, and its shape.
#[derive(Clone, Debug)]
pub struct LinearSpec {
    /// The name of its tensors without the last part, such as `model.layers.0.mlp.up_proj`.
    pub name: String,
    /// Number of outputs.
    pub out_features: usize,
    /// Number of inputs.
    pub in_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearSpec {
    /// The output head of a model that has one of its own.
    pub fn output_head(config: &ModelConfig) -> Self {
        Self {
            name: "lm_head".to_owned(),
            out_features: config.vocabulary_size,
            in_features: config.hidden_size,
            bias: false,
        }
    }

    /// The name of its weight while it is not quantized.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The name of its bias, where it has one.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }
}

impl<B: Backend> Linear<B> {
    /// Reads the layer from `checkpoint` and packs it for `backend`.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device has no kernel for it.
    pub fn load(backend: &B, checkpoint: &Checkpoint, spec: &LinearSpec) -> Result<Self, ModelError> {
        let weight = checkpoint.linear(&spec.name, spec.out_features, spec.in_features)?;
        let bias =
            if spec.bias { Some(checkpoint.vector(&spec.bias_name(), spec.out_features)?) } else { None };
        Ok(Self::pack(backend, &spec.name, &weight, bias.as_deref())?)
    }

    /// Packs a weight that is already in memory. `name` is what errors and observers call it.
    ///
    /// # Errors
    /// When the device has no kernel for the weight.
    pub fn pack(
        backend: &B,
        name: &str,
        weight: &LinearWeight<'_>,
        bias: Option<&[f32]>,
    ) -> Result<Self, KernelError> {
        let weight = match weight {
            LinearWeight::Dense(matrix) => Weight::Dense(backend.pack_dense(name, matrix)?),
            LinearWeight::Quantized(matrix) => Weight::Quantized(backend.pack_quantized(name, matrix)?),
        };
        let bias = bias.map(|values| upload(backend, values)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// A layer whose weight is a copy of this one's, with a bias of its own.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub(crate) fn copy(&self, backend: &B, bias: Option<B::Buffer>) -> Result<Self, KernelError> {
        let weight = match &self.weight {
            Weight::Dense(matrix) => Weight::Dense(backend.copy_dense(matrix)?),
            Weight::Quantized(matrix) => Weight::Quantized(backend.copy_quantized(matrix)?),
        };
        Ok(Self { weight, bias })
    }

    /// The dense weight, if this layer has one: the embedding table of a model with tied embeddings.
    pub(crate) fn dense(&self) -> Option<&B::DenseMatrix> {
        match &self.weight {
            Weight::Dense(matrix) => Some(matrix),
            Weight::Quantized(_) => None,
        }
    }

    /// Multiplies `rows` rows of `input`.
    ///
    /// # Errors
    /// When a buffer is too short.
    pub fn forward(
        &self,
        backend: &B,
        input: &B::Buffer,
        output: &mut B::Buffer,
        rows: usize,
    ) -> Result<(), KernelError> {
        Self::forward_together(backend, input, [(self, output)], rows)
    }

    /// Multiplies `rows` rows of `input` by several layers, each with its output; those that are quantized in one
    /// operation.
    ///
    /// # Errors
    /// When a buffer is too short.
    pub fn forward_together<const N: usize>(
        backend: &B,
        input: &B::Buffer,
        layers: [(&Self, &mut B::Buffer); N],
        rows: usize,
    ) -> Result<(), KernelError> {
        let mut products = ArrayVec::<_, N>::new();
        for (layer, output) in layers {
            let bias = layer.bias.as_ref();
            match &layer.weight {
                Weight::Dense(weight) => {
                    backend.dense_matmul(dense_matmul::Args { input, weight, bias, output, rows })?;
                }
                Weight::Quantized(weight) => {
                    products.push(w4a16_matmul::Product { weight, bias, output });
                }
            }
        }
        if products.is_empty() {
            return Ok(());
        }
        backend.w4a16_matmul(w4a16_matmul::Args { input, products: &mut products, rows })
    }

    /// Bytes of device memory its weight holds.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.bytes(),
            Weight::Quantized(weight) => weight.bytes(),
        }
    }
}

/// A device buffer with `values`.
pub(crate) fn upload<B: Backend>(backend: &B, values: &[f32]) -> Result<B::Buffer, KernelError> {
    let mut buffer = backend.buffer(values.len())?;
    backend.write(values, &mut buffer)?;
    Ok(buffer)
}
