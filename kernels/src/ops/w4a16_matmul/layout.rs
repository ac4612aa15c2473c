//! How a quantized matrix lies in the memory of a CUDA device.
//!
//! ```text
//! words        [out_features, ceil(in_features / 8)]   position 8 w + i in bits 4 i to 4 i + 3 of word w
//! scales       [out_features, groups]                  elements of the device
//! zero_points  [out_features, groups]                  bytes
//! ```

use crate::device::cuda::Element;
use crate::error::KernelError;
use crate::tensor::QuantizedMatrix;

/// Bits of the codes that the kernels read.
const BITS: u32 = 4;

/// A quantized matrix as it is copied to the device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PackedParts {
    /// Packed codes.
    pub(crate) words: Vec<u32>,
    /// Bits of the scales in the device's element type.
    pub(crate) scales: Vec<u16>,
    /// Zero points.
    pub(crate) zero_points: Vec<u8>,
    /// The input of each stored position; absent: the position itself.
    pub(crate) permutation: Option<Vec<u32>>,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) group_size: usize,
}

/// Packs `matrix` for a device with activations of type `element`.
///
/// # Errors
/// When its codes have not four bits.
pub(crate) fn pack(matrix: &QuantizedMatrix, element: Element) -> Result<PackedParts, KernelError> {
    let bits = matrix.bits();
    KernelError::require(bits == BITS, "w4a16_matmul", "bits", bits, "must be 4 on a CUDA device")?;
    let word = |codes: &[u8]| {
        codes
            .iter()
            .enumerate()
            .fold(0, |word, (index, &code)| word | u32::from(code) << (BITS as usize * index))
    };
    let rows = matrix.codes().chunks(matrix.in_features().max(1));
    Ok(PackedParts {
        words: rows.flat_map(|row| row.chunks(8).map(word)).collect(),
        scales: matrix.scales().iter().map(|&scale| element.round(scale)).collect(),
        zero_points: matrix.zero_points().to_vec(),
        permutation: matrix.input_permutation().map(<[u32]>::to_vec),
        out_features: matrix.out_features(),
        in_features: matrix.in_features(),
        group_size: matrix.group_size(),
    })
}
