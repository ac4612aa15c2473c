//! Quantized matrices as the CPU multiplies them: panels of packed codes, and what each group adds to them.
//!
//! Scales lie in `[panel, group, 32]`, in F16 where that holds all of them exactly, else in F32; minimums likewise. Zero
//! points are bytes, or one number where all are alike. Codes: [`super::quantized_codes`].

use half::f16;

use super::aligned::{AlignedVec, prefetch, prefetch_bytes};
use super::integer_rows::IntegerRows;
use super::matrix::{Chunk, PANEL_COLUMNS, Panels, pack};
use super::quantized_codes::{Bytes, Codes, FiveBits, IntegerCodes, Nibbles, Place, STEP, Words};
use super::simd::{InstructionSet, Simd};
use super::thread_pool::ThreadPool;
use crate::tensor::{GroupOffsets, QuantizedMatrix};

/// A number for each group and column: `[panel, group, 32]`.
#[derive(Clone)]
enum GroupValues {
    F16(AlignedVec<f16>),
    F32(AlignedVec<f32>),
}

impl GroupValues {
    /// `values` are row-major `[out, groups]`.
    fn new(out: usize, groups: usize, values: &[f32], pool: &ThreadPool) -> Self {
        let at = |output: usize, group: usize| values[output * groups + group];
        if values.iter().all(|&value| f16::from_f32(value).to_f32() == value) {
            Self::F16(pack(out, groups, pool, |output, group| f16::from_f32(at(output, group))))
        } else {
            Self::F32(pack(out, groups, pool, at))
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F16(values) => values.bytes(),
            Self::F32(values) => values.bytes(),
        }
    }

    /// Asks for the values of a panel's columns from `offset` on, wherever that is.
    #[inline(always)]
    fn prefetch(&self, offset: usize) {
        match self {
            Self::F16(values) => prefetch_bytes(values.as_ptr().wrapping_add(offset), PANEL_COLUMNS * 2),
            Self::F32(values) => prefetch_bytes(values.as_ptr().wrapping_add(offset), PANEL_COLUMNS * 4),
        }
    }

    /// # Safety
    /// The instruction set of `S` is available, and a vector of a panel's columns begins at `offset`.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, offset: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F16(values) => S::load_f16(values[offset..].as_ptr()),
                Self::F32(values) => S::load(values[offset..].as_ptr()),
            }
        }
    }
}

/// Where the codes of a group lie.
#[derive(Clone)]
enum Offsets {
    /// The same zero point in every group.
    ZeroPoint(f32),
    /// `[panel, group, 32]`.
    ZeroPoints(AlignedVec<u8>),
    Minimums(GroupValues),
}

/// What a group adds to its codes.
#[derive(Clone)]
struct Groups {
    out_features: usize,
    in_features: usize,
    group_size: usize,
    groups: usize,
    scales: GroupValues,
    offsets: Offsets,
    permutation: Option<Vec<u32>>,
}

impl Groups {
    fn new(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        let (out, groups) = (matrix.out_features(), matrix.groups());
        let offsets = match matrix.offsets() {
            GroupOffsets::Minimums(minimums) => {
                Offsets::Minimums(GroupValues::new(out, groups, minimums, pool))
            }
            GroupOffsets::ZeroPoints(zero_points) => match zero_points.first() {
                Some(first) if zero_points.iter().all(|zero| zero == first) => {
                    Offsets::ZeroPoint(f32::from(*first))
                }
                _ => {
                    let zero_point = |output: usize, group: usize| zero_points[output * groups + group];
                    Offsets::ZeroPoints(pack(out, groups, pool, zero_point))
                }
            },
        };
        Self {
            out_features: out,
            in_features: matrix.in_features(),
            group_size: matrix.group_size(),
            groups,
            scales: GroupValues::new(out, groups, matrix.scales(), pool),
            offsets,
            permutation: matrix.input_permutation().map(<[u32]>::to_vec),
        }
    }

    fn bytes(&self) -> usize {
        let offsets = match &self.offsets {
            Offsets::ZeroPoint(_) => 0,
            Offsets::ZeroPoints(zero_points) => zero_points.bytes(),
            Offsets::Minimums(minimums) => minimums.bytes(),
        };
        self.scales.bytes() + offsets
    }

    fn at(&self, panel: usize, chunk: Chunk, column: usize) -> usize {
        (panel * self.groups + chunk.group) * PANEL_COLUMNS + column
    }

    /// `[a, b, c]` of `weight = (code * a + b) * c`, for the columns of a chunk: exact up to one rounding.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector.
    #[inline(always)]
    unsafe fn affine<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> [S::F32; 3] {
        let at = self.at(panel, chunk, column);
        // SAFETY: the caller keeps column + WIDTH within the panel.
        unsafe {
            let (one, scale) = (S::splat(1.0), self.scales.load::<S>(at));
            match &self.offsets {
                Offsets::ZeroPoint(zero) => [one, S::splat(-zero), scale],
                Offsets::ZeroPoints(zero_points) => {
                    let zero = S::load_u8(zero_points[at..].as_ptr());
                    [one, S::sub(S::splat(0.0), zero), scale]
                }
                Offsets::Minimums(minimums) => [scale, minimums.load::<S>(at), one],
            }
        }
    }

    /// Scale and minimum of the columns of a chunk: `weight = code * scale + minimum`.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector.
    #[inline(always)]
    unsafe fn scale_and_minimum<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> [S::F32; 2] {
        let at = self.at(panel, chunk, column);
        // SAFETY: the caller keeps column + WIDTH within the panel.
        unsafe {
            let scale = self.scales.load::<S>(at);
            let minimum = match &self.offsets {
                Offsets::ZeroPoint(zero) => S::mul(S::splat(-zero), scale),
                Offsets::ZeroPoints(zero_points) => {
                    let zero = S::load_u8(zero_points[at..].as_ptr());
                    S::mul(S::sub(S::splat(0.0), zero), scale)
                }
                Offsets::Minimums(minimums) => minimums.load::<S>(at),
            };
            [scale, minimum]
        }
    }
}

impl Groups {
    /// Asks for what the group of a chunk adds to its codes.
    #[inline(always)]
    fn prefetch(&self, panel: usize, chunk: Chunk) {
        let at = self.at(panel, chunk, 0);
        self.scales.prefetch(at);
        match &self.offsets {
            Offsets::ZeroPoint(_) => {}
            Offsets::ZeroPoints(zero_points) => prefetch(zero_points.as_ptr().wrapping_add(at)),
            Offsets::Minimums(minimums) => minimums.prefetch(at),
        }
    }
}

/// A quantized matrix whose codes are packed as `C`.
#[derive(Clone)]
pub(crate) struct PackedPanels<C> {
    groups: Groups,
    codes: C,
}

impl<C: Codes> PackedPanels<C> {
    fn new(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        Self { groups: Groups::new(matrix, pool), codes: C::pack(matrix, pool) }
    }

    fn place(&self, panel: usize, chunk: Chunk, column: usize) -> Place {
        Place { inputs: self.groups.in_features, panel, start: chunk.start, column }
    }

    fn bytes(&self) -> usize {
        self.groups.bytes() + self.codes.bytes()
    }
}

impl<C: Codes> Panels for PackedPanels<C> {
    type Chunk<S: Simd, const V: usize> = C::Chunk<S, V>;

    fn out_features(&self) -> usize {
        self.groups.out_features
    }
    fn in_features(&self) -> usize {
        self.groups.in_features
    }
    fn group_size(&self) -> usize {
        self.groups.group_size
    }
    fn permutation(&self) -> Option<&[u32]> {
        self.groups.permutation.as_deref()
    }
    #[inline(always)]
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        panel: usize,
        chunk: Chunk,
        column: usize,
    ) -> Self::Chunk<S, V> {
        // SAFETY: the caller keeps column + V * WIDTH within the panel.
        unsafe {
            let (mut factors, mut offsets) = ([S::splat(0.0); V], [S::splat(0.0); V]);
            for (vector, (factor, offset)) in factors.iter_mut().zip(&mut offsets).enumerate() {
                let column = column + vector * S::WIDTH;
                [*factor, *offset, _] = self.groups.affine::<S>(panel, chunk, column);
            }
            self.codes.chunk::<S, V>(self.place(panel, chunk, column), factors, offsets)
        }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { self.groups.affine::<S>(panel, chunk, column)[2] }
    }
}

/// Panels whose codes can be multiplied as integers.
pub(crate) trait IntegerPanels: Panels {
    /// Whether no code is above 15.
    const FOUR_BITS: bool;

    /// The codes of inputs 0, 2, 4 and 6 of step `step` of `chunk`, and those of 1, 3, 5 and 7, a byte each.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector; the chunk has that step.
    unsafe fn codes<S: Simd>(&self, panel: usize, chunk: Chunk, step: usize, column: usize) -> [S::U32; 2];
    /// Asks for what [`IntegerPanels::codes`] and [`IntegerPanels::scale_and_minimum`] will read of a chunk, which may lie
    /// behind the last: then for what lies there, the next panel.
    fn prefetch(&self, panel: usize, chunk: Chunk);
    /// `sum` and the products of such codes and of activations.
    ///
    /// # Safety
    /// The instruction set of `S` is available.
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32;
    /// Scale and minimum of the columns in `chunk`: `weight = code * scale + minimum`.
    ///
    /// # Safety
    /// As for [`Panels::chunk`] with one vector.
    unsafe fn scale_and_minimum<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> [S::F32; 2];
}

impl<C: IntegerCodes> IntegerPanels for PackedPanels<C> {
    const FOUR_BITS: bool = C::FOUR_BITS;

    #[inline(always)]
    fn prefetch(&self, panel: usize, chunk: Chunk) {
        self.codes.prefetch(self.place(panel, chunk, 0), chunk.depth.div_ceil(STEP));
        self.groups.prefetch(panel, chunk);
    }
    #[inline(always)]
    unsafe fn codes<S: Simd>(&self, panel: usize, chunk: Chunk, step: usize, column: usize) -> [S::U32; 2] {
        // SAFETY: the caller's promise.
        unsafe { self.codes.step::<S>(self.place(panel, chunk, column), step) }
    }
    #[inline(always)]
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe { C::dot::<S>(sum, codes, activations) }
    }
    #[inline(always)]
    unsafe fn scale_and_minimum<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        unsafe { self.groups.scale_and_minimum::<S>(panel, chunk, column) }
    }
}

/// A quantized weight matrix of the CPU device.
#[derive(Clone)]
pub struct CpuPackedMatrix {
    pub(crate) panels: QuantizedPanels,
}

/// How the codes of a [`CpuPackedMatrix`] are held.
#[derive(Clone)]
pub(crate) enum QuantizedPanels {
    Nibbles(PackedPanels<Nibbles>),
    FiveBits(PackedPanels<FiveBits>),
    SevenBits(PackedPanels<Words<7>>),
    EightBits(PackedPanels<Words<8>>),
    Bytes(PackedPanels<Bytes>),
}

/// Does the same with each kind of panels.
macro_rules! with_panels {
    ($matrix:expr, |$panels:ident| $value:expr) => {
        match &$matrix.panels {
            QuantizedPanels::Nibbles($panels) => $value,
            QuantizedPanels::FiveBits($panels) => $value,
            QuantizedPanels::SevenBits($panels) => $value,
            QuantizedPanels::EightBits($panels) => $value,
            QuantizedPanels::Bytes($panels) => $value,
        }
    };
}

impl CpuPackedMatrix {
    pub(crate) fn new(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        // A word must not straddle two groups.
        let words_fit = matrix.group_size().is_multiple_of(STEP) || matrix.groups() == 1;
        let panels = match matrix.bits() {
            _ if !words_fit => QuantizedPanels::Bytes(PackedPanels::new(matrix, pool)),
            ..=4 => QuantizedPanels::Nibbles(PackedPanels::new(matrix, pool)),
            5 => QuantizedPanels::FiveBits(PackedPanels::new(matrix, pool)),
            6 | 7 => QuantizedPanels::SevenBits(PackedPanels::new(matrix, pool)),
            _ => QuantizedPanels::EightBits(PackedPanels::new(matrix, pool)),
        };
        Self { panels }
    }

    /// Rounds activations in the chunks of this matrix, if its codes are multiplied as integers.
    pub(crate) fn round(
        &self,
        rounded: &mut IntegerRows,
        input: &[f32],
        rows: usize,
        set: InstructionSet,
        pool: &ThreadPool,
    ) {
        if !matches!(self.panels, QuantizedPanels::Bytes(_)) {
            with_panels!(self, |panels| rounded.fill(input, rows, panels, set, pool));
        }
    }

    /// Whether rounded activations of this matrix are those of `other`, of as many inputs.
    pub(crate) fn rounds_like(&self, other: &Self) -> bool {
        let of_bytes = |matrix: &Self| matches!(matrix.panels, QuantizedPanels::Bytes(_));
        let layout = |matrix: &Self| {
            with_panels!(matrix, |panels| (panels.groups.group_size, panels.permutation().is_some()))
        };
        of_bytes(self) == of_bytes(other) && layout(self) == layout(other) && !layout(self).1
    }

    pub(crate) fn out_features(&self) -> usize {
        with_panels!(self, |panels| panels.out_features())
    }

    pub(crate) fn in_features(&self) -> usize {
        with_panels!(self, |panels| panels.in_features())
    }

    pub(crate) fn bytes(&self) -> usize {
        with_panels!(self, |panels| panels.bytes())
    }
}
