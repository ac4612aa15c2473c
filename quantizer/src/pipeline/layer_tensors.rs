//! The tensors of one decoder layer as they are quantized: with scales of inputs folded into what comes before.
//!
//! ```text
//! input                     multiplied by         divided in
//! attention input           q, k, v columns       the norm before it
//! attention output input    o columns             v rows and bias; with grouped queries one scale for all
//!                                                 query heads that share a value head
//! feed-forward input        gate, up columns      the norm before it
//! gated                     down columns          up rows and bias
//! ```
//!
//! The divided norms are stored in the element type of the checkpoint. So that this rounding changes nothing, the
//! columns are multiplied by what the norm was in fact divided by.

use half::{bf16, f16};
use nibble_kernels::backend::Backend;
use nibble_kernels::tensor::{DenseMatrix, DenseValues};
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, LinearWeight};
use nibble_model::error::CheckpointError;
use nibble_model::forward::{DecoderLayer, Linear, LinearRole, LinearSpec, NormRole};
use safetensors::Dtype;

use super::streams::LinearInput;
use crate::error::QuantizeError;
use crate::output::LAYERS;

/// The tensors of decoder layer `index`.
pub(super) struct LayerTensors<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) index: usize,
    /// The scales of each input, in the order of [`LinearInput::ALL`]; of the attention output input one for each
    /// value channel.
    scales: [Option<Vec<f32>>; 4],
}

impl<'a> LayerTensors<'a> {
    /// As they are in the checkpoint.
    pub(super) fn new(checkpoint: &'a Checkpoint, index: usize) -> Self {
        Self { checkpoint, index, scales: [const { None }; 4] }
    }

    /// Folds `scales` of `input`: one for each input; for [`LinearInput::AttentionOutput`] one for each value channel.
    pub(super) fn fold(&mut self, input: LinearInput, mut scales: Vec<f32>) -> Result<(), CheckpointError> {
        if let Some(norm) = norm_before(input) {
            let name = norm.name(self.index);
            let dtype = self.checkpoint.raw(&name)?.dtype;
            let values = self.checkpoint.vector(&name, scales.len())?;
            for (scale, value) in scales.iter_mut().zip(values) {
                let divided = stored(value / *scale, dtype);
                let exact = value / divided;
                *scale = if exact.is_finite() && exact != 0.0 { exact } else { 1.0 };
            }
        }
        self.scales[input as usize] = Some(scales);
        Ok(())
    }

    /// The weight of a linear layer, `[out_features, in_features]`, all finite.
    pub(super) fn weight(&self, role: LinearRole) -> Result<Vec<f32>, QuantizeError> {
        let spec = role.spec(self.checkpoint.config(), self.index);
        let inputs = spec.in_features;
        let mut values = finite_weight(self.checkpoint, &spec)?;
        if let Some(scales) = self.input_scales(LinearInput::of(role)) {
            for row in values.chunks_exact_mut(inputs) {
                row.iter_mut().zip(&scales).for_each(|(weight, scale)| *weight *= scale);
            }
        }
        if let Some(scales) = self.output_scales(role) {
            for (row, scale) in values.chunks_exact_mut(inputs).zip(scales) {
                row.iter_mut().for_each(|weight| *weight /= scale);
            }
        }
        Ok(values)
    }

    /// The bias of a linear layer that has one.
    pub(super) fn bias(&self, role: LinearRole) -> Result<Option<Vec<f32>>, CheckpointError> {
        let spec = role.spec(self.checkpoint.config(), self.index);
        if !spec.bias {
            return Ok(None);
        }
        let name = spec.bias_name();
        let values = self.checkpoint.vector(&name, spec.out_features)?;
        let Some(scales) = self.output_scales(role) else { return Ok(Some(values)) };
        let dtype = self.checkpoint.raw(&name)?.dtype;
        Ok(Some(values.iter().zip(scales).map(|(value, scale)| stored(value / scale, dtype)).collect()))
    }

    /// What each input of the linear layers of `input` is divided by, and its weights are multiplied by.
    pub(super) fn input_scales(&self, input: LinearInput) -> Option<Vec<f32>> {
        let scales = self.scales[input as usize].as_ref()?;
        if input != LinearInput::AttentionOutput {
            return Some(scales.clone());
        }
        Some(self.value_channels().into_iter().map(|channel| scales[channel]).collect())
    }

    /// For each input of the attention output projection the value channel it is computed from.
    pub(super) fn value_channels(&self) -> Vec<usize> {
        let config = self.checkpoint.config();
        let (width, shared) = (config.head_dim, config.heads / config.kv_heads);
        (0..config.heads * width).map(|input| input / width / shared * width + input % width).collect()
    }

    /// What each output of a linear layer is divided by.
    fn output_scales(&self, role: LinearRole) -> Option<&[f32]> {
        match role {
            LinearRole::Value => self.scales[LinearInput::AttentionOutput as usize].as_deref(),
            LinearRole::Up => self.scales[LinearInput::Gated as usize].as_deref(),
            _ => None,
        }
    }

    /// The norm before `input` as it is stored, where it was divided.
    fn norm(&self, input: LinearInput) -> Result<Option<(NormRole, Vec<f32>)>, CheckpointError> {
        let (Some(norm), Some(scales)) = (norm_before(input), &self.scales[input as usize]) else {
            return Ok(None);
        };
        let name = norm.name(self.index);
        let dtype = self.checkpoint.raw(&name)?.dtype;
        let values = self.checkpoint.vector(&name, scales.len())?;
        Ok(Some((
            norm,
            values.iter().zip(scales).map(|(value, scale)| stored(value / scale, dtype)).collect(),
        )))
    }

    /// Gives `layer` the folded norms, and the projections that are run before they are quantized.
    pub(super) fn fold_into<B: Backend>(
        &self,
        backend: &B,
        layer: &mut DecoderLayer<B>,
    ) -> Result<(), QuantizeError> {
        for input in LinearInput::ALL {
            if let Some((norm, values)) = self.norm(input)? {
                let name = norm.name(self.index);
                layer.replace_norm(backend, norm, &values).map_err(QuantizeError::matrix(&name))?;
            }
        }
        for role in [LinearRole::AttentionOutput, LinearRole::Down] {
            layer.replace(role, self.linear(backend, role, self.weight(role)?)?);
        }
        Ok(())
    }

    /// The linear layer `role` with the unquantized `weight`, [`Self::weight`], on the device.
    pub(super) fn linear<B: Backend>(
        &self,
        backend: &B,
        role: LinearRole,
        weight: Vec<f32>,
    ) -> Result<Linear<B>, QuantizeError> {
        let spec = role.spec(self.checkpoint.config(), self.index);
        let (values, bias) = (DenseValues::F32(weight.into()), self.bias(role)?);
        let linear = DenseMatrix::new(spec.out_features, spec.in_features, values).and_then(|matrix| {
            Linear::pack(backend, &spec.name, &LinearWeight::Dense(matrix), bias.as_deref())
        });
        linear.map_err(QuantizeError::matrix(&spec.name))
    }

    /// Writes the weight of a linear layer that is not quantized: `values`, in the element type of the checkpoint.
    pub(super) fn write_weight(
        &self,
        role: LinearRole,
        values: &[f32],
        writer: &mut CheckpointWriter,
    ) -> Result<(), CheckpointError> {
        let spec = role.spec(self.checkpoint.config(), self.index);
        let (name, shape) = (spec.weight_name(), [spec.out_features, spec.in_features]);
        let dtype = self.checkpoint.raw(&name)?.dtype;
        writer.tensor(&name, dtype, &shape, &bytes(values, dtype))
    }

    /// Writes every tensor but the weights of linear layers.
    pub(super) fn write(&self, writer: &mut CheckpointWriter) -> Result<(), CheckpointError> {
        let config = self.checkpoint.config();
        // Norms and biases that scales are folded into or that are padded; the others come out as they are.
        let mut vectors = Vec::new();
        for input in LinearInput::ALL {
            vectors.extend(self.norm(input)?.map(|(norm, values)| (norm.name(self.index), values)));
        }
        for role in [LinearRole::Value, LinearRole::Gate, LinearRole::Up] {
            let name = role.spec(config, self.index).bias_name();
            vectors.extend(self.bias(role)?.map(|values| (name, values)));
        }
        let weights = LinearRole::ALL.map(|role| role.spec(config, self.index).weight_name());
        let prefix = format!("{LAYERS}{}.", self.index);
        for tensor in self.checkpoint.tensors().filter(|tensor| tensor.name.starts_with(&prefix)) {
            if weights.iter().any(|weight| weight == tensor.name) {
                continue;
            }
            match vectors.iter().find(|(name, _)| name == tensor.name) {
                Some((name, values)) => {
                    writer.tensor(name, tensor.dtype, &[values.len()], &bytes(values, tensor.dtype))?;
                }
                None => writer.tensor(tensor.name, tensor.dtype, tensor.shape, tensor.data)?,
            }
        }
        Ok(())
    }
}

/// The weight of the linear layer `spec` as the checkpoint has it, `[out_features, in_features]`, all finite.
pub(super) fn finite_weight(checkpoint: &Checkpoint, spec: &LinearSpec) -> Result<Vec<f32>, QuantizeError> {
    let (outputs, inputs) = (spec.out_features, spec.in_features);
    let values = checkpoint.dense(&spec.weight_name(), outputs, inputs)?.to_f32();
    if let Some(position) = values.iter().position(|value| !value.is_finite()) {
        let (output, input) = (position / inputs, position % inputs);
        return Err(QuantizeError::NotFinite {
            name: spec.name.clone(),
            what: "the weights",
            found: format!("hold {} at output {output}, input {input}", values[position]),
            help: "the checkpoint is damaged; fetch or import it again",
        });
    }
    Ok(values)
}

/// The norm that computes `input`, if one does.
fn norm_before(input: LinearInput) -> Option<NormRole> {
    match input {
        LinearInput::Attention => Some(NormRole::Input),
        LinearInput::FeedForward => Some(NormRole::PostAttention),
        LinearInput::AttentionOutput | LinearInput::Gated => None,
    }
}

/// `value` as an element of type `dtype` holds it.
fn stored(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// `values` as elements of type `dtype`, little-endian.
fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}
