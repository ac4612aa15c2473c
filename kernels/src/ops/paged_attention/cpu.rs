//! Attention on the CPU. A task is a few consecutive queries of one sequence with all the query heads of
//! one KV head, so that each key and value is read once for all of them.

use std::mem::MaybeUninit;

use super::{Args, BLOCK_SIZE, MAX_HEAD_DIM, PagedAttention, SEQUENCE_WORDS, key_offset, value_offset};
use crate::device::cpu::simd::{InstructionSet, Simd, dispatch};
use crate::device::cpu::tile::{FloatColumns, Rows, for_row_tiles, tile};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices, DisjointSlices};
use crate::error::KernelError;

/// Query rows (queries times heads) of a task, at most.
const TASK_ROWS: usize = 48;

type Arguments<'a> = Args<'a, CpuBuffer, CpuIndices>;

/// One sequence as [`Args::sequences`] describes it.
#[derive(Clone, Copy)]
struct Sequence {
    first_row: usize,
    rows: usize,
    first_position: usize,
    table_start: usize,
}

/// Where a task works.
struct Task<'a> {
    query: &'a [f32],
    key_cache: &'a [f32],
    value_cache: &'a [f32],
    block_table: &'a [u32],
    output: &'a DisjointSlices<'a>,
    /// First row of the batch, and its position.
    first_row: usize,
    first_position: usize,
    queries: usize,
    kv_head: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
}

impl PagedAttention for Cpu {
    fn paged_attention(&self, args: Arguments<'_>) -> Result<(), KernelError> {
        args.check()?;
        let Args { heads, kv_heads, head_dim, window, sequence_count, rows, .. } = args;
        let queries_per_task = TASK_ROWS / (heads / kv_heads);
        let words = &args.sequences[..sequence_count * SEQUENCE_WORDS];
        let sequences = || {
            words.chunks_exact(SEQUENCE_WORDS).map(|words| Sequence {
                first_row: words[0] as usize,
                rows: words[1] as usize,
                first_position: words[2] as usize,
                table_start: words[3] as usize,
            })
        };
        let tasks_of = |sequence: Sequence| sequence.rows.div_ceil(queries_per_task) * kv_heads;
        let (query, key_cache, value_cache) = (&**args.query, &**args.key_cache, &**args.value_cache);
        let block_tables = &**args.block_tables;
        let output = DisjointSlices::new(&mut args.output[..rows * heads * head_dim]);
        let set = self.instruction_set();
        self.pool().run(sequences().map(tasks_of).sum(), &|mut index| {
            for sequence in sequences() {
                if index >= tasks_of(sequence) {
                    index -= tasks_of(sequence);
                    continue;
                }
                let first = index / kv_heads * queries_per_task;
                let task = Task {
                    query,
                    key_cache,
                    value_cache,
                    block_table: &block_tables[sequence.table_start..],
                    output: &output,
                    first_row: sequence.first_row + first,
                    first_position: sequence.first_position + first,
                    queries: queries_per_task.min(sequence.rows - first),
                    kv_head: index % kv_heads,
                    heads,
                    kv_heads,
                    head_dim,
                    window,
                };
                return run_task(set, &task);
            }
        });
        Ok(())
    }
}

fn run_task(set: InstructionSet, task: &Task<'_>) {
    // SAFETY: the set was detected; slices are taken with bounds checks inside.
    unsafe { dispatch!(set, attend(task: &Task<'_>)) }
}

/// The running softmax of the query rows of a task.
struct State<'a> {
    scores: &'a mut [f32],
    sums: &'a mut [f32],
    largest: [f32; TASK_ROWS],
    totals: [f32; TASK_ROWS],
}

/// Memory for up to `N` values of a task, of which only those in use are written.
struct Scratch<const N: usize>([MaybeUninit<f32>; N]);

impl<const N: usize> Scratch<N> {
    fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; N])
    }

    /// The first `length` values, set to 0.
    fn zeroed(&mut self, length: usize) -> &mut [f32] {
        let values = &mut self.0[..length];
        values.fill(MaybeUninit::new(0.0));
        // SAFETY: all of them were just written, and `MaybeUninit<f32>` lies in memory as `f32` does.
        unsafe { &mut *(std::ptr::from_mut(values) as *mut [f32]) }
    }
}

#[inline(always)]
unsafe fn attend<S: Simd>(task: &Task<'_>) {
    let Task { head_dim, heads, kv_heads, kv_head, .. } = *task;
    let shared = heads / kv_heads;
    let rows = task.queries * shared;
    let mut query = Scratch::<{ TASK_ROWS * MAX_HEAD_DIM }>::new();
    let mut sums = Scratch::<{ TASK_ROWS * MAX_HEAD_DIM }>::new();
    let mut scores = Scratch::<{ TASK_ROWS * BLOCK_SIZE }>::new();
    let query = query.zeroed(rows * head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for row in 0..rows {
        let from = ((task.first_row + row / shared) * heads + kv_head * shared + row % shared) * head_dim;
        let to = &mut query[row * head_dim..(row + 1) * head_dim];
        for (to, from) in to.iter_mut().zip(&task.query[from..from + head_dim]) {
            *to = from * scale;
        }
    }
    let mut state = State {
        scores: scores.zeroed(rows * BLOCK_SIZE),
        sums: sums.zeroed(rows * head_dim),
        largest: [f32::NEG_INFINITY; TASK_ROWS],
        totals: [0.0; TASK_ROWS],
    };
    let last_position = task.first_position + task.queries - 1;
    let first_key = (task.first_position + 1).saturating_sub(task.window);
    for index in first_key / BLOCK_SIZE..=last_position / BLOCK_SIZE {
        let block = task.block_table[index] as usize;
        let keys = &task.key_cache[key_offset(block, kv_head, kv_heads, head_dim)..][..head_dim * BLOCK_SIZE];
        let values =
            &task.value_cache[value_offset(block, kv_head, kv_heads, head_dim)..][..head_dim * BLOCK_SIZE];
        let first_position = index * BLOCK_SIZE;
        // SAFETY: keys and values are whole blocks, and `query` and `state` hold `rows` rows.
        unsafe {
            score::<S>(query, keys, rows, head_dim, state.scores);
            for row in 0..rows {
                let position = task.first_position + row / shared;
                let visible = Visible::new(position, task.window, first_position);
                soften::<S>(&mut state, row, head_dim, visible);
            }
            let keys = BLOCK_SIZE.min(last_position + 1 - first_position);
            add_values::<S>(&mut state, values, rows, keys, head_dim);
        }
    }
    for row in 0..rows {
        let to = ((task.first_row + row / shared) * heads + kv_head * shared + row % shared) * head_dim;
        // SAFETY: each row and head of the output belongs to one task.
        let output = unsafe { task.output.slice(to..to + head_dim) };
        for (output, sum) in output.iter_mut().zip(&state.sums[row * head_dim..]) {
            *output = sum / state.totals[row];
        }
    }
}

/// The keys of a block that a query sees: offsets `first..end`.
#[derive(Clone, Copy)]
struct Visible {
    first: usize,
    end: usize,
}

impl Visible {
    fn new(position: usize, window: usize, first_position: usize) -> Self {
        let oldest = (position + 1).saturating_sub(window);
        Self {
            first: oldest.saturating_sub(first_position).min(BLOCK_SIZE),
            end: (position + 1).saturating_sub(first_position).min(BLOCK_SIZE),
        }
    }
}

/// `scores[row, j] = query[row] . key[j]` for the 16 keys of a block.
#[inline(always)]
unsafe fn score<S: Simd>(query: &[f32], keys: &[f32], rows: usize, head_dim: usize, scores: &mut [f32]) {
    for_row_tiles!(S, rows, |row, M| score_tile::<S, M>(
        &query[row * head_dim..(row + M) * head_dim],
        keys,
        &mut scores[row * BLOCK_SIZE..(row + M) * BLOCK_SIZE],
    ));
}

#[inline(always)]
unsafe fn score_tile<S: Simd, const M: usize>(query: &[f32], keys: &[f32], scores: &mut [f32]) {
    let head_dim = query.len() / M;
    let rows = Rows { from: query.as_ptr(), stride: head_dim };
    for column in (0..BLOCK_SIZE).step_by(S::WIDTH) {
        let columns = FloatColumns { from: keys[column..].as_ptr(), stride: BLOCK_SIZE };
        // SAFETY: there are M rows of queries and scores, and the block holds head_dim rows of 16 keys.
        unsafe {
            let tile = tile::<S, _, M, 1>(rows, columns, head_dim);
            for (member, [value]) in tile.into_iter().enumerate() {
                S::store(scores[member * BLOCK_SIZE + column..].as_mut_ptr(), value);
            }
        }
    }
}

/// Turns the scores of a row into weights against the running maximum, and rescales what was summed before.
#[inline(always)]
unsafe fn soften<S: Simd>(state: &mut State<'_>, row: usize, head_dim: usize, visible: Visible) {
    let scores = &mut state.scores[row * BLOCK_SIZE..(row + 1) * BLOCK_SIZE];
    if visible.first >= visible.end {
        scores.fill(0.0);
        return;
    }
    scores[..visible.first].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    // SAFETY: the row has 16 scores, a multiple of the width.
    unsafe {
        let mut largest = S::splat(state.largest[row]);
        for start in (0..BLOCK_SIZE).step_by(S::WIDTH) {
            largest = S::max(largest, S::load(scores[start..].as_ptr()));
        }
        let largest = S::largest(largest);
        for start in (0..BLOCK_SIZE).step_by(S::WIDTH) {
            let score = S::load(scores[start..].as_ptr());
            S::store(scores[start..].as_mut_ptr(), S::exp(S::sub(score, S::splat(largest))));
        }
        scores[..visible.first].fill(0.0);
        scores[visible.end..].fill(0.0);
        let mut total = S::splat(0.0);
        for start in (0..BLOCK_SIZE).step_by(S::WIDTH) {
            total = S::add(total, S::load(scores[start..].as_ptr()));
        }
        let before = state.largest[row];
        if largest > before {
            let factor = S::exp(S::splat(before - largest));
            for start in (0..head_dim).step_by(S::WIDTH) {
                let sum = state.sums[row * head_dim + start..].as_mut_ptr();
                S::store(sum, S::mul(S::load(sum), factor));
            }
            state.totals[row] *= S::largest(factor);
            state.largest[row] = largest;
        }
        state.totals[row] += S::sum(total);
    }
}

/// `sums[row] += sum over the block's first `keys` keys of weight[row, j] * value[j]`.
#[inline(always)]
unsafe fn add_values<S: Simd>(state: &mut State<'_>, values: &[f32], rows: usize, keys: usize, head_dim: usize) {
    for_row_tiles!(S, rows, |row, M| add_values_tile::<S, M>(
        &state.scores[row * BLOCK_SIZE..(row + M) * BLOCK_SIZE],
        values,
        keys,
        &mut state.sums[row * head_dim..(row + M) * head_dim],
    ));
}

#[inline(always)]
unsafe fn add_values_tile<S: Simd, const M: usize>(
    weights: &[f32],
    values: &[f32],
    keys: usize,
    sums: &mut [f32],
) {
    let head_dim = sums.len() / M;
    let rows = Rows { from: weights.as_ptr(), stride: BLOCK_SIZE };
    for column in (0..head_dim).step_by(S::WIDTH) {
        let columns = FloatColumns { from: values[column..].as_ptr(), stride: head_dim };
        // SAFETY: there are M rows of weights and sums, the block holds 16 values of head_dim, a multiple
        // of the width.
        unsafe {
            let tile = tile::<S, _, M, 1>(rows, columns, keys);
            for (member, [value]) in tile.into_iter().enumerate() {
                let sum = sums[member * head_dim + column..].as_mut_ptr();
                S::store(sum, S::add(S::load(sum), value));
            }
        }
    }
}
