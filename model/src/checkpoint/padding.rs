//! Feed-forward layers that are wider than the files hold them.
//!
//! ```text
//! gate_proj, up_proj  [intermediate, hidden], biases [intermediate]    rows of zeros below
//! down_proj           [hidden, intermediate]                           columns of zeros at the right
//! ```
//!
//! Exact: `silu(0) * 0 = 0`, and that times a column of zeros.

use bytemuck::Pod;

/// The axis of the tensor `name` that is as long as the intermediate size, if one is.
pub(super) fn intermediate_axis(name: &str) -> Option<usize> {
    let (_, part) = name.split_once(".mlp.")?;
    match part {
        "gate_proj.weight" | "up_proj.weight" | "gate_proj.bias" | "up_proj.bias" => Some(0),
        "down_proj.weight" => Some(1),
        _ => None,
    }
}

/// `values` of shape `stored`, row-major, with zeros behind in each direction up to `shape`, which is no smaller.
pub(super) fn padded<T: Pod>(values: &[T], stored: &[usize], shape: &[usize]) -> Vec<T> {
    let last = |shape: &[usize]| shape.last().copied().unwrap_or(1);
    let elements: usize = shape.iter().product();
    let mut padded = Vec::with_capacity(elements);
    for row in values.chunks_exact(last(stored).max(1)) {
        padded.extend_from_slice(row);
        padded.resize(padded.len() + last(shape) - row.len(), T::zeroed());
    }
    padded.resize(elements, T::zeroed());
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_come_behind_rows_and_columns() {
        assert_eq!(padded(&[1, 2, 3, 4], &[2, 2], &[2, 3]), [1, 2, 0, 3, 4, 0]);
        assert_eq!(padded(&[1, 2, 3, 4], &[2, 2], &[3, 2]), [1, 2, 3, 4, 0, 0]);
        assert_eq!(padded(&[1, 2], &[2], &[4]), [1, 2, 0, 0]);
    }

    #[test]
    fn only_feed_forward_tensors_have_an_intermediate_axis() {
        let axis = |part: &str| intermediate_axis(&format!("model.layers.3.{part}"));
        assert_eq!([axis("mlp.up_proj.weight"), axis("mlp.gate_proj.bias")], [Some(0); 2]);
        assert_eq!(axis("mlp.down_proj.weight"), Some(1));
        assert_eq!([axis("mlp.down_proj.bias"), axis("self_attn.q_proj.weight")], [None; 2]);
    }
}
