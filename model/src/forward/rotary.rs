//! The cosines and sines of rotary position embedding, for every position a model may see.
//!
//! `angle(p, i) = p * frequency(i)`, `frequency(i) = theta^(-2i / head_dim)`, then scaled. Frequencies and
//! angles are rounded to `f32` as in Hugging Face transformers, so that logits agree at long positions.

use nibble_kernels::KernelError;
use nibble_kernels::backend::Backend;

use crate::config::{ModelConfig, RopeScaling};
use crate::forward::linear::upload;

/// Tables `[positions, head_dim / 2]` on the device.
pub(crate) struct RotaryTables<B: Backend> {
    pub(crate) cosines: B::Buffer,
    pub(crate) sines: B::Buffer,
    pub(crate) positions: usize,
}

impl<B: Backend> RotaryTables<B> {
    pub(crate) fn new(backend: &B, config: &ModelConfig, positions: usize) -> Result<Self, KernelError> {
        let frequencies = frequencies(config);
        let table = |function: fn(f64) -> f64| -> Vec<f32> {
            let angle = |position: usize, frequency: f32| f64::from(position as f32 * frequency);
            (0..positions)
                .flat_map(|position| {
                    frequencies.iter().map(move |&frequency| function(angle(position, frequency)) as f32)
                })
                .collect()
        };
        Ok(Self {
            cosines: upload(backend, &table(f64::cos))?,
            sines: upload(backend, &table(f64::sin))?,
            positions,
        })
    }
}

/// The scaled frequency of each pair of elements of a head.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    let plain = (0..config.head_dim / 2).map(|index| {
        let exponent = (2 * index) as f32 / config.head_dim as f32;
        1.0 / config.rope.theta.powf(exponent)
    });
    plain.map(|frequency| scale(frequency, &config.rope.scaling)).collect()
}

/// Scaling of a frequency; `Llama3` follows the Llama 3.1 release: low frequencies are divided by the
/// factor, high ones kept, those between interpolated.
fn scale(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_frequency_factor,
            high_frequency_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f32;
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength > original / low_frequency_factor {
                frequency / factor
            } else if wavelength < original / high_frequency_factor {
                frequency
            } else {
                let range = high_frequency_factor - low_frequency_factor;
                let smooth = (original / wavelength - low_frequency_factor) / range;
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA_3_1: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    #[test]
    fn llama_3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        assert_eq!(scale(0.1, &LLAMA_3_1), 0.1);
        assert_eq!(scale(1e-5, &LLAMA_3_1), 1e-5 / 8.0);
        let between = scale(2.0 * std::f32::consts::PI / 4096.0, &LLAMA_3_1);
        let expected = 2.0 * std::f32::consts::PI / 4096.0 * (2.0 / 3.0 / 8.0 + 1.0 / 3.0);
        assert!((between - expected).abs() < 1e-9, "{between} {expected}");
    }
}
