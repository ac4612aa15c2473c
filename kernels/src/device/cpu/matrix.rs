//! Weight matrices as the CPU multiplies them: panels of 32 outputs, depth after depth.
//!
//! A panel holds the weights of 32 consecutive outputs; within it, the 32 weights of input 0 come first,
//! then those of input 1, and so on, so that one load gives the same input for many outputs. Four-bit codes
//! are packed by eight inputs into a word for each output (the order GPTQ files use). Missing outputs of the
//! last panel are zero.

use half::{bf16, f16};

use super::aligned::AlignedVec;
use super::simd::Simd;
use super::tile::{
    BrainColumns, ByteColumns, Columns, FloatColumns, HalfColumns, NibbleColumns, WordColumns,
};
use crate::tensor::{DenseMatrix, DenseValues, QuantizedMatrix};

/// Outputs of a panel.
pub(crate) const PANEL_COLUMNS: usize = 32;
/// Terms summed before the sum is scaled and added to the total: part of the reduction order.
pub(crate) const CHUNK_DEPTH: usize = 128;

/// What the panel product needs to know of a weight matrix.
pub(crate) trait Panels: Sync {
    /// Columns of one chunk, `V` vectors wide.
    type Chunk<S: Simd, const V: usize>: Columns<S>;

    fn out_features(&self) -> usize;
    fn in_features(&self) -> usize;
    /// The length of the chunk that starts at depth `start`: never crosses a group.
    fn chunk_depth(&self, start: usize) -> usize;
    /// The input feature at each stored depth, when they are not in order.
    fn permutation(&self) -> Option<&[u32]>;
    /// The chunk of `panel` from depth `start` and column `column` on.
    ///
    /// # Safety
    /// `start` begins a chunk, `column + V * S::WIDTH` is at most [`PANEL_COLUMNS`].
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        panel: usize,
        start: usize,
        column: usize,
    ) -> Self::Chunk<S, V>;
    /// The factors of the columns in that chunk.
    ///
    /// # Safety
    /// As for [`Panels::chunk`].
    unsafe fn scale<S: Simd>(&self, panel: usize, start: usize, column: usize) -> S::F32;
}

/// Stores row-major `[out, in]` values in panel order, converted by `convert`.
fn pack<T: bytemuck::Pod>(out: usize, inputs: usize, value: impl Fn(usize) -> T) -> AlignedVec<T> {
    let mut packed = AlignedVec::zeroed(out.div_ceil(PANEL_COLUMNS) * PANEL_COLUMNS * inputs);
    for (panel, block) in packed.chunks_exact_mut(PANEL_COLUMNS * inputs.max(1)).enumerate() {
        let first = panel * PANEL_COLUMNS;
        for column in 0..PANEL_COLUMNS.min(out - first) {
            for input in 0..inputs {
                block[input * PANEL_COLUMNS + column] = value((first + column) * inputs + input);
            }
        }
    }
    packed
}

/// A dense matrix in panels, in the element type it was stored in.
#[derive(Clone)]
pub(crate) struct DensePanels<T> {
    out_features: usize,
    in_features: usize,
    values: AlignedVec<T>,
}

impl<T: bytemuck::Pod> DensePanels<T> {
    fn new(matrix: &DenseMatrix<'_>, values: &[T]) -> Self {
        let (out_features, in_features) = (matrix.out_features(), matrix.in_features());
        Self { out_features, in_features, values: pack(out_features, in_features, |index| values[index]) }
    }

    fn weight(&self, output: usize, input: usize) -> T {
        let panel = output / PANEL_COLUMNS * PANEL_COLUMNS * self.in_features;
        self.values[panel + input * PANEL_COLUMNS + output % PANEL_COLUMNS]
    }
}

macro_rules! dense_panels {
    ($element:ty, $columns:ident) => {
        impl Panels for DensePanels<$element> {
            type Chunk<S: Simd, const V: usize> = $columns;

            fn out_features(&self) -> usize {
                self.out_features
            }
            fn in_features(&self) -> usize {
                self.in_features
            }
            fn chunk_depth(&self, start: usize) -> usize {
                CHUNK_DEPTH.min(self.in_features - start)
            }
            fn permutation(&self) -> Option<&[u32]> {
                None
            }
            #[inline(always)]
            unsafe fn chunk<S: Simd, const V: usize>(
                &self,
                panel: usize,
                start: usize,
                column: usize,
            ) -> Self::Chunk<S, V> {
                let offset = (panel * self.in_features + start) * PANEL_COLUMNS + column;
                $columns { from: self.values[offset..].as_ptr(), stride: PANEL_COLUMNS }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(&self, _: usize, _: usize, _: usize) -> S::F32 {
                // SAFETY: the caller vouches for the instruction set.
                unsafe { S::splat(1.0) }
            }
        }
    };
}
dense_panels!(f32, FloatColumns);
dense_panels!(f16, HalfColumns);
dense_panels!(bf16, BrainColumns);

/// A dense weight matrix of the CPU device.
#[derive(Clone)]
pub struct CpuDenseMatrix {
    pub(crate) panels: DensePanelsOf,
}

/// The element types a [`CpuDenseMatrix`] may have.
#[derive(Clone)]
pub(crate) enum DensePanelsOf {
    F32(DensePanels<f32>),
    F16(DensePanels<f16>),
    BF16(DensePanels<bf16>),
}

impl CpuDenseMatrix {
    pub(crate) fn new(matrix: &DenseMatrix<'_>) -> Self {
        let panels = match matrix.values() {
            DenseValues::F32(values) => DensePanelsOf::F32(DensePanels::new(matrix, values)),
            DenseValues::F16(values) => DensePanelsOf::F16(DensePanels::new(matrix, values)),
            DenseValues::BF16(values) => DensePanelsOf::BF16(DensePanels::new(matrix, values)),
        };
        Self { panels }
    }

    pub(crate) fn out_features(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.out_features,
            DensePanelsOf::F16(panels) => panels.out_features,
            DensePanelsOf::BF16(panels) => panels.out_features,
        }
    }

    pub(crate) fn in_features(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.in_features,
            DensePanelsOf::F16(panels) => panels.in_features,
            DensePanelsOf::BF16(panels) => panels.in_features,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.values.bytes(),
            DensePanelsOf::F16(panels) => panels.values.bytes(),
            DensePanelsOf::BF16(panels) => panels.values.bytes(),
        }
    }

    /// The weight of `input` for `output`, widened.
    pub(crate) fn weight(&self, output: usize, input: usize) -> f32 {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.weight(output, input),
            DensePanelsOf::F16(panels) => panels.weight(output, input).to_f32(),
            DensePanelsOf::BF16(panels) => panels.weight(output, input).to_f32(),
        }
    }
}

/// Scales and zero points of a quantized matrix: `[panel, group, 32]`.
#[derive(Clone)]
pub(crate) struct Groups {
    out_features: usize,
    in_features: usize,
    group_size: usize,
    groups: usize,
    scales: AlignedVec<f32>,
    zero_points: AlignedVec<u8>,
    permutation: Option<Vec<u32>>,
}

impl Groups {
    fn offset(&self, panel: usize, start: usize, column: usize) -> usize {
        (panel * self.groups + start / self.group_size) * PANEL_COLUMNS + column
    }
}

/// Codes of up to four bits, eight to a word.
#[derive(Clone)]
pub(crate) struct NibblePanels {
    groups: Groups,
    words: AlignedVec<u32>,
}

/// Codes of up to eight bits, one a byte: for groups that no step of eight inputs fits.
#[derive(Clone)]
pub(crate) struct BytePanels {
    groups: Groups,
    codes: AlignedVec<u8>,
}

/// Codes of up to eight bits, four to a word: of each eight inputs 0, 2, 4 and 6, then 1, 3, 5 and 7.
#[derive(Clone)]
pub(crate) struct WordPanels {
    groups: Groups,
    words: AlignedVec<u32>,
}

/// Panels whose codes can be multiplied as integers.
pub(crate) trait IntegerPanels: Panels {
    /// The codes of inputs 0, 2, 4 and 6 of step `step` from depth `start` on, and those of 1, 3, 5 and 7, a byte each.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector; the chunk has that step.
    unsafe fn codes<S: Simd>(&self, panel: usize, start: usize, step: usize, column: usize) -> [S::U32; 2];
    /// `sum` and the products of such codes and of activations.
    ///
    /// # Safety
    /// The instruction set of `S` is available.
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32;
    /// Scale and minimum of the columns in the chunk from `start` on: `weight = code * scale + minimum`.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector.
    unsafe fn scale_and_minimum<S: Simd>(&self, panel: usize, start: usize, column: usize) -> [S::F32; 2];
}

macro_rules! integer_panels {
    ($panels:ty, $words_of_a_step:literal, $dot:ident, |$S:ident, $from:ident| $codes:expr) => {
        impl IntegerPanels for $panels {
            #[inline(always)]
            unsafe fn codes<$S: Simd>(
                &self,
                panel: usize,
                start: usize,
                step: usize,
                column: usize,
            ) -> [$S::U32; 2] {
                let steps = self.groups.in_features.div_ceil(8);
                let row = (panel * steps + start / 8 + step) * $words_of_a_step;
                debug_assert!(row * PANEL_COLUMNS < self.words.len());
                // SAFETY: the caller's promise; the panel holds the words of that step.
                unsafe {
                    let $from = self.words.as_ptr().add(row * PANEL_COLUMNS + column);
                    $codes
                }
            }
            #[inline(always)]
            unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32 {
                // SAFETY: the caller's promise.
                unsafe { S::$dot(sum, codes, activations) }
            }
            #[inline(always)]
            unsafe fn scale_and_minimum<S: Simd>(&self, panel: usize, start: usize, column: usize) -> [S::F32; 2] {
                let at = self.groups.offset(panel, start, column);
                // SAFETY: the caller keeps column + WIDTH within the panel.
                unsafe {
                    let scale = S::load(self.groups.scales[at..].as_ptr());
                    let zero_points = S::load_u8(self.groups.zero_points[at..].as_ptr());
                    [scale, S::mul(S::sub(S::splat(0.0), zero_points), scale)]
                }
            }
        }
    };
}
integer_panels!(NibblePanels, 1, dot, |S, from| S::nibbles(S::load_u32(from)));
integer_panels!(WordPanels, 2, dot_bytes, |S, from| {
    [S::load_u32(from), S::load_u32(from.add(PANEL_COLUMNS))]
});

macro_rules! quantized_panels {
    ($panels:ty, $columns:ident, $codes:ident, |$inputs:ident, $start:ident| $rows:expr, $row:expr) => {
        impl Panels for $panels {
            type Chunk<S: Simd, const V: usize> = $columns<S, V>;

            fn out_features(&self) -> usize {
                self.groups.out_features
            }
            fn in_features(&self) -> usize {
                self.groups.in_features
            }
            fn chunk_depth(&self, start: usize) -> usize {
                let in_group = self.groups.group_size - start % self.groups.group_size;
                CHUNK_DEPTH.min(in_group).min(self.groups.in_features - start)
            }
            fn permutation(&self) -> Option<&[u32]> {
                self.groups.permutation.as_deref()
            }
            #[inline(always)]
            unsafe fn chunk<S: Simd, const V: usize>(
                &self,
                panel: usize,
                start: usize,
                column: usize,
            ) -> Self::Chunk<S, V> {
                let ($inputs, $start) = (self.groups.in_features, start);
                let offset = (panel * $rows + $row) * PANEL_COLUMNS + column;
                let zero_points = &self.groups.zero_points[self.groups.offset(panel, start, column)..];
                // SAFETY: the caller keeps column + V * WIDTH within the panel, so as many zero points follow.
                let zero_points = unsafe {
                    let mut vectors = [S::splat(0.0); V];
                    for (index, vector) in vectors.iter_mut().enumerate() {
                        *vector = S::load_u8(zero_points.as_ptr().add(index * S::WIDTH));
                    }
                    vectors
                };
                $columns { from: self.$codes[offset..].as_ptr(), stride: PANEL_COLUMNS, zero_points }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(&self, panel: usize, start: usize, column: usize) -> S::F32 {
                // SAFETY: the caller keeps column + WIDTH within the panel.
                unsafe { S::load(self.groups.scales[self.groups.offset(panel, start, column)..].as_ptr()) }
            }
        }
    };
}
quantized_panels!(NibblePanels, NibbleColumns, words, |inputs, start| inputs.div_ceil(8), start / 8);
quantized_panels!(WordPanels, WordColumns, words, |inputs, start| inputs.div_ceil(8) * 2, start / 4);
quantized_panels!(BytePanels, ByteColumns, codes, |inputs, start| inputs, start);

/// A quantized weight matrix of the CPU device.
#[derive(Clone)]
pub struct CpuPackedMatrix {
    pub(crate) panels: QuantizedPanels,
}

/// How the codes of a [`CpuPackedMatrix`] are held.
#[derive(Clone)]
pub(crate) enum QuantizedPanels {
    Nibbles(NibblePanels),
    Words(WordPanels),
    Bytes(BytePanels),
}

impl CpuPackedMatrix {
    pub(crate) fn new(matrix: &QuantizedMatrix) -> Self {
        let (out, inputs, codes) = (matrix.out_features(), matrix.in_features(), matrix.codes());
        let groups = Groups {
            out_features: out,
            in_features: inputs,
            group_size: matrix.group_size(),
            groups: matrix.groups(),
            scales: pack(out, matrix.groups(), |index| matrix.scales()[index]),
            zero_points: pack(out, matrix.groups(), |index| matrix.zero_points()[index]),
            permutation: matrix.input_permutation().map(<[u32]>::to_vec),
        };
        // A word must not straddle two groups.
        let words_fit = matrix.group_size().is_multiple_of(8) || matrix.groups() == 1;
        let panels = if matrix.bits() <= 4 && words_fit {
            let words = inputs.div_ceil(8);
            let word = |index: usize| {
                let (output, first) = (index / words, index % words * 8);
                let codes = &codes[output * inputs + first..output * inputs + inputs.min(first + 8)];
                codes.iter().rev().fold(0, |word, &code| word << 4 | u32::from(code))
            };
            QuantizedPanels::Nibbles(NibblePanels { words: pack(out, words, word), groups })
        } else if words_fit {
            let words = inputs.div_ceil(8) * 2;
            let word = |index: usize| {
                let (output, step, odd) = (index / words, index % words / 2, index % 2);
                let codes = &codes[output * inputs..(output + 1) * inputs];
                let code = |at: usize| codes.get(8 * step + 2 * at + odd).map_or(0, |&code| u32::from(code));
                (0..4).map(|at| code(at) << (8 * at)).sum()
            };
            QuantizedPanels::Words(WordPanels { words: pack(out, words, word), groups })
        } else {
            QuantizedPanels::Bytes(BytePanels { codes: pack(out, inputs, |index| codes[index]), groups })
        };
        Self { panels }
    }

    fn groups(&self) -> &Groups {
        match &self.panels {
            QuantizedPanels::Nibbles(panels) => &panels.groups,
            QuantizedPanels::Words(panels) => &panels.groups,
            QuantizedPanels::Bytes(panels) => &panels.groups,
        }
    }

    pub(crate) fn out_features(&self) -> usize {
        self.groups().out_features
    }

    pub(crate) fn in_features(&self) -> usize {
        self.groups().in_features
    }

    pub(crate) fn bytes(&self) -> usize {
        let codes = match &self.panels {
            QuantizedPanels::Nibbles(panels) => panels.words.bytes(),
            QuantizedPanels::Words(panels) => panels.words.bytes(),
            QuantizedPanels::Bytes(panels) => panels.codes.bytes(),
        };
        codes + self.groups().scales.bytes() + self.groups().zero_points.bytes()
    }
}
