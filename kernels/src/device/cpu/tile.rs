//! The register tile every CPU product is made of: a few rows of activations times two vectors of columns.
//!
//! ```text
//! acc[m][n] = sum over k = 0, 1, 2, ... of rows[m, k] * columns[k, n]
//! ```
//!
//! Each element has one accumulator and takes its terms in order of `k`, whatever the number of rows: so a
//! row's result has the same bits alone and in a batch (invariant 1), with no horizontal sum at all.

use half::{bf16, f16};

use super::quantized_codes::STEPS_OF_FIFTH_BITS;
use super::simd::Simd;

/// A source of weight columns, widened to `f32`.
pub(crate) trait Columns<S: Simd>: Copy {
    /// Vector `vector` of the columns at depth `depth + step`; `depth` is a multiple of 8, `step` below 8.
    ///
    /// # Safety
    /// The instruction set of `S` is available and the source holds that depth and vector.
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32;
}

/// `f32` columns in memory, `stride` elements from one depth to the next.
#[derive(Clone, Copy)]
pub(crate) struct FloatColumns {
    pub(crate) from: *const f32,
    pub(crate) stride: usize,
}

impl<S: Simd> Columns<S> for FloatColumns {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { S::load(self.from.add((depth + step) * self.stride + vector * S::WIDTH)) }
    }
}

/// Binary16 columns.
#[derive(Clone, Copy)]
pub(crate) struct HalfColumns {
    pub(crate) from: *const f16,
    pub(crate) stride: usize,
}

impl<S: Simd> Columns<S> for HalfColumns {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(self.from.add((depth + step) * self.stride + vector * S::WIDTH)) }
    }
}

/// bfloat16 columns.
#[derive(Clone, Copy)]
pub(crate) struct BrainColumns {
    pub(crate) from: *const bf16,
    pub(crate) stride: usize,
}

impl<S: Simd> Columns<S> for BrainColumns {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(self.from.add((depth + step) * self.stride + vector * S::WIDTH)) }
    }
}

/// Four-bit codes times `factors` plus `offsets`: word `depth / 8` of a column holds eight depths.
#[derive(Clone, Copy)]
pub(crate) struct NibbleColumns<S: Simd, const V: usize> {
    pub(crate) from: *const u32,
    pub(crate) stride: usize,
    pub(crate) factors: [S::F32; V],
    pub(crate) offsets: [S::F32; V],
}

impl<S: Simd, const V: usize> Columns<S> for NibbleColumns<S, V> {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe {
            let words = S::load_u32(self.from.add(depth / 8 * self.stride + vector * S::WIDTH));
            let codes = S::nibble(words, 4 * step as u32);
            S::multiply_add(codes, self.factors[vector], self.offsets[vector])
        }
    }
}

/// Five-bit codes: those of [`NibbleColumns`], and words of the fifth bits of 32 depths from the panel's first on, in the
/// order of [`super::quantized_codes::FiveBits`].
#[derive(Clone, Copy)]
pub(crate) struct FiveBitColumns<S: Simd, const V: usize> {
    pub(crate) nibbles: NibbleColumns<S, V>,
    pub(crate) high: *const u32,
    /// Words of eight depths before the source's first depth.
    pub(crate) first_step: usize,
}

impl<S: Simd, const V: usize> Columns<S> for FiveBitColumns<S, V> {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        let NibbleColumns { from, stride, factors, offsets } = self.nibbles;
        let index = self.first_step + depth / 8;
        let bit = 8 * (step / 2) + 4 * (step % 2) + index % STEPS_OF_FIFTH_BITS;
        // SAFETY: the caller's promise.
        unsafe {
            let words = S::load_u32(from.add(depth / 8 * stride + vector * S::WIDTH));
            let row = index / STEPS_OF_FIFTH_BITS;
            let high = S::load_u32(self.high.add(row * stride + vector * S::WIDTH));
            let low = S::nibble(words, 4 * step as u32);
            let codes = S::multiply_add(S::bits(high, bit as u32, 1), S::splat(16.0), low);
            S::multiply_add(codes, factors[vector], offsets[vector])
        }
    }
}

/// Codes of one byte times `factors` plus `offsets`: words `depth / 4` and `depth / 4 + 1` of a column hold eight depths, the
/// even ones and the odd ones.
#[derive(Clone, Copy)]
pub(crate) struct WordColumns<S: Simd, const V: usize> {
    pub(crate) from: *const u32,
    pub(crate) stride: usize,
    pub(crate) factors: [S::F32; V],
    pub(crate) offsets: [S::F32; V],
}

impl<S: Simd, const V: usize> Columns<S> for WordColumns<S, V> {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe {
            let row = depth / 4 + step % 2;
            let words = S::load_u32(self.from.add(row * self.stride + vector * S::WIDTH));
            let codes = S::bits(words, 8 * (step as u32 / 2), 255);
            S::multiply_add(codes, self.factors[vector], self.offsets[vector])
        }
    }
}

/// Codes of one byte times `factors` plus `offsets`.
#[derive(Clone, Copy)]
pub(crate) struct ByteColumns<S: Simd, const V: usize> {
    pub(crate) from: *const u8,
    pub(crate) stride: usize,
    pub(crate) factors: [S::F32; V],
    pub(crate) offsets: [S::F32; V],
}

impl<S: Simd, const V: usize> Columns<S> for ByteColumns<S, V> {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe {
            let codes = S::load_u8(self.from.add((depth + step) * self.stride + vector * S::WIDTH));
            S::multiply_add(codes, self.factors[vector], self.offsets[vector])
        }
    }
}

/// Rows of activations: `from[m * stride + k]`.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) from: *const f32,
    pub(crate) stride: usize,
}

/// `M` rows times `V` vectors of columns over `depth` terms, started at zero.
///
/// # Safety
/// `rows` and `columns` hold `depth` terms, and the instruction set of `S` is available.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, C: Columns<S>, const M: usize, const V: usize>(
    rows: Rows,
    columns: C,
    depth: usize,
) -> [[S::F32; V]; M] {
    // SAFETY: the caller's promise bounds every access.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; M];
        let mut start = 0;
        while start + 8 <= depth {
            for step in 0..8 {
                accumulate::<S, C, M, V>(&mut acc, rows, columns, start, step);
            }
            start += 8;
        }
        for step in 0..depth - start {
            accumulate::<S, C, M, V>(&mut acc, rows, columns, start, step);
        }
        acc
    }
}

#[inline(always)]
unsafe fn accumulate<S: Simd, C: Columns<S>, const M: usize, const V: usize>(
    acc: &mut [[S::F32; V]; M],
    rows: Rows,
    columns: C,
    start: usize,
    step: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut weights = [S::splat(0.0); V];
        for (vector, weight) in weights.iter_mut().enumerate() {
            *weight = columns.load(start, step, vector);
        }
        for (row, acc) in acc.iter_mut().enumerate() {
            let activation = S::splat(*rows.from.add(row * rows.stride + start + step));
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc = S::multiply_add(activation, weight, *acc);
            }
        }
    }
}

/// Calls `$call` for tiles that cover rows `0..$rows`, largest first: `$row` is a tile's first row, the
/// constant `$M` its height.
///
/// Expands to unsafe code: `$call` must be sound for any `M` rows from `row` on that lie below `$rows`.
macro_rules! for_row_tiles {
    ($S:ident, $rows:expr, |$row:ident, $M:ident| $call:expr) => {{
        let rows: usize = $rows;
        let mut $row = 0;
        while $row < rows {
            macro_rules! with_height {
                ($height:literal) => {{
                    const $M: usize = $height;
                    // SAFETY: the user of `for_row_tiles!` vouches for tiles below `$rows`, and the height is
                    // at most the rows that remain.
                    unsafe { $call };
                    $row += $height;
                }};
            }
            match (rows - $row).min(<$S as $crate::device::cpu::simd::Simd>::TILE_ROWS) {
                12.. => with_height!(12),
                8.. => with_height!(8),
                6.. => with_height!(6),
                4.. => with_height!(4),
                3 => with_height!(3),
                2 => with_height!(2),
                _ => with_height!(1),
            }
        }
    }};
}
pub(crate) use for_row_tiles;
