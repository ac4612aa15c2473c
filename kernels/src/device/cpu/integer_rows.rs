//! Rows of activations in eight bits, for integer dot products.
//!
//! ```text
//! scale = largest |a| of a chunk / 127,   q = round(a / scale)
//! ```
//!
//! A chunk is what the weight scales together, of at most 128 inputs: as fine as the weight's own groups. Each row is
//! rounded alone, so it has the same bits in any batch.

use std::ops::Range;

use super::DisjointSlices;
use super::aligned::AlignedVec;
use super::matrix::{CHUNK_DEPTH, Panels, chunks};
use super::simd::{InstructionSet, Simd, dispatch};
use super::thread_pool::ThreadPool;

/// Rows that a task rounds.
const ROWS_PER_TASK: usize = 8;
/// What a tile of [`super::integer_tiles`] reads at once.
const TILE_ROWS: usize = 16;
const TILE_WORDS: usize = 16;
/// Words of a cache line.
const LINE_WORDS: usize = 16;
/// Inputs in the two words of a step.
pub(crate) const STEP_DEPTH: usize = 8;

/// Rounded rows; their memory serves one product after the other.
pub(crate) struct IntegerRows {
    /// `[row, step, 2]`: inputs 0, 2, 4 and 6 of a step, then 1, 3, 5 and 7, a byte each. Rows are `stride` words apart.
    words: AlignedVec<i32>,
    /// `[row / 16, chunk, 2, row % 16]`: the scale, and the sum of all q times it.
    factors: AlignedVec<f32>,
    stride: usize,
    chunks: usize,
}

impl IntegerRows {
    pub(crate) fn new() -> Self {
        Self { words: AlignedVec::zeroed(0), factors: AlignedVec::zeroed(0), stride: 0, chunks: 0 }
    }

    /// Rounds `rows` rows of `input` in the chunks of `weight`.
    pub(crate) fn fill<P: Panels>(
        &mut self,
        input: &[f32],
        rows: usize,
        weight: &P,
        set: InstructionSet,
        pool: &ThreadPool,
    ) {
        let inputs = weight.in_features();
        // An odd number of cache lines: the rows of a tile shall not all lie in the same set of the cache.
        let lines = (2 * inputs.div_ceil(STEP_DEPTH)).div_ceil(LINE_WORDS);
        self.stride = (lines | 1) * LINE_WORDS;
        self.chunks = chunks(weight).count();
        // Tiles read whole: sixteen rows, and of the last one up to sixteen words more.
        let words = rows.next_multiple_of(TILE_ROWS) * self.stride + TILE_WORDS;
        let factors = rows.next_multiple_of(TILE_ROWS) * self.chunks * 2;
        if self.words.len() < words {
            self.words = AlignedVec::zeroed(words);
        }
        if self.factors.len() < factors {
            self.factors = AlignedVec::zeroed(factors);
        }
        let (words_of_row, chunks) = (self.stride, self.chunks);
        let (words, factors) =
            &(DisjointSlices::new(&mut self.words), DisjointSlices::new(&mut self.factors));
        pool.run(rows.div_ceil(ROWS_PER_TASK), &|task| {
            let first = task * ROWS_PER_TASK;
            for row in first..rows.min(first + ROWS_PER_TASK) {
                let input = &input[row * inputs..(row + 1) * inputs];
                // SAFETY: each row has words and factors of its own; `set` was detected on this processor.
                unsafe {
                    let words = words.slice(row * words_of_row..(row + 1) * words_of_row);
                    let first_factor = factor_at(row, 0, chunks);
                    let task = RowTask { input, weight, words, factors, first_factor };
                    dispatch!(set, <P: Panels> round_row(task: RowTask<'_, P>));
                }
            }
        });
    }

    /// The words of `row` from the step of input `start` on.
    #[inline(always)]
    pub(crate) fn words(&self, row: usize, start: usize) -> *const i32 {
        self.words[row * self.stride + start / STEP_DEPTH * 2..].as_ptr()
    }

    /// Words from one row to the next.
    #[inline(always)]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// The scale of a chunk of a row, and the sum of its activations.
    #[inline(always)]
    pub(crate) fn factors(&self, row: usize, chunk: usize) -> [f32; 2] {
        let at = factor_at(row, chunk, self.chunks);
        [self.factors[at], self.factors[at + TILE_ROWS]]
    }

    /// The same of 16 rows from `row` on, a multiple of 16: their scales, then their sums.
    #[inline(always)]
    pub(crate) fn tile_factors(&self, row: usize, chunk: usize) -> [&[f32]; 2] {
        let at = factor_at(row, chunk, self.chunks);
        let (scales, sums) = self.factors[at..at + 2 * TILE_ROWS].split_at(TILE_ROWS);
        [scales, sums]
    }
}

/// Where the scale of a chunk of a row lies.
#[inline(always)]
fn factor_at(row: usize, chunk: usize, chunks: usize) -> usize {
    (row / TILE_ROWS * chunks + chunk) * 2 * TILE_ROWS + row % TILE_ROWS
}

struct RowTask<'a, P> {
    input: &'a [f32],
    weight: &'a P,
    words: &'a mut [i32],
    factors: &'a DisjointSlices<'a>,
    first_factor: usize,
}

#[inline(always)]
unsafe fn round_row<S: Simd, P: Panels>(task: RowTask<'_, P>) {
    let RowTask { input, weight, words, factors, first_factor } = task;
    let mut gathered = [0.0f32; CHUNK_DEPTH];
    for chunk in chunks(weight) {
        let depth = chunk.depth;
        let first = chunk.start / STEP_DEPTH * 2;
        let words = &mut words[first..first + depth.div_ceil(STEP_DEPTH) * 2];
        let whole = weight.permutation().is_none() && depth.is_multiple_of(16);
        let values = if whole {
            &input[chunk.inputs()]
        } else {
            gather(&mut gathered, input, weight.permutation(), chunk.inputs());
            &gathered[..depth.next_multiple_of(16)]
        };
        let mut rounded = [0i32; CHUNK_DEPTH / 4];
        // SAFETY: the values are a multiple of 16, whole vectors of every width, and `rounded` holds a byte for each.
        unsafe {
            let (mut largest, mut unsound) = (S::splat(0.0), S::splat(0.0));
            for at in (0..values.len()).step_by(S::WIDTH) {
                let value = S::load(values.as_ptr().add(at));
                largest = S::max(largest, S::max(value, S::sub(S::splat(0.0), value)));
                // 0 times a NaN or an infinity is a NaN.
                unsound = S::multiply_add(value, S::splat(0.0), unsound);
            }
            let scale = S::largest(largest) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let mut sum = S::zero();
            for at in (0..values.len()).step_by(S::WIDTH) {
                let value = S::mul(S::load(values.as_ptr().add(at)), S::splat(inverse));
                let integers = S::to_i32(value);
                sum = S::add_i32(sum, integers);
                S::store_steps(rounded.as_mut_ptr().add(at / 4), integers);
            }
            let at = first_factor + chunk.index * 2 * TILE_ROWS;
            // At most 128 * 127 in all: exact.
            let sum = S::sum(S::add(S::to_f32(sum), unsound));
            // A NaN or an infinity must not be rounded away.
            let scale = scale + 0.0 * sum;
            // Each row has places of its own.
            factors.slice(at..at + 1)[0] = scale;
            factors.slice(at + TILE_ROWS..at + TILE_ROWS + 1)[0] = scale * sum;
        }
        words.copy_from_slice(&rounded[..words.len()]);
    }
}

/// The activations of `chunk` in the order of the weight's columns, and zeros behind them.
fn gather(
    gathered: &mut [f32; CHUNK_DEPTH],
    input: &[f32],
    permutation: Option<&[u32]>,
    chunk: Range<usize>,
) {
    let depth = chunk.len();
    match permutation {
        None => gathered[..depth].copy_from_slice(&input[chunk]),
        Some(permutation) => {
            for (value, &from) in gathered.iter_mut().zip(&permutation[chunk]) {
                *value = input[from as usize];
            }
        }
    }
    gathered[depth..].fill(0.0);
}
