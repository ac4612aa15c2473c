//! Attention on the CPU. A task is a few consecutive queries of one sequence with all the query heads of
//! one KV head, so that each key and value is read once for all of them. Keys are taken in groups of four blocks; within
//! and between groups a row takes its keys in order, so its bits do not depend on the other rows. Groups make segments,
//! each with a softmax of its own, which are merged in order: where there are few tasks, each segment becomes one.

mod products;
mod softmax;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use half::f16;

use super::{Args, BLOCK_SIZE, MAX_HEAD_DIM, PagedAttention, SEQUENCE_WORDS};
use crate::device::cpu::aligned::AlignedVec;
use crate::device::cpu::cache::{CacheElement, CacheValues, CpuCache, Paired};
use crate::device::cpu::simd::{InstructionSet, Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices, DisjointSlices};
use crate::error::KernelError;
use products::{Blocks, GROUP_KEYS, Widened, add_values, score};
use softmax::{STATE_TAIL, Scratch, State, Visible};

/// Query rows (queries times heads) of a task, at most.
const TASK_ROWS: usize = 48;
/// Keys from multiples of this many on share a softmax: part of the reduction order.
const SEGMENT_KEYS: usize = 4 * GROUP_KEYS;
/// Fewer tasks for each thread than this are split into their segments.
const TASKS_PER_THREAD: usize = 4;
/// From this many rows on, keys and values are widened once for all of them.
const WIDENED_ROWS: usize = 8;

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

type Arguments<'a> = Args<'a, CpuBuffer, CpuIndices, CpuCache>;

/// The tasks of a step and what they leave for each other: memory that serves one step after the other.
pub(crate) struct AttentionScratch {
    tasks: Vec<Task>,
    /// Tasks that have one segment each of the same queries and KV head, one after the other.
    splits: Vec<Range<usize>>,
    /// The states of those tasks.
    states: AlignedVec<f32>,
}

impl AttentionScratch {
    pub(crate) fn new() -> Self {
        Self { tasks: Vec::new(), splits: Vec::new(), states: AlignedVec::zeroed(0) }
    }

    /// Lists the tasks of `sequences`: few of them are split into their segments.
    fn plan(&mut self, sequences: &[u32], heads: &Heads, threads: usize) {
        self.tasks.clear();
        self.splits.clear();
        for words in sequences.chunks_exact(SEQUENCE_WORDS) {
            self.list(words, heads);
        }
        let whole = self.tasks.len();
        if whole >= TASKS_PER_THREAD * threads {
            return;
        }
        for index in 0..whole {
            let task = self.tasks[index].clone();
            if task.queries > 1 || task.segments.len() < 2 {
                self.tasks.push(task);
                continue;
            }
            let first = self.tasks.len() - whole;
            self.splits.push(first..first + task.segments.len());
            let segments = task.segments.clone();
            self.tasks.extend(segments.map(|segment| Task {
                segments: segment..segment + 1,
                split: true,
                ..task.clone()
            }));
        }
        self.tasks.drain(..whole);
        let states = self.tasks.len() * heads.shared() * heads.state_values();
        if !self.splits.is_empty() && self.states.len() < states {
            self.states = AlignedVec::zeroed(states);
        }
    }

    fn list(&mut self, sequence: &[u32], heads: &Heads) {
        let [first_row, rows, first_position, table_start] = [0, 1, 2, 3].map(|word| sequence[word] as usize);
        let queries_per_task = TASK_ROWS / heads.shared();
        for first in (0..rows).step_by(queries_per_task) {
            let queries = queries_per_task.min(rows - first);
            let (first_row, first_position) = (first_row + first, first_position + first);
            let first_key = (first_position + 1).saturating_sub(heads.window);
            let segments = first_key / SEGMENT_KEYS..(first_position + queries - 1) / SEGMENT_KEYS + 1;
            self.tasks.extend((0..heads.kv_heads).map(|kv_head| Task {
                first_row,
                first_position,
                queries,
                table_start,
                kv_head,
                segments: segments.clone(),
                split: false,
            }));
        }
    }
}

/// Some queries of a sequence and one KV head, and segments of the keys that they attend to.
#[derive(Clone)]
struct Task {
    /// First row of the batch, and its position.
    first_row: usize,
    first_position: usize,
    queries: usize,
    table_start: usize,
    kv_head: usize,
    segments: Range<usize>,
    /// Whether other tasks have the other segments.
    split: bool,
}

impl Task {
    /// The visible keys of a segment.
    fn keys(&self, segment: usize, window: usize) -> Range<usize> {
        let first = (self.first_position + 1).saturating_sub(window);
        let end = self.first_position + self.queries;
        first.max(segment * SEGMENT_KEYS)..end.min((segment + 1) * SEGMENT_KEYS)
    }
}

/// Sizes of the heads.
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
}

impl Heads {
    /// Query heads of a KV head.
    fn shared(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Values of the state of a row.
    fn state_values(&self) -> usize {
        self.head_dim + STATE_TAIL
    }
}

/// What the tasks of a step have in common.
struct Run<'a, E> {
    heads: &'a Heads,
    query: &'a [f32],
    key_cache: &'a [E],
    value_cache: &'a [E],
    block_tables: &'a [u32],
    output: DisjointSlices<'a>,
    states: DisjointSlices<'a>,
}

impl<E> Run<'_, E> {
    /// Where a row of a task, query after query with all its heads, begins in queries and output.
    fn at(&self, task: &Task, row: usize) -> usize {
        let Heads { heads, head_dim, .. } = *self.heads;
        let shared = self.heads.shared();
        ((task.first_row + row / shared) * heads + task.kv_head * shared + row % shared) * head_dim
    }
}

impl PagedAttention for Cpu {
    fn paged_attention(&self, args: Arguments<'_>) -> Result<(), KernelError> {
        args.check()?;
        match (&args.key_cache.0, &args.value_cache.0) {
            (CacheValues::F32(keys), CacheValues::F32(values)) => attend_to(self, keys, values, args),
            (CacheValues::F16(keys), CacheValues::F16(values)) => attend_to(self, keys, values, args),
            (CacheValues::Pairs(keys), CacheValues::Pairs(values)) => attend_to(self, keys, values, args),
            _ => {
                let requirement = "must be of the element type of the keys";
                return KernelError::require(false, "paged_attention", "value_cache", "another", requirement);
            }
        }
        Ok(())
    }
}

/// How a task is computed for a type of cache.
trait Attend: CacheElement {
    /// Computes a task; one of a split leaves its state in `split`.
    ///
    /// # Safety
    /// The processor has `set`; no other thread runs this task.
    unsafe fn attend(set: InstructionSet, run: &Run<'_, Self>, task: &Task, split: &mut [f32]);
}

impl Attend for f32 {
    unsafe fn attend(set: InstructionSet, run: &Run<'_, Self>, task: &Task, split: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { attend_by_vectors(set, run, task, split) }
    }
}

impl Attend for f16 {
    unsafe fn attend(set: InstructionSet, run: &Run<'_, Self>, task: &Task, split: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { attend_by_vectors(set, run, task, split) }
    }
}

unsafe fn attend_by_vectors<E: CacheElement>(
    set: InstructionSet,
    run: &Run<'_, E>,
    task: &Task,
    split: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe { dispatch!(set, <E: CacheElement> attend(run: &Run<'_, E>, task: &Task, split: &mut [f32])) }
}

impl Attend for Paired {
    unsafe fn attend(_: InstructionSet, run: &Run<'_, Self>, task: &Task, split: &mut [f32]) {
        // SAFETY: caches are in pairs where the instruction set is AMX; the rest is the caller's promise.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            tiles::attend(run, task, split);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("{} tasks of a cache for AMX", run.heads.heads + task.queries + split.len());
    }
}

fn attend_to<E: Attend>(cpu: &Cpu, key_cache: &[E], value_cache: &[E], args: Arguments<'_>) {
    let Args { heads, kv_heads, head_dim, window, sequence_count, rows, .. } = args;
    let heads = &Heads { heads, kv_heads, head_dim, window };
    let (set, pool) = (cpu.instruction_set(), cpu.pool());
    let mut scratch = cpu.attention_scratch();
    scratch.plan(&args.sequences[..sequence_count * SEQUENCE_WORDS], heads, pool.threads());
    let AttentionScratch { tasks, splits, states } = &mut *scratch;
    let run = &Run {
        heads,
        query: args.query,
        key_cache,
        value_cache,
        block_tables: args.block_tables,
        output: DisjointSlices::new(&mut args.output[..rows * heads.heads * head_dim]),
        states: DisjointSlices::new(states),
    };
    let state_values = heads.shared() * heads.state_values();
    pool.run(tasks.len(), &|index| {
        let task = &tasks[index];
        let split = index * state_values..(index + 1) * state_values;
        // SAFETY: each task has a state of its own, and the set was detected.
        unsafe {
            let state = if task.split { run.states.slice(split) } else { &mut [] };
            E::attend(set, run, task, state);
        }
    });
    pool.run(splits.len(), &|split| {
        let split = &splits[split];
        let task = &tasks[split.start];
        // SAFETY: each split has states of its own, which no task uses any more, and the set was detected.
        unsafe {
            let states = run.states.slice(split.start * state_values..split.end * state_values);
            dispatch!(set, <E: CacheElement> join(run: &Run<'_, E>, task: &Task, states: &mut [f32]));
        }
    });
}

/// Computes a task; one of a split leaves its state in `split`.
#[inline(always)]
unsafe fn attend<S: Simd, E: CacheElement>(run: &Run<'_, E>, task: &Task, split: &mut [f32]) {
    let Heads { head_dim, .. } = *run.heads;
    let rows = task.queries * run.heads.shared();
    let mut query = Scratch::<{ TASK_ROWS * MAX_HEAD_DIM }>::new();
    let mut merged = Scratch::<{ TASK_ROWS * (MAX_HEAD_DIM + STATE_TAIL) }>::new();
    let mut next = Scratch::<{ TASK_ROWS * (MAX_HEAD_DIM + STATE_TAIL) }>::new();
    let query = query.zeroed(rows * head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (row, query) in query.chunks_exact_mut(head_dim).enumerate() {
        for (to, from) in query.iter_mut().zip(&run.query[run.at(task, row)..]) {
            *to = from * scale;
        }
    }
    let values = rows * run.heads.state_values();
    // SAFETY: the query has the rows, and so have the states.
    unsafe {
        if task.split {
            attend_segment::<S, E>(run, task, task.segments.start, query, &mut State::new(split, head_dim));
            return;
        }
        let mut merged = State::new(merged.zeroed(values), head_dim);
        let mut next = State::new(next.zeroed(if task.segments.len() > 1 { values } else { 0 }), head_dim);
        for segment in task.segments.clone() {
            if segment == task.segments.start {
                attend_segment::<S, E>(run, task, segment, query, &mut merged);
            } else {
                attend_segment::<S, E>(run, task, segment, query, &mut next);
                merged.merge::<S>(&next);
            }
        }
        for row in 0..rows {
            let to = run.at(task, row);
            // Each row and head of the output belongs to one task.
            merged.write(row, run.output.slice(to..to + head_dim));
        }
    }
}

/// Merges the states of a split and writes the output of its rows.
#[inline(always)]
unsafe fn join<S: Simd, E: CacheElement>(run: &Run<'_, E>, task: &Task, states: &mut [f32]) {
    let (head_dim, rows) = (run.heads.head_dim, run.heads.shared());
    let (first, rest) = states.split_at_mut(rows * run.heads.state_values());
    let mut merged = State::new(first, head_dim);
    // SAFETY: all states have the rows; each row and head of the output belongs to one split.
    unsafe {
        for next in rest.chunks_exact_mut(rows * run.heads.state_values()) {
            merged.merge::<S>(&State::new(next, head_dim));
        }
        for row in 0..rows {
            let to = run.at(task, row);
            merged.write(row, run.output.slice(to..to + head_dim));
        }
    }
}

/// Attends from all rows of `query` to the keys of a segment.
#[inline(always)]
unsafe fn attend_segment<S: Simd, E: CacheElement>(
    run: &Run<'_, E>,
    task: &Task,
    segment: usize,
    query: &[f32],
    state: &mut State<'_>,
) {
    let Heads { head_dim, kv_heads, window, .. } = *run.heads;
    let rows = query.len() / head_dim;
    let mut widened = Widened::new();
    let mut scores = Scratch::<{ TASK_ROWS * GROUP_KEYS }>::new();
    let scores = scores.zeroed(rows * GROUP_KEYS);
    state.clear();
    let visible = task.keys(segment, window);
    for group in visible.start / GROUP_KEYS..visible.end.div_ceil(GROUP_KEYS) {
        let first_key = group * GROUP_KEYS;
        let keys = GROUP_KEYS.min(visible.end - first_key);
        let table = &run.block_tables[task.table_start + first_key / BLOCK_SIZE..];
        let place = |block: u32| block as usize * kv_heads + task.kv_head;
        let blocks = Blocks::new(run.key_cache, run.value_cache, head_dim, keys, |block| place(table[block]));
        let part = Part { query, head_dim, first_key, keys, task, window, shared: run.heads.shared() };
        // SAFETY: the blocks are whole, and `query` and `state` hold `rows` rows.
        unsafe {
            if E::NARROW && rows >= WIDENED_ROWS {
                attend_group::<S, f32>(&part, &widened.fill::<S, E>(&blocks, head_dim), scores, state);
            } else {
                attend_group::<S, E>(&part, &blocks, scores, state);
            }
        }
    }
}

/// A group of keys.
struct Part<'a> {
    query: &'a [f32],
    head_dim: usize,
    first_key: usize,
    keys: usize,
    task: &'a Task,
    window: usize,
    shared: usize,
}

#[inline(always)]
unsafe fn attend_group<S: Simd, E: CacheElement>(
    part: &Part<'_>,
    blocks: &Blocks<E>,
    scores: &mut [f32],
    state: &mut State<'_>,
) {
    let &Part { query, head_dim, first_key, keys, task, window, shared } = part;
    let rows = query.len() / head_dim;
    // SAFETY: the caller's promise.
    unsafe {
        for_rows!(rows, |row, M| score::<S, E, M>(
            &query[row * head_dim..(row + M) * head_dim],
            &blocks.keys,
            &mut scores[row * GROUP_KEYS..(row + M) * GROUP_KEYS],
        ));
        for (row, scores) in scores.chunks_exact_mut(GROUP_KEYS).enumerate() {
            state.soften::<S>(
                row,
                scores,
                Visible::new(task.first_position + row / shared, window, first_key),
            );
        }
        for_rows!(rows, |row, M| add_values::<S, E, M>(
            &scores[row * GROUP_KEYS..(row + M) * GROUP_KEYS],
            &blocks.values,
            keys,
            state.rows(row),
            head_dim,
        ));
    }
}
