//! Activations times a matrix in panels: the product behind `w4a16_matmul` and `dense_matmul` on the CPU.
//!
//! For each output: `total = 0`; for each chunk of at most 128 inputs in order, `total += scale * sum`,
//! where `sum` takes the chunk's terms in order ([`super::tile`]); then the bias. The order depends on the
//! weight's shape alone. Few rows read the weights straight from the packed form; many rows first widen a
//! chunk once into a buffer that stays in the first-level cache. Both multiply the same values in the same
//! order, so they agree bit for bit.

use super::matrix::{CHUNK_DEPTH, Chunk, PANEL_COLUMNS, Panels, chunks};
use super::simd::{InstructionSet, Simd, dispatch};
use super::tile::{Columns, FloatColumns, Rows, for_row_tiles, tile};

/// Rows that share one widening of a chunk.
const ROW_BLOCK: usize = 256;
/// Up to this many rows read the packed weights directly.
const DIRECT_ROWS: usize = 2;

/// `output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n]`, row-major.
pub(crate) struct PanelProduct<'a, P> {
    pub(crate) input: &'a [f32],
    pub(crate) weight: &'a P,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) output: SharedOutput,
    pub(crate) rows: usize,
}

/// One thread's share: a panel of outputs for a block of rows.
struct Task<'a, P> {
    input: &'a [f32],
    weight: &'a P,
    bias: Option<&'a [f32]>,
    output: SharedOutput,
    rows: std::ops::Range<usize>,
    panel: usize,
}

/// An output that tasks write to in parts.
#[derive(Clone, Copy)]
pub(crate) struct SharedOutput(*mut f32);
// SAFETY: tasks write disjoint panels and row blocks of the output.
unsafe impl Send for SharedOutput {}
// SAFETY: as above.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    pub(crate) fn new(output: &mut [f32]) -> Self {
        Self(output.as_mut_ptr())
    }

    /// Where a panel of a row begins in an output of `out` columns.
    #[inline(always)]
    pub(super) fn at(self, out: usize, panel: usize, row: usize) -> *mut f32 {
        self.0.wrapping_add(row * out + panel * PANEL_COLUMNS)
    }
}

impl<P: Panels> PanelProduct<'_, P> {
    /// The tasks it consists of, which any threads may run.
    pub(crate) fn tasks(&self) -> usize {
        self.weight.out_features().div_ceil(PANEL_COLUMNS) * self.rows.div_ceil(ROW_BLOCK)
    }

    /// Computes task `index`.
    ///
    /// # Safety
    /// `set` was detected on this processor; the output holds the rows; no other thread runs this task.
    ///
    /// # Panics
    /// When input or bias are too short.
    pub(crate) unsafe fn run_task(&self, set: InstructionSet, index: usize) {
        let &Self { input, weight, bias, output, rows } = self;
        let (out, inputs) = (weight.out_features(), weight.in_features());
        assert!(input.len() >= rows * inputs && bias.is_none_or(|bias| bias.len() >= out));
        let panels = out.div_ceil(PANEL_COLUMNS);
        let first = index / panels * ROW_BLOCK;
        let (panel, rows) = (index % panels, first..rows.min(first + ROW_BLOCK));
        let task = &Task { input, weight, bias, output, rows, panel };
        // SAFETY: the caller's promise, and the sizes just checked.
        unsafe { dispatch!(set, <P: Panels> compute(task: &Task<'_, P>)) }
    }
}

#[inline(always)]
unsafe fn compute<S: Simd, P: Panels>(task: &Task<'_, P>) {
    // SAFETY: the caller's promise; 32 columns are 2 vectors of 16 or 4 of 8.
    unsafe {
        match (task.rows.len(), PANEL_COLUMNS / S::WIDTH) {
            (0, _) => {}
            (1..=DIRECT_ROWS, 2) => compute_direct::<S, P, 2>(task),
            (1..=DIRECT_ROWS, _) => compute_direct::<S, P, 4>(task),
            _ => compute_widened::<S, P>(task),
        }
    }
}

#[inline(always)]
unsafe fn compute_direct<S: Simd, P: Panels, const V: usize>(task: &Task<'_, P>) {
    let inputs = task.weight.in_features();
    let mut gathered = [0.0f32; CHUNK_DEPTH];
    for row in task.rows.clone() {
        let activations = &task.input[row * inputs..(row + 1) * inputs];
        // SAFETY: chunks lie within the weight, V vectors are exactly one panel, and the row has as many
        // activations as the weight has inputs.
        unsafe {
            let mut totals = [S::splat(0.0); V];
            for chunk in chunks(task.weight) {
                let Chunk { start, depth, .. } = chunk;
                let rows = match task.weight.permutation() {
                    None => Rows { from: activations[start..].as_ptr(), stride: 0 },
                    Some(permutation) => {
                        gather(&mut gathered, activations, &permutation[start..start + depth]);
                        Rows { from: gathered.as_ptr(), stride: 0 }
                    }
                };
                let columns = task.weight.chunk::<S, V>(task.panel, chunk, 0);
                let [sums] = tile::<S, _, 1, V>(rows, columns, depth);
                for (vector, (total, sum)) in totals.iter_mut().zip(sums).enumerate() {
                    let scale = task.weight.scale::<S>(task.panel, chunk, vector * S::WIDTH);
                    *total = S::multiply_add(scale, sum, *total);
                }
            }
            let mut values = [0.0; PANEL_COLUMNS];
            for (vector, total) in totals.into_iter().enumerate() {
                S::store(values.as_mut_ptr().add(vector * S::WIDTH), total);
            }
            write_row(task.weight, task.bias, task.output, task.panel, row, &values);
        }
    }
}

#[inline(always)]
unsafe fn compute_widened<S: Simd, P: Panels>(task: &Task<'_, P>) {
    let rows = task.rows.len();
    let mut totals = [0.0f32; ROW_BLOCK * PANEL_COLUMNS];
    let mut widened = [0.0f32; CHUNK_DEPTH * PANEL_COLUMNS];
    for chunk in chunks(task.weight) {
        let Chunk { start, depth, .. } = chunk;
        let mut scales = [0.0f32; PANEL_COLUMNS];
        for column in (0..PANEL_COLUMNS).step_by(S::WIDTH) {
            // SAFETY: the chunk lies within the weight; `widened` holds 128 depths of 32 columns.
            unsafe {
                let columns = task.weight.chunk::<S, 1>(task.panel, chunk, column);
                widen::<S, _>(columns, depth, widened[column..].as_mut_ptr());
                S::store(scales[column..].as_mut_ptr(), task.weight.scale::<S>(task.panel, chunk, column));
            }
        }
        let chunk = WidenedChunk { start, depth, columns: &widened, scales: &scales };
        for_row_tiles!(S, rows, |row, M| add_tile::<S, P, M>(task, &chunk, row, &mut totals));
    }
    for (row, values) in task.rows.clone().zip(totals.chunks_exact(PANEL_COLUMNS)) {
        // SAFETY: this task alone writes its panel of its rows.
        unsafe { write_row(task.weight, task.bias, task.output, task.panel, row, values) };
    }
}

/// A chunk of one panel as `f32`.
struct WidenedChunk<'a> {
    start: usize,
    depth: usize,
    columns: &'a [f32; CHUNK_DEPTH * PANEL_COLUMNS],
    scales: &'a [f32; PANEL_COLUMNS],
}

/// Adds the chunk's scaled sums to the totals of `M` rows from `row` of the block on.
#[inline(always)]
unsafe fn add_tile<S: Simd, P: Panels, const M: usize>(
    task: &Task<'_, P>,
    chunk: &WidenedChunk<'_>,
    row: usize,
    totals: &mut [f32; ROW_BLOCK * PANEL_COLUMNS],
) {
    let inputs = task.weight.in_features();
    let first = (task.rows.start + row) * inputs;
    let mut gathered = [[0.0f32; CHUNK_DEPTH]; M];
    let activations = match task.weight.permutation() {
        None => Rows { from: task.input[first + chunk.start..].as_ptr(), stride: inputs },
        Some(permutation) => {
            for (member, gathered) in gathered.iter_mut().enumerate() {
                let activations = &task.input[first + member * inputs..first + (member + 1) * inputs];
                gather(gathered, activations, &permutation[chunk.start..chunk.start + chunk.depth]);
            }
            Rows { from: gathered.as_ptr().cast(), stride: CHUNK_DEPTH }
        }
    };
    for column in (0..PANEL_COLUMNS).step_by(2 * S::WIDTH) {
        // SAFETY: M rows of the block remain, each with `inputs` activations; the buffers hold a whole
        // panel for each depth and row.
        unsafe {
            let columns = FloatColumns { from: chunk.columns[column..].as_ptr(), stride: PANEL_COLUMNS };
            let sums = tile::<S, _, M, 2>(activations, columns, chunk.depth);
            for (member, sums) in sums.into_iter().enumerate() {
                for (vector, sum) in sums.into_iter().enumerate() {
                    let column = column + vector * S::WIDTH;
                    let total = totals.as_mut_ptr().add((row + member) * PANEL_COLUMNS + column);
                    let scale = S::load(chunk.scales.as_ptr().add(column));
                    S::store(total, S::multiply_add(scale, sum, S::load(total)));
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<S: Simd, C: Columns<S>>(columns: C, depth: usize, to: *mut f32) {
    // SAFETY: the caller gives room for `depth` rows of a panel.
    unsafe {
        for index in 0..depth {
            S::store(to.add(index * PANEL_COLUMNS), columns.load(index & !7, index & 7, 0));
        }
    }
}

fn gather(to: &mut [f32], activations: &[f32], permutation: &[u32]) {
    for (to, &input) in to.iter_mut().zip(permutation) {
        *to = activations[input as usize];
    }
}

/// Adds the bias and writes those columns of `panel` that exist.
///
/// # Safety
/// The output has `row`, and no other thread writes this panel of it.
#[inline(always)]
pub(crate) unsafe fn write_row<P: Panels>(
    weight: &P,
    bias: Option<&[f32]>,
    output: SharedOutput,
    panel: usize,
    row: usize,
    values: &[f32],
) {
    let out = weight.out_features();
    let first = panel * PANEL_COLUMNS;
    let columns = PANEL_COLUMNS.min(out - first);
    // SAFETY: the caller's promise.
    let output = unsafe { std::slice::from_raw_parts_mut(output.at(out, panel, row), columns) };
    match bias {
        // A copy of a known length is a few instructions.
        None if columns == PANEL_COLUMNS => {
            output[..PANEL_COLUMNS].copy_from_slice(&values[..PANEL_COLUMNS]);
        }
        None => output.copy_from_slice(&values[..columns]),
        Some(bias) => {
            for ((output, value), bias) in output.iter_mut().zip(values).zip(&bias[first..first + columns]) {
                *output = value + bias;
            }
        }
    }
}
