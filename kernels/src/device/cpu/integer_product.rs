//! Activations in eight bits times a quantized matrix in panels, by integer dot products.
//!
//! For each output: `total = 0`; for each chunk of at most 128 inputs in order
//!
//! ```text
//! total += minimum * activation scale * sum of q;   total += weight scale * activation scale * sum of q * code
//! ```
//!
//! (the minimum of a group with a zero point is `-zero point * weight scale`) with the sums over the chunk in integers, which are exact in any order; then the bias. What is rounded is the
//! activations alone ([`super::integer_rows`]), row by row: a row has the same bits alone and in any batch.

use std::mem::MaybeUninit;

use super::integer_rows::{IntegerRows, STEP_DEPTH, chunks};
use super::matrix::PANEL_COLUMNS;
use super::panel_product::{SharedOutput, write_row};
use super::quantized_panels::IntegerPanels;
use super::simd::{InstructionSet, Simd, dispatch};
use super::thread_pool::ThreadPool;
use super::tile::for_row_tiles;

/// Rows whose totals a task keeps.
const ROW_BLOCK: usize = 128;

/// `output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n]`, row-major, of rounded inputs.
pub(crate) struct IntegerProduct<'a, P> {
    pub(crate) input: &'a IntegerRows,
    pub(crate) weight: &'a P,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) output: &'a mut [f32],
    pub(crate) rows: usize,
}

/// One thread's share: a panel of outputs for a block of rows.
struct Task<'a, P> {
    input: &'a IntegerRows,
    weight: &'a P,
    bias: Option<&'a [f32]>,
    output: SharedOutput,
    rows: std::ops::Range<usize>,
    panel: usize,
}

impl<P: IntegerPanels> IntegerProduct<'_, P> {
    /// Computes the product on all threads of `pool`.
    ///
    /// # Panics
    /// When the output is shorter than `rows` times the weight's outputs: callers check their arguments.
    pub(crate) fn run(self, set: InstructionSet, pool: &ThreadPool) {
        let out = self.weight.out_features();
        assert!(self.output.len() >= self.rows * out && self.bias.is_none_or(|bias| bias.len() >= out));
        let output = SharedOutput::new(self.output);
        let panels = out.div_ceil(PANEL_COLUMNS);
        let (input, weight, bias, rows) = (self.input, self.weight, self.bias, self.rows);
        pool.run(panels * rows.div_ceil(ROW_BLOCK), &|index| {
            let first = index / panels * ROW_BLOCK;
            let (panel, rows) = (index % panels, first..rows.min(first + ROW_BLOCK));
            let task = Task { input, weight, bias, output, rows, panel };
            // SAFETY: `set` was detected on this processor, and the output holds the rows.
            unsafe { dispatch!(set, <P: IntegerPanels> compute(task: Task<'_, P>)) }
        });
    }
}

#[inline(always)]
unsafe fn compute<S: Simd, P: IntegerPanels>(task: Task<'_, P>) {
    let rows = task.rows.len();
    // Written by the first chunk: to clear it would take as long as a chunk of one row.
    let mut totals = [const { MaybeUninit::<f32>::uninit() }; ROW_BLOCK * PANEL_COLUMNS];
    if task.weight.in_features() == 0 {
        totals.fill(MaybeUninit::new(0.0));
    }
    for (chunk, inputs) in chunks(task.weight).enumerate() {
        let (start, steps) = (inputs.start, inputs.len().div_ceil(STEP_DEPTH));
        let part = Part { chunk, start, steps };
        for_row_tiles!(S, rows, |row, M| add_tile::<S, P, M>(&task, &part, row, &mut totals));
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

/// A chunk of the inputs.
struct Part {
    chunk: usize,
    start: usize,
    steps: usize,
}

/// Adds a chunk's sums to the totals of `M` rows from `row` of the block on.
#[inline(always)]
unsafe fn add_tile<S: Simd, P: IntegerPanels, const M: usize>(
    task: &Task<'_, P>,
    part: &Part,
    row: usize,
    totals: &mut [MaybeUninit<f32>; ROW_BLOCK * PANEL_COLUMNS],
) {
    let first = task.rows.start + row;
    let words = task.input.words(first, part.start);
    let stride = task.input.stride();
    for column in (0..PANEL_COLUMNS).step_by(2 * S::WIDTH) {
        // SAFETY: M rows of the block remain, each with words for every step; two vectors of columns lie in the panel.
        unsafe {
            let mut sums = [[[S::zero(); 2]; 2]; M];
            for step in 0..part.steps {
                // No closure: it would be compiled without the instruction set.
                let codes = [
                    task.weight.codes::<S>(task.panel, part.start, step, column),
                    task.weight.codes::<S>(task.panel, part.start, step, column + S::WIDTH),
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
            let factors = [
                task.weight.scale_and_minimum::<S>(task.panel, part.start, column),
                task.weight.scale_and_minimum::<S>(task.panel, part.start, column + S::WIDTH),
            ];
            for (member, sums) in sums.into_iter().enumerate() {
                let (scale, sum) = task.input.factors(first + member, part.chunk);
                let first = totals.as_mut_ptr().add((row + member) * PANEL_COLUMNS + column);
                for (vector, ([even, odd], [weight_scale, minimum])) in
                    sums.into_iter().zip(factors).enumerate()
                {
                    let dot = S::mul(S::splat(scale), S::to_f32(S::add_i32(even, odd)));
                    let total = first.add(vector * S::WIDTH).cast();
                    let before = if part.chunk == 0 { S::splat(0.0) } else { S::load(total) };
                    let before = S::multiply_add(minimum, S::splat(sum), before);
                    S::store(total, S::multiply_add(weight_scale, dot, before));
                }
            }
        }
    }
}
