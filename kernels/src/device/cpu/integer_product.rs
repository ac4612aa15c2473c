//! Activations in eight bits times a quantized matrix in panels, by integer dot products.
//!
//! For each output: `total = 0`; for each chunk of at most 128 inputs in order
//!
//! ```text
//! total += minimum * activation scale * sum of q
//! total += weight scale * activation scale * sum of q * code
//! ```
//!
//! (the minimum of a group with a zero point is `-zero point * weight scale`) with the sums over the chunk in integers,
//! which are exact in any order; then the bias. What is rounded is the activations alone ([`super::integer_rows`]), row by
//! row: a row has the same bits alone and in any batch.

use std::mem::MaybeUninit;

use super::integer_rows::{IntegerRows, STEP_DEPTH};
#[cfg(target_arch = "x86_64")]
use super::integer_tiles;
use super::matrix::{CHUNK_DEPTH, Chunk, PANEL_COLUMNS, chunks};
use super::panel_product::{SharedOutput, write_row};
use super::quantized_panels::IntegerPanels;
use super::simd::{DOTS_OF_PAIRS, InstructionSet, Simd, dispatch};
use super::tile::for_row_tiles;

/// Rows whose totals a task keeps, at most and at least: fewer rows for each unpacking of weights take longer, but a block
/// for each thread lets every thread find its rows in its own cache, operation after operation.
const ROW_BLOCK: usize = 128;
const LEAST_ROW_BLOCK: usize = 64;
/// How far ahead weights are asked for.
const PREFETCHED_INPUTS: usize = 256;
/// Up to this many rows go through a panel one chunk after the other with their totals in registers.
const FEW_ROWS: usize = 4;

/// `output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n]`, row-major, of rounded inputs.
pub(crate) struct IntegerProduct<'a, P> {
    pub(crate) input: &'a IntegerRows,
    pub(crate) weight: &'a P,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) output: SharedOutput,
    pub(crate) rows: usize,
    pub(crate) threads: usize,
}

/// One thread's share: a panel of outputs for a block of rows.
pub(super) struct Task<'a, P> {
    pub(super) input: &'a IntegerRows,
    pub(super) weight: &'a P,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) output: SharedOutput,
    pub(super) rows: std::ops::Range<usize>,
    pub(super) panel: usize,
}

impl<P: IntegerPanels> IntegerProduct<'_, P> {
    /// The tasks it consists of, which any threads may run.
    pub(crate) fn tasks(&self) -> usize {
        self.weight.out_features().div_ceil(PANEL_COLUMNS) * self.rows.div_ceil(self.row_block())
    }

    /// Rows of a task.
    fn row_block(&self) -> usize {
        self.rows.div_ceil(self.threads).next_multiple_of(16).clamp(LEAST_ROW_BLOCK, ROW_BLOCK)
    }

    /// Computes task `index`.
    ///
    /// # Safety
    /// `set` was detected on this processor; input and output hold the rows, the bias the outputs; no other thread runs
    /// this task.
    pub(crate) unsafe fn run_task(&self, set: InstructionSet, index: usize) {
        let &Self { input, weight, bias, output, rows, .. } = self;
        let (panels, row_block) = (weight.out_features().div_ceil(PANEL_COLUMNS), self.row_block());
        let first = index / panels * row_block;
        let (panel, rows) = (index % panels, first..rows.min(first + row_block));
        let task = Task { input, weight, bias, output, rows, panel };
        // SAFETY: the caller's promise.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if set == InstructionSet::Amx && task.rows.len() >= integer_tiles::LEAST_ROWS {
                return integer_tiles::compute(&task);
            }
            dispatch!(set, <P: IntegerPanels> compute(task: Task<'_, P>));
        }
    }
}

#[inline(always)]
unsafe fn compute<S: Simd, P: IntegerPanels>(task: Task<'_, P>) {
    let rows = task.rows.len();
    let first = task.rows.start;
    // SAFETY: so many rows there are.
    unsafe {
        match rows {
            1 => return compute_few::<S, P, 1>(&task, first),
            2 => return compute_few::<S, P, 2>(&task, first),
            3 => {
                compute_few::<S, P, 2>(&task, first);
                return compute_few::<S, P, 1>(&task, first + 2);
            }
            FEW_ROWS => return compute_few::<S, P, FEW_ROWS>(&task, first),
            _ => {}
        }
    }
    // Written by the first chunk: to clear it would take as long as a chunk of one row.
    let mut totals = [const { MaybeUninit::<f32>::uninit() }; ROW_BLOCK * PANEL_COLUMNS];
    if task.weight.in_features() == 0 {
        totals.fill(MaybeUninit::new(0.0));
    }
    let ahead = chunks_ahead(task.weight);
    for chunk in chunks(task.weight) {
        task.weight.prefetch(task.panel, chunk.later(ahead));
        for_row_tiles!(S, rows, |row, M| add_tile::<S, P, M>(&task, chunk, row, &mut totals));
    }
    for (row, values) in task.rows.clone().zip(totals.chunks_exact(PANEL_COLUMNS)) {
        // SAFETY: this task alone writes its panel of its rows, which the output holds; the first chunk, or the lack
        // of one, has written the totals of every row.
        unsafe {
            let values = std::slice::from_raw_parts(values.as_ptr().cast(), PANEL_COLUMNS);
            write_row(task.weight, task.bias, task.output, task.panel, row, values);
        }
    }
}

/// Chunks of [`PREFETCHED_INPUTS`].
fn chunks_ahead<P: IntegerPanels>(weight: &P) -> usize {
    PREFETCHED_INPUTS / weight.group_size().clamp(1, CHUNK_DEPTH)
}

/// All of `M` rows from `first` on.
#[inline(always)]
unsafe fn compute_few<S: Simd, P: IntegerPanels, const M: usize>(task: &Task<'_, P>, first: usize) {
    let mut values = [[0.0f32; PANEL_COLUMNS]; M];
    let ahead = chunks_ahead(task.weight);
    for column in (0..PANEL_COLUMNS).step_by(2 * S::WIDTH) {
        // SAFETY: M rows of the task from `first` on, two vectors of columns within the panel.
        unsafe {
            let mut totals = [[S::splat(0.0); 2]; M];
            for chunk in chunks(task.weight) {
                if column == 0 {
                    task.weight.prefetch(task.panel, chunk.later(ahead));
                }
                let sums = sums::<S, P, M>(task, chunk, first, column);
                let factors = factors::<S, P>(task, chunk, column);
                for (member, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
                    let of_row = task.input.factors(first + member, chunk.index);
                    for (vector, total) in totals.iter_mut().enumerate() {
                        *total = add::<S>(*total, sums[vector], factors[vector], of_row);
                    }
                }
            }
            for (values, totals) in values.iter_mut().zip(totals) {
                S::store(values[column..].as_mut_ptr(), totals[0]);
                S::store(values[column + S::WIDTH..].as_mut_ptr(), totals[1]);
            }
        }
    }
    for (member, values) in values.iter().enumerate() {
        // SAFETY: this task alone writes its panel of its rows, which the output holds.
        unsafe { write_row(task.weight, task.bias, task.output, task.panel, first + member, values) };
    }
}

/// Adds a chunk's sums to the totals of `M` rows from `row` of the block on.
#[inline(always)]
unsafe fn add_tile<S: Simd, P: IntegerPanels, const M: usize>(
    task: &Task<'_, P>,
    chunk: Chunk,
    row: usize,
    totals: &mut [MaybeUninit<f32>; ROW_BLOCK * PANEL_COLUMNS],
) {
    let first = task.rows.start + row;
    for column in (0..PANEL_COLUMNS).step_by(2 * S::WIDTH) {
        // SAFETY: M rows of the block remain; two vectors of columns lie in the panel.
        unsafe {
            let sums = sums::<S, P, M>(task, chunk, first, column);
            let factors = factors::<S, P>(task, chunk, column);
            for (member, sums) in sums.into_iter().enumerate() {
                let of_row = task.input.factors(first + member, chunk.index);
                let totals = totals.as_mut_ptr().add((row + member) * PANEL_COLUMNS + column).cast::<f32>();
                let mut of_columns = [S::splat(0.0); 2];
                if chunk.index > 0 {
                    of_columns = [S::load(totals), S::load(totals.add(S::WIDTH))];
                }
                for (vector, total) in of_columns.into_iter().enumerate() {
                    let total = add::<S>(total, sums[vector], factors[vector], of_row);
                    S::store(totals.add(vector * S::WIDTH), total);
                }
            }
        }
    }
}

/// The sums over a chunk of `q * code` for `M` rows from `first` on and two vectors of columns.
///
/// # Safety
/// The input has those rows, the panel those columns, and the instruction set of `S` is available.
#[inline(always)]
unsafe fn sums<S: Simd, P: IntegerPanels, const M: usize>(
    task: &Task<'_, P>,
    chunk: Chunk,
    first: usize,
    column: usize,
) -> [[S::I32; 2]; M] {
    let words = task.input.words(first, chunk.start);
    let stride = task.input.stride();
    if S::PAIRS && P::FOUR_BITS {
        // SAFETY: the caller's promise.
        return unsafe { sums_of_pairs::<S, P, M>(task, chunk, words, column) };
    }
    // SAFETY: the caller's promise; each row has words for every step.
    unsafe {
        let mut sums = [[[S::zero(); 2]; 2]; M];
        for step in 0..chunk.depth.div_ceil(STEP_DEPTH) {
            // No closure: it would be compiled without the instruction set.
            let codes = [
                task.weight.codes::<S>(task.panel, chunk, step, column),
                task.weight.codes::<S>(task.panel, chunk, step, column + S::WIDTH),
            ];
            for (member, sums) in sums.iter_mut().enumerate() {
                let words = words.add(member * stride + 2 * step);
                for (sums, codes) in sums.iter_mut().zip(codes) {
                    // Few rows do not fill the pipeline with one sum for each vector.
                    let odd = usize::from(M <= 2);
                    sums[0] = P::dot::<S>(sums[0], codes[0], *words);
                    sums[odd] = P::dot::<S>(sums[odd], codes[1], *words.add(1));
                }
            }
        }
        let mut both = [[S::zero(); 2]; M];
        for (both, sums) in both.iter_mut().zip(sums) {
            for (both, [even, odd]) in both.iter_mut().zip(sums) {
                *both = if M <= 2 { S::add_i32(even, odd) } else { even };
            }
        }
        both
    }
}

/// The same for codes of four bits, by sums of pairs; `words` are those of the first row.
///
/// # Safety
/// As for [`sums`].
#[inline(always)]
unsafe fn sums_of_pairs<S: Simd, P: IntegerPanels, const M: usize>(
    task: &Task<'_, P>,
    chunk: Chunk,
    words: *const i32,
    column: usize,
) -> [[S::I32; 2]; M] {
    /// A step has two dot products.
    const STEPS: usize = DOTS_OF_PAIRS / 2;
    let (stride, steps) = (task.input.stride(), chunk.depth.div_ceil(STEP_DEPTH));
    // SAFETY: the caller's promise; each row has words for every step.
    unsafe {
        let mut sums = [[S::zero(); 2]; M];
        for first_step in (0..steps).step_by(STEPS) {
            let mut pairs = [[S::zero(); 2]; M];
            for step in first_step..steps.min(first_step + STEPS) {
                let codes = [
                    task.weight.codes::<S>(task.panel, chunk, step, column),
                    task.weight.codes::<S>(task.panel, chunk, step, column + S::WIDTH),
                ];
                for (member, pairs) in pairs.iter_mut().enumerate() {
                    let words = words.add(member * stride + 2 * step);
                    for (pairs, codes) in pairs.iter_mut().zip(codes) {
                        *pairs = S::dot_pairs(*pairs, codes[0], *words);
                        *pairs = S::dot_pairs(*pairs, codes[1], *words.add(1));
                    }
                }
            }
            for (sums, pairs) in sums.iter_mut().zip(pairs) {
                for (sum, pairs) in sums.iter_mut().zip(pairs) {
                    *sum = S::add_pairs(*sum, pairs);
                }
            }
        }
        sums
    }
}

/// Scale and minimum of two vectors of columns in a chunk.
///
/// # Safety
/// As for [`sums`].
#[inline(always)]
unsafe fn factors<S: Simd, P: IntegerPanels>(
    task: &Task<'_, P>,
    chunk: Chunk,
    column: usize,
) -> [[S::F32; 2]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            task.weight.scale_and_minimum::<S>(task.panel, chunk, column),
            task.weight.scale_and_minimum::<S>(task.panel, chunk, column + S::WIDTH),
        ]
    }
}

/// Adds a chunk to the total of a row and a vector of columns: `sums` of products, `factors` of the columns, scale and sum
/// of the row.
///
/// # Safety
/// The instruction set of `S` is available.
#[inline(always)]
pub(super) unsafe fn add<S: Simd>(
    total: S::F32,
    sums: S::I32,
    [weight_scale, minimum]: [S::F32; 2],
    [scale, sum]: [f32; 2],
) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe {
        let dot = S::mul(S::splat(scale), S::to_f32(sums));
        S::multiply_add(weight_scale, dot, S::multiply_add(minimum, S::splat(sum), total))
    }
}
