//! The rotary embedding, from the metadata and the tensor `rope_freqs.weight`.
//!
//! llama.cpp stores Llama 3.1's scaling not as parameters but as its result: a divisor for each of the
//! `head_dim / 2` frequencies. With the wavelength `w = 2 pi theta^(2i / head_dim)` it is
//!
//! ```text
//! 1                                  w < original / high
//! factor                             w > original / low
//! 1 / ((1 - s) / factor + s)         between, s = (original / w - low) / (high - low)
//! ```
//!
//! The parameters are found again from it: `factor` is the largest divisor, and between the limits `s` is a line
//! over `1 / w`, whose slope and height give `low` and `high`. Only `original / low` and `original / high`
//! matter, so `original` may be chosen; 8192 is that of every Llama 3. What was found is checked against the whole
//! tensor; divisors that do not follow this formula are refused.

use std::f64::consts::TAU;

use super::architecture::Metadata;
use crate::config::{RopeParameters, RopeScaling};
use crate::error::CheckpointError;

const TENSOR: &str = "rope_freqs.weight";
const DEFAULT_THETA: f32 = 10_000.0;
const ORIGINAL_POSITIONS: usize = 8192;
/// Llama 3's own factors, for tensors with too few divisors between the limits to find them.
const LLAMA3_FACTORS: (f64, f64) = (1.0, 4.0);
/// Relative difference allowed between a divisor and the formula: the tensor is F32 and its maker computed in F32.
const TOLERANCE: f64 = 1e-3;

/// Reads the rotary embedding of a model with heads of `head_dim`.
pub(super) fn read(metadata: &Metadata<'_>, head_dim: usize) -> Result<RopeParameters, CheckpointError> {
    let theta = metadata.positive("rope.freq_base", Some(DEFAULT_THETA))?;
    let from_metadata = scaling(metadata)?;
    match divisors(metadata, head_dim)? {
        None => Ok(RopeParameters { theta, scaling: from_metadata }),
        Some(divisors) if from_metadata == RopeScaling::None => {
            let scaling = llama3(&divisors, theta.into()).ok_or_else(|| CheckpointError::Unsupported {
                file: metadata.gguf.path().to_owned(),
                item: format!("tensor \"{TENSOR}\""),
                found: "a scaling of unknown form".to_owned(),
                supported: "the scaling of Llama 3.1".to_owned(),
            })?;
            Ok(RopeParameters { theta, scaling })
        }
        Some(_) => {
            let key = metadata.key("rope.scaling.type");
            Err(metadata.gguf.unsupported(&key, "present", format!("a file without {TENSOR}")))
        }
    }
}

/// The scaling that the metadata name.
fn scaling(metadata: &Metadata<'_>) -> Result<RopeScaling, CheckpointError> {
    let key = metadata.key("rope.scaling.type");
    match metadata.gguf.string(&key)? {
        None | Some("none") => {
            // What files had before there was a type.
            match metadata.positive("rope.scale_linear", Some(1.0))? {
                1.0 => Ok(RopeScaling::None),
                factor => Ok(RopeScaling::Linear { factor }),
            }
        }
        Some("linear") => match metadata.positive("rope.scaling.factor", None)? {
            1.0 => Ok(RopeScaling::None),
            factor => Ok(RopeScaling::Linear { factor }),
        },
        Some(other) => {
            let supported = "none, linear, and Llama 3.1's in rope_freqs.weight";
            Err(metadata.gguf.unsupported(&key, format!("\"{other}\""), supported))
        }
    }
}

/// The divisors of the frequencies, if the file has them.
fn divisors(metadata: &Metadata<'_>, head_dim: usize) -> Result<Option<Vec<f64>>, CheckpointError> {
    let Some(tensor) = metadata.gguf.tensor(TENSOR) else { return Ok(None) };
    let file = metadata.gguf.path();
    let wrong = |found: String, expected: String| {
        CheckpointError::tensor(file, TENSOR, found, expected, "convert the model again")
    };
    if tensor.shape != [head_dim / 2] {
        return Err(wrong(format!("of shape {:?}", tensor.shape), format!("[{}]", head_dim / 2)));
    }
    let mut values = vec![0.0; tensor.elements()];
    tensor.block_type(file)?.decode(tensor.data, &mut values);
    if let Some(value) = values.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
        return Err(wrong(format!("holding {value}"), "positive numbers".to_owned()));
    }
    Ok(Some(values.into_iter().map(f64::from).collect()))
}

/// The parameters of Llama 3.1's scaling that give `divisors`, if any do.
fn llama3(divisors: &[f64], theta: f64) -> Option<RopeScaling> {
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    if divisors.iter().all(|divisor| (divisor - 1.0).abs() < TOLERANCE) {
        return Some(RopeScaling::None);
    }
    let inverse_wavelength = |index: usize| theta.powf(-(index as f64) / divisors.len() as f64) / TAU;
    let original = ORIGINAL_POSITIONS as f64;
    let blended: Vec<(f64, f64)> = divisors
        .iter()
        .enumerate()
        .filter(|&(_, &divisor)| divisor > 1.0 + TOLERANCE && divisor < factor * (1.0 - TOLERANCE))
        .map(|(index, divisor)| {
            (inverse_wavelength(index), (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor))
        })
        .collect();
    let (low, high) = match (blended.first(), blended.last()) {
        (Some(&(x0, s0)), Some(&(x1, s1))) if blended.len() > 1 => {
            let slope = (s0 - s1) / (x0 - x1);
            let width = original / slope;
            let low = -(s0 - slope * x0) * width;
            (near_integer(low), near_integer(low + width))
        }
        _ => LLAMA3_FACTORS,
    };
    let formula = |inverse_wavelength: f64| {
        let smooth = ((original * inverse_wavelength - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let fits = divisors
        .iter()
        .enumerate()
        .all(|(index, divisor)| (formula(inverse_wavelength(index)) / divisor - 1.0).abs() < TOLERANCE);
    (fits && low > 0.0 && high > low).then_some(RopeScaling::Llama3 {
        factor: near_integer(factor) as f32,
        low_frequency_factor: low as f32,
        high_frequency_factor: high as f32,
        original_max_position_embeddings: ORIGINAL_POSITIONS,
    })
}

/// `value`, or the integer that it is but for rounding.
fn near_integer(value: f64) -> f64 {
    let integer = value.round();
    if integer > 0.0 && (value / integer - 1.0).abs() < TOLERANCE { integer } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The divisors as llama.cpp's `convert_hf_to_gguf.py` computes them, in F32.
    fn written(theta: f64, head_dim: usize, factor: f64, low: f64, high: f64, original: f64) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|index| {
                let wavelength = TAU * theta.powf(2.0 * index as f64 / head_dim as f64);
                let divisor = if wavelength < original / high {
                    1.0
                } else if wavelength > original / low {
                    factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                };
                f64::from(divisor as f32)
            })
            .collect()
    }

    #[test]
    fn the_parameters_of_llama_3_are_found_again() {
        for (factor, head_dim) in [(8.0, 128), (32.0, 64)] {
            let divisors = written(500_000.0, head_dim, factor, 1.0, 4.0, 8192.0);
            let expected = RopeScaling::Llama3 {
                factor: factor as f32,
                low_frequency_factor: 1.0,
                high_frequency_factor: 4.0,
                original_max_position_embeddings: 8192,
            };
            assert_eq!(llama3(&divisors, 500_000.0), Some(expected));
        }
    }

    #[test]
    fn another_original_context_gives_the_same_frequencies() {
        let divisors = written(500_000.0, 128, 16.0, 1.0, 4.0, 4096.0);
        let expected = RopeScaling::Llama3 {
            factor: 16.0,
            low_frequency_factor: 2.0,
            high_frequency_factor: 8.0,
            original_max_position_embeddings: 8192,
        };
        assert_eq!(llama3(&divisors, 500_000.0), Some(expected));
    }

    #[test]
    fn ones_are_no_scaling_and_other_divisors_are_refused() {
        assert_eq!(llama3(&[1.0; 32], 10_000.0), Some(RopeScaling::None));
        let mut divisors = written(500_000.0, 128, 8.0, 1.0, 4.0, 8192.0);
        divisors[40] *= 1.1;
        assert_eq!(llama3(&divisors, 500_000.0), None);
    }
}
