//! The ways to choose codes for a weight matrix.

pub(crate) mod awq;
pub(crate) mod correction;
pub(crate) mod gptq;
pub(crate) mod rtn;
#[cfg(test)]
mod tests;

use nibble_kernels::KernelError;
use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};

use crate::grid::Affine;

/// A weight matrix on its way to a [`QuantizedMatrix`], row-major `[out_features, in_features]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<'a> {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) values: &'a [f32],
}

/// Codes, and the grid of each group, `[out_features, groups]`.
pub(crate) fn assemble(
    weights: Weights<'_>,
    bits: u32,
    group_size: usize,
    codes: Vec<u8>,
    grids: &[Affine],
) -> Result<QuantizedMatrix, KernelError> {
    QuantizedMatrix::new(QuantizedParts {
        out_features: weights.out_features,
        in_features: weights.in_features,
        bits,
        group_size,
        codes,
        scales: grids.iter().map(|grid| grid.scale).collect(),
        offsets: GroupOffsets::ZeroPoints(grids.iter().map(|grid| grid.zero).collect()),
        input_permutation: None,
    })
}
