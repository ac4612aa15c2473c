//! Attention on the CPU. A task is a few consecutive queries of one sequence with all the query heads of
//! one KV head, so that each key and value is read once for all of them. Keys are taken in groups of four blocks; within
//! and between groups a row takes its keys in order, so its bits do not depend on the other rows.

mod products;

use std::mem::MaybeUninit;

use super::{Args, BLOCK_SIZE, MAX_HEAD_DIM, PagedAttention, SEQUENCE_WORDS, key_offset, value_offset};
use crate::device::cpu::simd::{InstructionSet, Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices, DisjointSlices};
use crate::error::KernelError;
use products::{GROUP_BLOCKS, GROUP_KEYS, add_values, score};

/// Query rows (queries times heads) of a task, at most.
const TASK_ROWS: usize = 48;

/// Calls `$call` for tiles that cover rows `0..$rows`: `$row` is a tile's first row, the constant `$M` its height, at
/// most 6, so that it stays in registers with four vectors of columns of AVX-512 or two of AVX2.
macro_rules! for_rows {
    ($rows:expr, |$row:ident, $M:ident| $call:expr) => {{
        let mut $row = 0;
        while $row < $rows {
            macro_rules! with_height {
                ($height:literal) => {{
                    const $M: usize = $height;
                    $call;
                    $row += $height;
                }};
            }
            // A tile of one row has too few sums to fill the pipeline.
            match $rows - $row {
                7 => with_height!(4),
                6.. => with_height!(6),
                4 => with_height!(4),
                3 | 5 => with_height!(3),
                2 => with_height!(2),
                _ => with_height!(1),
            }
        }
    }};
}

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
    let mut scores = Scratch::<{ TASK_ROWS * GROUP_KEYS }>::new();
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
        scores: scores.zeroed(rows * GROUP_KEYS),
        sums: sums.zeroed(rows * head_dim),
        largest: [f32::NEG_INFINITY; TASK_ROWS],
        totals: [0.0; TASK_ROWS],
    };
    let last_position = task.first_position + task.queries - 1;
    let first_key = (task.first_position + 1).saturating_sub(task.window);
    for group in first_key / GROUP_KEYS..=last_position / GROUP_KEYS {
        let first_position = group * GROUP_KEYS;
        let keys = GROUP_KEYS.min(last_position + 1 - first_position);
        let blocks = Blocks::new(task, group, keys);
        // SAFETY: the blocks are whole, and `query` and `state` hold `rows` rows.
        unsafe {
            for_rows!(rows, |row, M| score::<S, M>(
                &query[row * head_dim..(row + M) * head_dim],
                &blocks.keys,
                &mut state.scores[row * GROUP_KEYS..(row + M) * GROUP_KEYS],
            ));
            for row in 0..rows {
                let position = task.first_position + row / shared;
                let visible = Visible::new(position, task.window, first_position);
                soften::<S>(&mut state, row, head_dim, visible);
            }
            for_rows!(rows, |row, M| add_values::<S, M>(
                &state.scores[row * GROUP_KEYS..(row + M) * GROUP_KEYS],
                &blocks.values,
                keys,
                &mut state.sums[row * head_dim..(row + M) * head_dim],
            ));
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

/// The keys and values of a group of blocks.
struct Blocks {
    keys: [*const f32; GROUP_BLOCKS],
    values: [*const f32; GROUP_BLOCKS],
}

impl Blocks {
    /// The blocks of the first `keys` keys of `group`; places behind them repeat the last one.
    fn new(task: &Task<'_>, group: usize, keys: usize) -> Self {
        let Task { kv_head, kv_heads, head_dim, .. } = *task;
        let last = (keys - 1) / BLOCK_SIZE;
        let block = |index: usize| task.block_table[group * GROUP_BLOCKS + index.min(last)] as usize;
        let part = |cache: &[f32], from: usize| cache[from..][..head_dim * BLOCK_SIZE].as_ptr();
        Self {
            keys: std::array::from_fn(|index| {
                part(task.key_cache, key_offset(block(index), kv_head, kv_heads, head_dim))
            }),
            values: std::array::from_fn(|index| {
                part(task.value_cache, value_offset(block(index), kv_head, kv_heads, head_dim))
            }),
        }
    }
}

/// The keys of a group that a query sees: offsets `first..end`.
#[derive(Clone, Copy)]
struct Visible {
    first: usize,
    end: usize,
}

impl Visible {
    fn new(position: usize, window: usize, first_position: usize) -> Self {
        let oldest = (position + 1).saturating_sub(window);
        Self {
            first: oldest.saturating_sub(first_position).min(GROUP_KEYS),
            end: (position + 1).saturating_sub(first_position).min(GROUP_KEYS),
        }
    }
}

/// Turns the scores of a row into weights against the running maximum, and rescales what was summed before.
#[inline(always)]
unsafe fn soften<S: Simd>(state: &mut State<'_>, row: usize, head_dim: usize, visible: Visible) {
    let scores = &mut state.scores[row * GROUP_KEYS..(row + 1) * GROUP_KEYS];
    if visible.first >= visible.end {
        scores.fill(0.0);
        return;
    }
    scores[..visible.first].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    // SAFETY: the row has whole vectors of scores, and sums of `head_dim`, a multiple of the width.
    unsafe {
        let mut largest = S::splat(state.largest[row]);
        for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
            largest = S::max(largest, S::load(scores[start..].as_ptr()));
        }
        let largest = S::largest(largest);
        for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
            let score = S::load(scores[start..].as_ptr());
            S::store(scores[start..].as_mut_ptr(), S::exp(S::sub(score, S::splat(largest))));
        }
        scores[..visible.first].fill(0.0);
        scores[visible.end..].fill(0.0);
        let mut total = S::splat(0.0);
        for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
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
