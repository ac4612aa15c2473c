//! Round to nearest: each weight gets the code whose value lies nearest to it.

use rayon::prelude::*;

use super::Weights;
use crate::grid::{Affine, Grid};

/// Codes `[out_features, in_features]` and grids `[out_features, groups]`.
///
/// `importance` `[in_features]` says how much an error at each input counts in the search for a range.
/// Rows are independent.
pub(crate) fn quantize(
    weights: Weights<'_>,
    grid: Grid,
    group_size: usize,
    importance: &[f32],
) -> (Vec<u8>, Vec<Affine>) {
    let inputs = weights.in_features;
    let rows = weights.values.par_chunks_exact(inputs).map(|row| {
        let grids: Vec<Affine> = row
            .chunks(group_size)
            .zip(importance.chunks(group_size))
            .map(|(weights, importance)| grid.fit(weights, importance))
            .collect();
        let codes = row.iter().enumerate().map(|(input, &weight)| grids[input / group_size].code(weight));
        (codes.collect::<Vec<u8>>(), grids)
    });
    let (codes, grids): (Vec<_>, Vec<_>) = rows.unzip();
    (codes.concat(), grids.concat())
}
