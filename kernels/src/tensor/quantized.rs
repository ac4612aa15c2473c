//! `QuantizedMatrix`: the one in-memory form of a group-wise integer weight matrix.
//!
//! Every file format is a reader and a writer of this form at the edge; every backend packs it once
//! into its device form.
//!
//! ```text
//! w[n, p] = (codes[n, p] - zero_points[n, p / group_size]) * scales[n, p / group_size]     or
//! w[n, p] =  codes[n, p] * scales[n, p / group_size] + minimums[n, p / group_size]
//! y[n]    = sum over p of w[n, p] * x[input(p)]
//! ```
//!
//! A matrix has zero points, as GPTQ, AWQ and compressed-tensors write them, or minimums, as GGUF files do
//! ([`GroupOffsets`]). Codes have no sign: those of a format that has signed ones are stored plus a zero point.
//!
//! `n` counts outputs, `p` stored input positions. `input(p)` is `p`, or `input_permutation[p]` for a
//! checkpoint whose groups are not made of consecutive inputs (act-order with a `g_idx`).
//! The last group may be partial: there are `ceil(in_features / group_size)` groups.

use super::DenseMatrix;
use crate::error::KernelError;

const NAME: &str = "quantized matrix";

/// Where the codes of each group lie on the number line. Row-major `[out_features, groups]`.
#[derive(Clone, Debug, PartialEq)]
pub enum GroupOffsets {
    /// `weight = (code - zero_point) * scale`; each at most `2^bits` (GPTQ v1 can express 16 for 4 bits).
    ZeroPoints(Vec<u8>),
    /// `weight = code * scale + minimum`; finite.
    Minimums(Vec<f32>),
}

/// The parts of a [`QuantizedMatrix`], by name, before they were checked.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedParts {
    /// Number of outputs.
    pub out_features: usize,
    /// Number of inputs.
    pub in_features: usize,
    /// Bits of a code, 2 to 8.
    pub bits: u32,
    /// Stored input positions that share a scale and a zero point.
    pub group_size: usize,
    /// Row-major `[out_features, in_features]`, one code a byte, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Row-major `[out_features, groups]`, finite.
    pub scales: Vec<f32>,
    /// The zero point or the minimum of each group.
    pub offsets: GroupOffsets,
    /// `input_permutation[p]` is the input feature at stored position `p`; `None` is the identity.
    pub input_permutation: Option<Vec<u32>>,
}

/// A group-wise quantized weight matrix whose invariants hold. See the module text for the formula.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    parts: QuantizedParts,
}

impl QuantizedMatrix {
    /// Checks every invariant of `parts` (sizes, ranges, finite scales, a true permutation).
    ///
    /// # Errors
    /// Names the part that is wrong, what was found and what was expected.
    pub fn new(parts: QuantizedParts) -> Result<Self, KernelError> {
        let QuantizedParts { out_features, in_features, bits, group_size, .. } = parts;
        KernelError::require((2..=8).contains(&bits), NAME, "bits", bits, "must be 2 to 8")?;
        KernelError::require(group_size > 0, NAME, "group_size", group_size, "must be positive")?;
        let groups = in_features.div_ceil(group_size);
        KernelError::check(NAME, "codes", parts.codes.len(), out_features * in_features)?;
        KernelError::check(NAME, "scales", parts.scales.len(), out_features * groups)?;
        let levels = 1u32 << bits;
        // A search that ends early cannot be vectorized.
        let largest = parts.codes.iter().fold(0, |largest, &code| code.max(largest));
        KernelError::require(u32::from(largest) < levels, NAME, "codes", largest, "must be below 2^bits")?;
        match &parts.offsets {
            GroupOffsets::ZeroPoints(zero_points) => {
                KernelError::check(NAME, "zero_points", zero_points.len(), out_features * groups)?;
                let zero = zero_points.iter().find(|&&zero| u32::from(zero) > levels);
                let found = zero.unwrap_or(&0);
                KernelError::require(zero.is_none(), NAME, "zero_points", found, "at most 2^bits")?;
            }
            GroupOffsets::Minimums(minimums) => {
                KernelError::check(NAME, "minimums", minimums.len(), out_features * groups)?;
                let unsound = minimums.iter().find(|minimum| !minimum.is_finite());
                let found = unsound.unwrap_or(&0.0);
                KernelError::require(unsound.is_none(), NAME, "minimums", found, "must be finite")?;
            }
        }
        let scale = parts.scales.iter().find(|scale| !scale.is_finite());
        KernelError::require(scale.is_none(), NAME, "scales", scale.unwrap_or(&0.0), "must be finite")?;
        if let Some(permutation) = &parts.input_permutation {
            KernelError::check(NAME, "input_permutation", permutation.len(), in_features)?;
            let mut seen = vec![false; in_features];
            for &input in permutation {
                let fresh = seen.get_mut(input as usize).is_some_and(|seen| !std::mem::replace(seen, true));
                KernelError::require(
                    fresh,
                    NAME,
                    "input_permutation",
                    input,
                    "each input must appear exactly once",
                )?;
            }
        }
        Ok(Self { parts })
    }

    /// `matrix` with every weight rounded to the nearest of `2^bits - 1` values around zero, evenly spaced up to the
    /// largest of its group.
    ///
    /// # Errors
    /// When a weight is not finite, or bits or group size are out of range.
    pub fn round_to_nearest(
        matrix: &DenseMatrix<'_>,
        bits: u32,
        group_size: usize,
    ) -> Result<Self, KernelError> {
        KernelError::require((2..=8).contains(&bits), NAME, "bits", bits, "must be 2 to 8")?;
        KernelError::require(group_size > 0, NAME, "group_size", group_size, "must be positive")?;
        let (out_features, in_features) = (matrix.out_features(), matrix.in_features());
        let middle = (1u32 << (bits - 1)) as f32;
        let groups = in_features.div_ceil(group_size);
        let mut codes = Vec::with_capacity(out_features * in_features);
        let mut scales = Vec::with_capacity(out_features * groups);
        let mut row = Vec::with_capacity(in_features);
        for output in 0..out_features {
            row.clear();
            row.extend((0..in_features).map(|input| matrix.values().get(output * in_features + input)));
            for group in row.chunks(group_size) {
                let largest = group.iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
                let unsound = group.iter().find(|weight| !weight.is_finite());
                KernelError::require(
                    unsound.is_none(),
                    NAME,
                    "weights",
                    unsound.unwrap_or(&0.0),
                    "must be finite",
                )?;
                let scale = largest / (middle - 1.0);
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                scales.push(scale);
                codes.extend(group.iter().map(|weight| ((weight * inverse).round() + middle) as u8));
            }
        }
        Self::new(QuantizedParts {
            out_features,
            in_features,
            bits,
            group_size,
            codes,
            scales,
            offsets: GroupOffsets::ZeroPoints(vec![middle as u8; out_features * groups]),
            input_permutation: None,
        })
    }

    /// Number of outputs.
    pub fn out_features(&self) -> usize {
        self.parts.out_features
    }

    /// Number of inputs.
    pub fn in_features(&self) -> usize {
        self.parts.in_features
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        self.parts.bits
    }

    /// Stored input positions that share a scale and a zero point.
    pub fn group_size(&self) -> usize {
        self.parts.group_size
    }

    /// Number of groups along the inputs.
    pub fn groups(&self) -> usize {
        self.parts.in_features.div_ceil(self.parts.group_size)
    }

    /// Codes, row-major `[out_features, in_features]`, one a byte.
    pub fn codes(&self) -> &[u8] {
        &self.parts.codes
    }

    /// Scales, row-major `[out_features, groups]`.
    pub fn scales(&self) -> &[f32] {
        &self.parts.scales
    }

    /// The zero point or the minimum of each group.
    pub fn offsets(&self) -> &GroupOffsets {
        &self.parts.offsets
    }

    /// Zero points, row-major `[out_features, groups]`; `None` for a matrix with minimums.
    pub fn zero_points(&self) -> Option<&[u8]> {
        match &self.parts.offsets {
            GroupOffsets::ZeroPoints(zero_points) => Some(zero_points),
            GroupOffsets::Minimums(_) => None,
        }
    }

    /// `permutation[p]` is the input feature at stored position `p`; `None` is the identity.
    pub fn input_permutation(&self) -> Option<&[u32]> {
        self.parts.input_permutation.as_deref()
    }

    /// Whether every group has a zero point in the middle of the range (`2^(bits-1)`).
    pub fn is_symmetric(&self) -> bool {
        let middle = 1u8 << (self.parts.bits - 1);
        self.zero_points().is_some_and(|zero_points| zero_points.iter().all(|&zero| zero == middle))
    }

    /// The weights this matrix stands for, row-major `[out_features, in_features]`, inputs in their
    /// original order (the permutation undone).
    pub fn dequantize(&self) -> Vec<f32> {
        let (inputs, groups) = (self.in_features(), self.groups());
        let mut weights = vec![0.0; self.parts.codes.len()];
        for output in 0..self.out_features() {
            for position in 0..inputs {
                let group = output * groups + position / self.group_size();
                let code = f32::from(self.parts.codes[output * inputs + position]);
                let scale = self.parts.scales[group];
                let value = match &self.parts.offsets {
                    GroupOffsets::ZeroPoints(zero_points) => (code - f32::from(zero_points[group])) * scale,
                    GroupOffsets::Minimums(minimums) => code * scale + minimums[group],
                };
                let input =
                    self.parts.input_permutation.as_ref().map_or(position, |order| order[position] as usize);
                weights[output * inputs + input] = value;
            }
        }
        weights
    }

    /// Bits stored for each weight: codes, F16 scales, and packed zero points or F16 minimums.
    pub fn bits_per_weight(&self) -> f64 {
        match &self.parts.offsets {
            GroupOffsets::ZeroPoints(_) => stored_bits(self.bits(), self.groups(), self.in_features()),
            GroupOffsets::Minimums(_) => {
                f64::from(self.bits()) + self.groups() as f64 * 32.0 / self.in_features().max(1) as f64
            }
        }
    }

    /// The [`checksum`] of the dequantized weights' bits: equal for equal weights, whatever format they came
    /// from.
    pub fn checksum(&self) -> u64 {
        checksum(self.dequantize().into_iter().map(f32::to_bits))
    }
}

/// A 64-bit FNV-1a hash of `words`: it finds damage, not forgery.
pub fn checksum(words: impl IntoIterator<Item = u32>) -> u64 {
    words.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Bits stored for each weight of a matrix whose rows have `inputs` weights in `groups` groups: its code, and its part of
/// an F16 scale and a packed zero point.
pub fn stored_bits(bits: u32, groups: usize, inputs: usize) -> f64 {
    f64::from(bits) + groups as f64 * (16.0 + f64::from(bits)) / inputs.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DenseValues;

    fn parts() -> QuantizedParts {
        QuantizedParts {
            out_features: 2,
            in_features: 3,
            bits: 4,
            group_size: 2,
            codes: vec![0, 8, 15, 1, 2, 3],
            scales: vec![0.5, 2.0, 1.0, 0.25],
            offsets: GroupOffsets::ZeroPoints(vec![8, 8, 0, 16]),
            input_permutation: None,
        }
    }

    #[test]
    fn dequantize_applies_scale_and_zero_point_of_the_group() {
        let matrix = QuantizedMatrix::new(parts()).unwrap();
        assert_eq!(matrix.dequantize(), [-4.0, 0.0, 14.0, 1.0, 2.0, -3.25]);
        assert!(!matrix.is_symmetric());
        assert_eq!(matrix.zero_points(), Some(&[8, 8, 0, 16][..]));
    }

    #[test]
    fn dequantize_applies_scale_and_minimum_of_the_group() {
        let offsets = GroupOffsets::Minimums(vec![-4.0, 0.5, 0.0, -8.0]);
        let matrix = QuantizedMatrix::new(QuantizedParts { offsets, ..parts() }).unwrap();
        assert_eq!(matrix.dequantize(), [-4.0, 0.0, 30.5, 1.0, 2.0, -7.25]);
        assert!(!matrix.is_symmetric() && matrix.zero_points().is_none());
        // Two groups of a row have a scale and a minimum in F16 each: 64 bits for 3 weights.
        assert!((matrix.bits_per_weight() - (4.0 + 64.0 / 3.0)).abs() < 1e-12);
    }

    fn dense(out_features: usize, in_features: usize, values: &[f32]) -> DenseMatrix<'_> {
        DenseMatrix::new(out_features, in_features, DenseValues::F32(values.into())).unwrap()
    }

    #[test]
    fn rounding_is_off_by_half_a_step_at_most_and_exact_where_weights_are_steps() {
        let weights: Vec<f32> = (0..2 * 70).map(|at| ((at * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let matrix = dense(2, 70, &weights);
        for (bits, group_size) in [(8, 32), (8, 128), (4, 7)] {
            let rounded = QuantizedMatrix::round_to_nearest(&matrix, bits, group_size).unwrap();
            assert!(rounded.is_symmetric() && rounded.group_size() == group_size);
            for ((at, weight), found) in weights.iter().enumerate().zip(rounded.dequantize()) {
                let scale = rounded.scales()[at / 70 * rounded.groups() + at % 70 / group_size];
                assert!(
                    (found - weight).abs() <= scale * 0.5001,
                    "{bits} {group_size} {at}: {found} {weight}"
                );
            }
        }
        let steps: Vec<f32> = (-127..=127).map(|step| step as f32 / 64.0).collect();
        let matrix = dense(1, steps.len(), &steps);
        assert_eq!(QuantizedMatrix::round_to_nearest(&matrix, 8, 255).unwrap().dequantize(), steps);
        let zeros = dense(1, 4, &[0.0; 4]);
        assert_eq!(QuantizedMatrix::round_to_nearest(&zeros, 8, 2).unwrap().dequantize(), [0.0; 4]);
        let unsound = dense(1, 2, &[1.0, f32::NAN]);
        let refused = QuantizedMatrix::round_to_nearest(&unsound, 8, 2).unwrap_err().to_string();
        assert!(refused.contains("weights") && refused.contains("finite"), "{refused}");
    }

    #[test]
    fn dequantize_undoes_the_permutation() {
        let mut parts = parts();
        parts.input_permutation = Some(vec![2, 0, 1]);
        let matrix = QuantizedMatrix::new(parts).unwrap();
        assert_eq!(matrix.dequantize(), [0.0, 14.0, -4.0, 2.0, -3.25, 1.0]);
    }

    #[test]
    fn each_broken_invariant_is_refused_by_name() {
        type Break = fn(&mut QuantizedParts);
        let cases: [(&str, Break); 10] = [
            ("bits", |p| p.bits = 9),
            ("group_size", |p| p.group_size = 0),
            ("codes", |p| p.codes[0] = 16),
            ("codes", |p| p.codes.truncate(5)),
            ("scales", |p| p.scales[1] = f32::NAN),
            ("zero_points", |p| p.offsets = GroupOffsets::ZeroPoints(vec![17, 8, 8, 8])),
            ("zero_points", |p| p.offsets = GroupOffsets::ZeroPoints(vec![8; 3])),
            ("minimums", |p| p.offsets = GroupOffsets::Minimums(vec![0.0; 5])),
            ("minimums", |p| p.offsets = GroupOffsets::Minimums(vec![0.0, 0.0, f32::INFINITY, 0.0])),
            ("input_permutation", |p| p.input_permutation = Some(vec![0, 0, 1])),
        ];
        for (name, break_it) in cases {
            let mut parts = parts();
            break_it(&mut parts);
            let message = QuantizedMatrix::new(parts).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }
}
