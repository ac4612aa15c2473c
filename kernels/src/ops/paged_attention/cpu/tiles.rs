//! Attention by AMX's tiles of bfloat16, for caches in pairs ([`Paired`]): queries, keys, values and weights are rounded to
//! bfloat16, what is summed is `f32`.
//!
//! ```text
//! scores   16 rows x 16 keys      queries [row, head_dim]  times keys    [head_dim / 2, 16, 2], a block
//! sums     16 rows x 16 elements  weights [row, 16 keys]   times values  [8, 16 of head_dim, 2], a part of a block
//! ```
//!
//! A tile product sums even and odd terms apart, then adds both to what was there: whatever rows a tile has, a row of it
//! has the same bits. The running softmax between the products is that of the vectors ([`super::softmax`]).
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::{BLOCK_SIZE, MAX_HEAD_DIM};
use super::products::{Blocks, GROUP_BLOCKS, GROUP_KEYS};
use super::softmax::{STATE_TAIL, Scratch, State, Visible};
use super::{Run, TASK_ROWS, Task};
use crate::device::cpu::cache::Paired;
use crate::device::cpu::simd::{Avx512, Simd};
use crate::device::cpu::tile_shapes::TileShapes;

type Vector = Avx512<true>;

/// Rows of a tile, and pairs of a row of a whole one.
const TILE: usize = 16;
const ROW_BYTES: usize = 4 * TILE;
/// Pairs of keys of a block.
const BLOCK_PAIRS: usize = BLOCK_SIZE / 2;
/// Pairs of a group's weights in a row.
const GROUP_PAIRS: usize = GROUP_KEYS / 2;

/// Pairs of bfloat16: queries `[row tile, depth, row, pair]`, weights `[row, pair]`, or values like those of a block.
#[repr(C, align(64))]
struct Pairs<const N: usize>([MaybeUninit<u32>; N]);

impl<const N: usize> Pairs<N> {
    fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; N])
    }

    fn pointer(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

/// Tiles 0 to 3: sums of `rows` rows. 4 and 5: 16 pairs of those rows, and what they are multiplied with. 6 and 7: the same
/// of 8 pairs.
fn shapes(rows: usize) -> TileShapes {
    let mut shapes = TileShapes::new();
    for tile in 0..5 {
        shapes.set(tile, rows, ROW_BYTES);
    }
    shapes.set(5, TILE, ROW_BYTES);
    shapes.set(6, rows, 4 * BLOCK_PAIRS);
    shapes.set(7, BLOCK_PAIRS, ROW_BYTES);
    shapes
}

/// Does `$call` with the names of the tile of sums `$index`, below 4.
macro_rules! with_sums {
    ($index:expr, |$name:ident| $call:expr) => {
        match $index {
            0 => {
                macro_rules! $name {
                    () => {
                        "tmm0"
                    };
                }
                $call
            }
            1 => {
                macro_rules! $name {
                    () => {
                        "tmm1"
                    };
                }
                $call
            }
            2 => {
                macro_rules! $name {
                    () => {
                        "tmm2"
                    };
                }
                $call
            }
            _ => {
                macro_rules! $name {
                    () => {
                        "tmm3"
                    };
                }
                $call
            }
        }
    };
}

/// Computes a task; one of a split leaves its state in `split`.
///
/// # Safety
/// The instruction set is AMX; no other thread runs this task.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")]
pub(super) unsafe fn attend(run: &Run<'_, Paired>, task: &Task, split: &mut [f32]) {
    let head_dim = run.heads.head_dim;
    let rows = task.queries * run.heads.shared();
    // Tiles of 16 rows, the last filled up, or one tile of fewer.
    let tile_rows = rows.min(TILE);
    let padded = rows.next_multiple_of(tile_rows);
    let mut query = Pairs::<{ TASK_ROWS * MAX_HEAD_DIM / 2 }>::new();
    let mut merged = Scratch::<{ TASK_ROWS * (MAX_HEAD_DIM + STATE_TAIL) }>::new();
    let mut next = Scratch::<{ TASK_ROWS * (MAX_HEAD_DIM + STATE_TAIL) }>::new();
    let values = padded * run.heads.state_values();
    // SAFETY: the caller's promise; all memory has room for the padded rows.
    unsafe {
        round_queries(run, task, rows, query.pointer());
        let tiles = shapes(tile_rows).load();
        let mut merged = State::new(merged.zeroed(values), head_dim);
        let mut next = State::new(next.zeroed(if task.segments.len() > 1 { values } else { 0 }), head_dim);
        for segment in task.segments.clone() {
            let first = segment == task.segments.start;
            attend_segment(run, task, segment, query.pointer(), if first { &mut merged } else { &mut next });
            if !first {
                merged.merge::<Vector>(&next);
            }
        }
        drop(tiles);
        if task.split {
            split.copy_from_slice(&merged.rows(0)[..split.len()]);
            return;
        }
        for row in 0..rows {
            let to = run.at(task, row);
            // Each row and head of the output belongs to one task.
            merged.write(row, run.output.slice(to..to + head_dim));
        }
    }
}

/// Scales the queries of a task and rounds them to tiles of up to 16 pairs.
#[inline(always)]
unsafe fn round_queries(run: &Run<'_, Paired>, task: &Task, rows: usize, to: *mut u32) {
    let head_dim = run.heads.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    for row in 0..rows {
        let from = &run.query[run.at(task, row)..][..head_dim];
        let (tile, member) = (row / TILE, row % TILE);
        let to = to.wrapping_add(tile * TILE * head_dim / 2);
        for (depth, from) in from.chunks(2 * TILE).enumerate() {
            // SAFETY: a chunk has 32 or 16 elements, and the tiles one behind the other have room for them.
            unsafe {
                let scale = Vector::splat(scale);
                let low = Vector::mul(Vector::load(from.as_ptr()), scale);
                let to = to.add(depth * TILE * TILE + member * from.len() / 2);
                if from.len() == 2 * TILE {
                    let high = Vector::mul(Vector::load(from[TILE..].as_ptr()), scale);
                    store_pairs(to, low, high);
                } else {
                    let pairs: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(low));
                    _mm256_storeu_si256(to.cast(), pairs);
                }
            }
        }
    }
}

/// Rounds 32 values to 16 pairs.
#[inline(always)]
unsafe fn store_pairs(to: *mut u32, low: __m512, high: __m512) {
    // SAFETY: the caller has room for them and the instruction set.
    unsafe {
        let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(to.cast(), pairs);
    }
}

/// Attends from the rows of a task to the keys of a segment.
#[inline(always)]
unsafe fn attend_segment(
    run: &Run<'_, Paired>,
    task: &Task,
    segment: usize,
    query: *mut u32,
    state: &mut State<'_>,
) {
    let &super::Heads { head_dim, kv_heads, window, .. } = run.heads;
    let shared = run.heads.shared();
    let rows = task.queries * shared;
    let mut scores = Scratch::<{ TASK_ROWS * GROUP_KEYS }>::new();
    let scores = scores.zeroed(rows.next_multiple_of(rows.min(TILE)) * GROUP_KEYS);
    let mut weights = Pairs::<{ TASK_ROWS * GROUP_PAIRS }>::new();
    let mut last_values = Pairs::<{ BLOCK_PAIRS * MAX_HEAD_DIM }>::new();
    state.clear();
    let visible = task.keys(segment, window);
    for group in visible.start / GROUP_KEYS..visible.end.div_ceil(GROUP_KEYS) {
        let first_key = group * GROUP_KEYS;
        let keys = GROUP_KEYS.min(visible.end - first_key);
        let table = &run.block_tables[task.table_start + first_key / BLOCK_SIZE..];
        let place = |block: u32| block as usize * kv_heads + task.kv_head;
        let mut blocks =
            Blocks::new(run.key_cache, run.value_cache, head_dim, keys, |block| place(table[block]));
        let used = keys.div_ceil(BLOCK_SIZE);
        // SAFETY: the blocks are whole, and all memory has room for whole tiles of the rows.
        unsafe {
            if !keys.is_multiple_of(BLOCK_SIZE) {
                // Behind the last key there may lie anything.
                let values = &mut blocks.values[used - 1];
                *values = without_others(*values, keys % BLOCK_SIZE, head_dim, last_values.pointer());
            }
            for row in (0..rows).step_by(TILE) {
                let query = query.add(row * head_dim / 2);
                score(query, &blocks.keys[..used], scores[row * GROUP_KEYS..].as_mut_ptr(), head_dim);
                for row in row..rows.min(row + TILE) {
                    let scores = &mut scores[row * GROUP_KEYS..(row + 1) * GROUP_KEYS];
                    let position = task.first_position + row / shared;
                    state.soften::<Vector>(row, scores, Visible::new(position, window, first_key));
                    for half in 0..2 {
                        let [low, high] = [0, TILE].map(|at| scores[half * 2 * TILE + at..][..TILE].as_ptr());
                        let to = weights.pointer().add(row * GROUP_PAIRS + half * TILE);
                        store_pairs(to, Vector::load(low), Vector::load(high));
                    }
                }
                let weights = weights.pointer().add(row * GROUP_PAIRS);
                let sums = state.rows(row).as_mut_ptr();
                add_values(weights, &blocks.values[..used], sums, head_dim);
            }
        }
    }
}

/// The values of the first `keys` keys of a block, and zeros in place of the others.
#[inline(always)]
unsafe fn without_others(values: *const Paired, keys: usize, head_dim: usize, to: *mut u32) -> *const Paired {
    let from = values.cast::<u32>();
    for pair in 0..BLOCK_PAIRS {
        // The first of a pair is its low half.
        let kept = [0, 0xffff, u32::MAX][keys.saturating_sub(2 * pair).min(2)];
        for at in pair * head_dim..(pair + 1) * head_dim {
            // SAFETY: a block has `head_dim` words for each pair, and so has `to`; two bfloat16 are aligned as a word,
            // because blocks begin at whole cache lines.
            unsafe { *to.add(at) = *from.add(at) & kept };
        }
    }
    to.cast_const().cast()
}

/// `scores[row, key] = query[row] . key` for a tile of rows and the blocks of a group; rows of scores lie
/// [`GROUP_KEYS`] apart.
#[inline(always)]
unsafe fn score(query: *const u32, keys: &[*const Paired], scores: *mut f32, head_dim: usize) {
    let (whole, pairs) = (head_dim / (2 * TILE), head_dim / 2);
    // SAFETY: the caller gives tiles of queries, whole blocks and memory for the scores.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        for depth in 0..whole {
            let query = query.add(depth * TILE * TILE);
            asm!("tileloadd tmm4, [{} + {} * 1]", in(reg) query, in(reg) ROW_BYTES, options(nostack, readonly));
            for (block, &keys) in keys.iter().enumerate() {
                let keys = keys.cast::<u32>().add(depth * TILE * BLOCK_SIZE);
                with_sums!(block, |sums| asm!(
                    "tileloadd tmm5, [{} + {} * 1]",
                    concat!("tdpbf16ps ", sums!(), ", tmm4, tmm5"),
                    in(reg) keys, in(reg) ROW_BYTES, options(nostack, readonly),
                ));
            }
        }
        if whole * TILE < pairs {
            let query = query.add(whole * TILE * TILE);
            asm!("tileloadd tmm6, [{} + {} * 1]", in(reg) query, in(reg) ROW_BYTES / 2, options(nostack, readonly));
            for (block, &keys) in keys.iter().enumerate() {
                let keys = keys.cast::<u32>().add(whole * TILE * BLOCK_SIZE);
                with_sums!(block, |sums| asm!(
                    "tileloadd tmm7, [{} + {} * 1]",
                    concat!("tdpbf16ps ", sums!(), ", tmm6, tmm7"),
                    in(reg) keys, in(reg) ROW_BYTES, options(nostack, readonly),
                ));
            }
        }
        for block in 0..keys.len() {
            with_sums!(block, |sums| asm!(
                concat!("tilestored [{} + {} * 1], ", sums!()),
                in(reg) scores.add(block * BLOCK_SIZE), in(reg) 4 * GROUP_KEYS, options(nostack),
            ));
        }
    }
}

/// `sums[row] += sum over a group's keys of weight[row, key] * value[key]` for a tile of rows, block after block; rows of
/// sums lie `head_dim + STATE_TAIL` apart.
#[inline(always)]
unsafe fn add_values(weights: *const u32, values: &[*const Paired], sums: *mut f32, head_dim: usize) {
    let stride = 4 * (head_dim + STATE_TAIL);
    for first in (0..head_dim).step_by(GROUP_BLOCKS * TILE) {
        let columns = (head_dim - first).div_ceil(TILE).min(GROUP_BLOCKS);
        // SAFETY: the caller gives whole blocks and rows of weights and sums.
        unsafe {
            for column in 0..columns {
                with_sums!(column, |sum| asm!(
                    concat!("tileloadd ", sum!(), ", [{} + {} * 1]"),
                    in(reg) sums.add(first + column * TILE), in(reg) stride, options(nostack, readonly),
                ));
            }
            for (block, &values) in values.iter().enumerate() {
                let weights = weights.add(block * BLOCK_PAIRS);
                asm!("tileloadd tmm6, [{} + {} * 1]", in(reg) weights, in(reg) 4 * GROUP_PAIRS, options(nostack, readonly));
                for column in 0..columns {
                    let values = values.cast::<u32>().add(first + column * TILE);
                    with_sums!(column, |sum| asm!(
                        "tileloadd tmm7, [{} + {} * 1]",
                        concat!("tdpbf16ps ", sum!(), ", tmm6, tmm7"),
                        in(reg) values, in(reg) 4 * head_dim, options(nostack, readonly),
                    ));
                }
            }
            for column in 0..columns {
                with_sums!(column, |sum| asm!(
                    concat!("tilestored [{} + {} * 1], ", sum!()),
                    in(reg) sums.add(first + column * TILE), in(reg) stride, options(nostack),
                ));
            }
        }
    }
}
