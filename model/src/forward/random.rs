//! A model of random weights: to measure speed and memory of a shape without a checkpoint of it.
//!
//! Weights are made once for each shape and copied on the device for each layer, so that a model of any depth is there in
//! seconds. Their size keeps activations in the range of a real model's.

use std::borrow::Cow;

use half::f16;
use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;
use nibble_kernels::ops::paged_attention;
use nibble_kernels::tensor::{DenseMatrix, DenseValues, GroupOffsets, QuantizedMatrix, QuantizedParts};

use super::ModelError;
use super::decoder_layer::{DecoderLayer, LinearRole};
use super::linear::{Linear, LinearSpec, upload};
use super::model::{Model, Table, Weights};
use super::output_stage::{FinalNorm, pack_output_head};
use super::streamed::EMBEDDING;
use crate::checkpoint::LinearWeight;
use crate::config::ModelConfig;

/// Distinct values of a dense random matrix.
const DENSE_VALUES: usize = 1 << 16;

impl<B: Backend> Model<B> {
    /// A model of `config`'s shape and quantization with random weights, norms of 1 and biases of 0. Sequences may be
    /// up to `max_positions` tokens long.
    ///
    /// # Errors
    /// When the device has no kernel for a weight, or not enough memory.
    pub fn random(backend: B, config: &ModelConfig, max_positions: usize) -> Result<Self, ModelError> {
        paged_attention::check_heads(config.heads, config.kv_heads, config.head_dim)?;
        let norm = |_: &str, length: usize| -> Result<B::Buffer, ModelError> {
            Ok(upload(&backend, &vec![1.0; length])?)
        };
        let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
        let mut random = Random(1);
        let table = random.dense(vocabulary, hidden)?;
        let embedding_name = EMBEDDING.trim_end_matches(".weight");
        let embedding = Table::Own(backend.pack_dense(embedding_name, &table)?);
        let head = pack_output_head(&backend, config, LinearWeight::Dense(table))?;
        let mut made: Vec<(LinearSpec, Linear<B>)> = Vec::new();
        let mut linear = |spec: LinearSpec| -> Result<Linear<B>, ModelError> {
            let same = |made: &LinearSpec| {
                (made.out_features, made.in_features) == (spec.out_features, spec.in_features)
            };
            let bias = spec.bias.then(|| backend.buffer(spec.out_features)).transpose()?;
            if let Some((_, linear)) = made.iter().find(|(made, _)| same(made)) {
                return Ok(linear.copy(&backend, bias)?);
            }
            let weight = random.linear(config, &spec)?;
            let linear = Linear::pack(&backend, &spec.name, &weight, None)?;
            let copy = linear.copy(&backend, bias)?;
            made.push((spec, linear));
            Ok(copy)
        };
        let layer = |index| {
            let of_role = |role: LinearRole| linear(role.spec(config, index));
            DecoderLayer::build::<ModelError>(config, norm, of_role)
        };
        let layers = (0..config.layers).map(layer).collect::<Result<_, _>>()?;
        drop(made);
        let final_norm = FinalNorm { weight: norm("norm", hidden)? };
        let weights = Weights { embedding, layers, final_norm, head };
        Ok(Self::with_weights(backend, config, weights, max_positions)?)
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Uniform values whose outputs are as large as their inputs.
    fn dense(
        &mut self,
        out_features: usize,
        in_features: usize,
    ) -> Result<DenseMatrix<'static>, KernelError> {
        let size = (3.0 / in_features as f32).sqrt();
        let uniform = |random: &mut Self| (random.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let distinct: Vec<f16> = (0..DENSE_VALUES).map(|_| f16::from_f32(uniform(self) * size)).collect();
        let count = out_features * in_features;
        let mut values = Vec::with_capacity(count + 3);
        while values.len() < count {
            let word = self.next();
            values.extend([0, 16, 32, 48].map(|shift| distinct[(word >> shift) as usize % DENSE_VALUES]));
        }
        values.truncate(count);
        DenseMatrix::new(out_features, in_features, DenseValues::F16(Cow::Owned(values)))
    }

    /// The weight of a linear layer, quantized as the model says.
    fn linear(
        &mut self,
        config: &ModelConfig,
        spec: &LinearSpec,
    ) -> Result<LinearWeight<'static>, KernelError> {
        let (out_features, in_features) = (spec.out_features, spec.in_features);
        let settings = config.quantization.as_ref().and_then(|settings| settings.settings_of(&spec.name));
        let Some(settings) = settings else {
            return Ok(LinearWeight::Dense(self.dense(out_features, in_features)?));
        };
        let (bits, group_size) = (settings.bits, settings.group_size.inputs(in_features));
        let (levels, groups) = (1u32 << bits, in_features.div_ceil(group_size));
        let count = out_features * in_features;
        let middle = (levels / 2) as u8;
        // The lowest code has no opposite. With a mean other than zero, activations would grow from layer to layer until
        // 16 bits do not hold them.
        let code = |byte: u8| match byte & (levels - 1) as u8 {
            0 => middle,
            code => code,
        };
        let mut codes = Vec::with_capacity(count + 7);
        while codes.len() < count {
            codes.extend(self.next().to_le_bytes().map(code));
        }
        codes.truncate(count);
        // Codes have about the variance levels^2 / 12.
        let scale = (12.0 / in_features as f32).sqrt() / levels as f32;
        let mut zero_points = vec![middle; out_features * groups];
        if !settings.symmetric {
            zero_points.iter_mut().for_each(|zero| *zero = *zero + (self.next() % 3) as u8 - 1);
        }
        let scales = vec![scale; out_features * groups];
        Ok(LinearWeight::Quantized(QuantizedMatrix::new(QuantizedParts {
            out_features,
            in_features,
            bits,
            group_size,
            codes,
            scales,
            offsets: GroupOffsets::ZeroPoints(zero_points),
            input_permutation: None,
        })?))
    }
}

#[cfg(test)]
mod tests {
    use nibble_kernels::device::cpu::Cpu;
    use serde_json::json;

    use super::*;
    use crate::forward::Batch;

    #[test]
    fn a_random_model_of_a_config_alone_gives_finite_logits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let mut config = json!({
            "architectures": ["Qwen2ForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
            "max_position_embeddings": 64, "torch_dtype": "float16",
        });
        for quantization in [None, Some(json!({"quant_method": "gptq", "bits": 4, "group_size": 32}))] {
            if let Some(settings) = quantization {
                config["quantization_config"] = settings;
            }
            std::fs::write(&path, config.to_string()).unwrap();
            let parsed = ModelConfig::from_file(&path).unwrap();
            assert_eq!(parsed.quantization.is_some(), config.get("quantization_config").is_some());
            let mut model = Model::random(Cpu::new(1), &parsed, 32).unwrap();
            let mut cache = model.kv_cache(2).unwrap();
            let logits = model.forward(&Batch::single(&[3, 50, 99], 0, vec![0, 1]), &mut cache).unwrap();
            let largest = logits.values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            assert!(logits.values.iter().all(|value| value.is_finite()), "{:?}", logits.values);
            assert!((0.01..20.0).contains(&largest), "{largest}");
        }
    }
}
