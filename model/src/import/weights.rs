//! The elements of one tensor, from blocks to the bytes of a float type.

use half::{bf16, f16};
use nibble_kernels::tensor::FloatType;

use crate::error::CheckpointError;
use crate::gguf_model::{GgufModel, TensorPlan};

/// Decodes the tensor of `plan` row by row and rounds to `float_type`, to nearest even.
pub(super) fn convert(
    model: &GgufModel,
    plan: &TensorPlan,
    float_type: FloatType,
) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes = Vec::with_capacity(plan.shape.iter().product::<usize>() * float_type.bytes());
    model.decode(plan, &mut |values| match append(values, float_type, &mut bytes) {
        None => Ok(()),
        Some(value) => {
            let help = if value.is_finite() {
                "import with --dtype bf16 or f32"
            } else {
                "the file is damaged: fetch it again"
            };
            let expected = format!("within the range of {float_type}");
            let found = format!("holding {value}");
            Err(CheckpointError::tensor(model.path(), &plan.source, found, expected, help))
        }
    })?;
    Ok(bytes)
}

/// Appends `values` as little-endian `float_type`. Returns the first that this type cannot hold.
fn append(values: &[f32], float_type: FloatType, bytes: &mut Vec<u8>) -> Option<f32> {
    for &value in values {
        let finite = match float_type {
            FloatType::F32 => {
                bytes.extend_from_slice(&value.to_le_bytes());
                value.is_finite()
            }
            FloatType::F16 => {
                let rounded = f16::from_f32(value);
                bytes.extend_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
            FloatType::BF16 => {
                let rounded = bf16::from_f32(value);
                bytes.extend_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
        };
        if !finite {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_out_of_range_is_named() {
        let mut bytes = Vec::new();
        assert_eq!(append(&[1.0, 65_504.0, 65_519.0], FloatType::F16, &mut bytes), None);
        assert_eq!(append(&[1.0, -65_520.0, f32::NAN], FloatType::F16, &mut bytes), Some(-65_520.0));
        assert_eq!(append(&[70_000.0], FloatType::BF16, &mut bytes), None);
        assert!(append(&[f32::NAN], FloatType::F32, &mut bytes).is_some_and(f32::is_nan));
    }
}
