//! The elements of one tensor, from blocks to the bytes of a float type.

use half::{bf16, f16};
use nibble_kernels::tensor::FloatType;

use super::tensors::{RowOrder, TensorPlan};
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

/// Decodes the tensor of `plan` row by row, puts the rows in order and rounds to `float_type`, to nearest even.
pub(super) fn convert(
    gguf: &GgufFile,
    plan: &TensorPlan,
    float_type: FloatType,
) -> Result<Vec<u8>, CheckpointError> {
    let file = gguf.path();
    let Some(tensor) = gguf.tensor(&plan.source) else {
        unreachable!("the plan holds only tensors that the file has");
    };
    let block = tensor.block_type(file)?;
    // A vector is one row of blocks, so it is put in order after decoding.
    let (rows, width) = match plan.shape.as_slice() {
        [rows, width] => (*rows, *width),
        _ => (1, tensor.elements()),
    };
    let row_bytes = width / block.elements() * block.bytes();
    let mut values = vec![0.0; width];
    let mut bytes = Vec::with_capacity(rows * width * float_type.bytes());
    for row in 0..rows {
        let source = if plan.shape.len() == 2 { plan.rows.source_row(row) } else { row };
        block.decode(&tensor.data[source * row_bytes..][..row_bytes], &mut values);
        if plan.shape.len() == 1 && plan.rows != RowOrder::Same {
            values = (0..width).map(|index| values[plan.rows.source_row(index)]).collect();
        }
        if let Some(value) = append(&values, float_type, &mut bytes) {
            let help = if value.is_finite() {
                "import with --dtype bf16 or f32"
            } else {
                "the file is damaged: fetch it again"
            };
            let expected = format!("within the range of {float_type}");
            let found = format!("holding {value}");
            return Err(CheckpointError::tensor(file, &plan.source, found, expected, help));
        }
    }
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
