//! The two products of attention, for a few query rows and a group of blocks: queries times keys, weights times values.
//! Each element has an accumulator of its own that takes its terms in order, whatever the number of rows.

use std::mem::MaybeUninit;

use super::super::{BLOCK_SIZE, MAX_HEAD_DIM};
use super::softmax::STATE_TAIL;
use crate::device::cpu::cache::CacheElement;
use crate::device::cpu::simd::Simd;
use crate::device::cpu::tile::{Columns, Rows, tile};

/// Blocks that share one step of the running softmax: the keys from multiples of [`GROUP_KEYS`] on, whatever the batch.
pub(super) const GROUP_BLOCKS: usize = 4;
pub(super) const GROUP_KEYS: usize = GROUP_BLOCKS * BLOCK_SIZE;

/// The keys and values of a group of blocks.
pub(super) struct Blocks<E> {
    pub(super) keys: [*const E; GROUP_BLOCKS],
    pub(super) values: [*const E; GROUP_BLOCKS],
}

impl<E> Blocks<E> {
    /// The blocks of the first `keys` keys of a group, which lie where `place` says; places behind them repeat the last
    /// one.
    pub(super) fn new(
        key_cache: &[E],
        value_cache: &[E],
        head_dim: usize,
        keys: usize,
        place: impl Fn(usize) -> usize,
    ) -> Self {
        let last = (keys - 1) / BLOCK_SIZE;
        let size = head_dim * BLOCK_SIZE;
        let part = |cache: &[E], index: usize| cache[place(index.min(last)) * size..][..size].as_ptr();
        Self {
            keys: std::array::from_fn(|index| part(key_cache, index)),
            values: std::array::from_fn(|index| part(value_cache, index)),
        }
    }
}

/// The keys and values of a group as `f32`, for rows that share them.
pub(super) struct Widened {
    keys: [MaybeUninit<f32>; GROUP_KEYS * MAX_HEAD_DIM],
    values: [MaybeUninit<f32>; GROUP_KEYS * MAX_HEAD_DIM],
}

impl Widened {
    pub(super) fn new() -> Self {
        let empty = [const { MaybeUninit::uninit() }; GROUP_KEYS * MAX_HEAD_DIM];
        Self { keys: empty, values: empty }
    }

    /// Widens `blocks`.
    ///
    /// # Safety
    /// The blocks are whole, and the instruction set of `S` is available.
    #[inline(always)]
    pub(super) unsafe fn fill<S: Simd, E: CacheElement>(
        &mut self,
        blocks: &Blocks<E>,
        head_dim: usize,
    ) -> Blocks<f32> {
        let size = head_dim * BLOCK_SIZE;
        let mut wide =
            Blocks { keys: [std::ptr::null(); GROUP_BLOCKS], values: [std::ptr::null(); GROUP_BLOCKS] };
        let sides = [
            (&blocks.keys, &mut self.keys, &mut wide.keys),
            (&blocks.values, &mut self.values, &mut wide.values),
        ];
        for (from, to, wide) in sides {
            for (index, (from, wide)) in from.iter().zip(wide).enumerate() {
                let to = to[index * size..][..size].as_mut_ptr().cast::<f32>();
                for at in (0..size).step_by(S::WIDTH) {
                    // SAFETY: a block is whole vectors, and `to` was cut to its size.
                    unsafe { S::store(to.add(at), E::load::<S>(from.add(at))) };
                }
                *wide = to.cast_const();
            }
        }
        wide
    }
}

/// Columns in vectors that each lie somewhere else, `BLOCK_SIZE` elements from one depth to the next.
#[derive(Clone, Copy)]
struct KeyColumns<E, const V: usize>([*const E; V]);

impl<S: Simd, E: CacheElement, const V: usize> Columns<S> for KeyColumns<E, V> {
    #[inline(always)]
    unsafe fn load(self, depth: usize, step: usize, vector: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { E::load::<S>(self.0[vector].add((depth + step) * BLOCK_SIZE)) }
    }
}

/// `scores[row, j] = query[row] . key[j]` for M rows and the keys of a group.
///
/// # Safety
/// The blocks are whole, and the instruction set of `S` is available.
#[inline(always)]
pub(super) unsafe fn score<S: Simd, E: CacheElement, const M: usize>(
    query: &[f32],
    keys: &[*const E; GROUP_BLOCKS],
    scores: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if S::WIDTH == BLOCK_SIZE {
            score_vectors::<S, E, M, 4>(query, keys, scores);
        } else {
            score_vectors::<S, E, M, 2>(query, keys, scores);
        }
    }
}

#[inline(always)]
unsafe fn score_vectors<S: Simd, E: CacheElement, const M: usize, const V: usize>(
    query: &[f32],
    keys: &[*const E; GROUP_BLOCKS],
    scores: &mut [f32],
) {
    let head_dim = query.len() / M;
    let rows = Rows { from: query.as_ptr(), stride: head_dim };
    for first in (0..GROUP_KEYS).step_by(V * S::WIDTH) {
        // SAFETY: there are M rows of queries and scores, and each block holds head_dim rows of 16 keys.
        unsafe {
            let mut columns = [std::ptr::null(); V];
            for (vector, columns) in columns.iter_mut().enumerate() {
                let key = first + vector * S::WIDTH;
                *columns = keys[key / BLOCK_SIZE].add(key % BLOCK_SIZE);
            }
            let tile = tile::<S, _, M, V>(rows, KeyColumns(columns), head_dim);
            for (member, values) in tile.into_iter().enumerate() {
                for (vector, value) in values.into_iter().enumerate() {
                    let to = member * GROUP_KEYS + first + vector * S::WIDTH;
                    S::store(scores.as_mut_ptr().add(to), value);
                }
            }
        }
    }
}

/// `sums[row] += sum over the group's first `keys` keys of weight[row, j] * value[j]`, key after key; rows of sums lie
/// `head_dim + STATE_TAIL` apart.
///
/// # Safety
/// The blocks are whole, `sums` has the rows, and the instruction set of `S` is available.
#[inline(always)]
pub(super) unsafe fn add_values<S: Simd, E: CacheElement, const M: usize>(
    weights: &[f32],
    values: &[*const E; GROUP_BLOCKS],
    keys: usize,
    sums: &mut [f32],
    head_dim: usize,
) {
    let mut column = 0;
    // SAFETY: columns below `head_dim` only; the rest is the caller's promise.
    unsafe {
        if S::WIDTH == BLOCK_SIZE {
            while column + 4 * S::WIDTH <= head_dim {
                add_columns::<S, E, M, 4>(weights, values, keys, sums, head_dim, column);
                column += 4 * S::WIDTH;
            }
        }
        while column + 2 * S::WIDTH <= head_dim {
            add_columns::<S, E, M, 2>(weights, values, keys, sums, head_dim, column);
            column += 2 * S::WIDTH;
        }
        while column < head_dim {
            add_columns::<S, E, M, 1>(weights, values, keys, sums, head_dim, column);
            column += S::WIDTH;
        }
    }
}

/// The same for V vectors of values from `column` on.
#[inline(always)]
unsafe fn add_columns<S: Simd, E: CacheElement, const M: usize, const V: usize>(
    weights: &[f32],
    values: &[*const E; GROUP_BLOCKS],
    keys: usize,
    sums: &mut [f32],
    head_dim: usize,
    column: usize,
) {
    let stride = head_dim + STATE_TAIL;
    let sums = sums[..(M - 1) * stride + head_dim].as_mut_ptr();
    // SAFETY: there are M rows of weights and sums, each block holds 16 values of head_dim, a multiple of the width.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; M];
        for (member, acc) in acc.iter_mut().enumerate() {
            for (vector, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.add(member * stride + column + vector * S::WIDTH));
            }
        }
        for key in 0..keys {
            let value = values[key / BLOCK_SIZE].add(key % BLOCK_SIZE * head_dim + column);
            let mut of_key = [S::splat(0.0); V];
            for (vector, of_key) in of_key.iter_mut().enumerate() {
                *of_key = E::load::<S>(value.add(vector * S::WIDTH));
            }
            for (member, acc) in acc.iter_mut().enumerate() {
                let weight = S::splat(*weights.as_ptr().add(member * GROUP_KEYS + key));
                for (acc, of_key) in acc.iter_mut().zip(of_key) {
                    *acc = S::multiply_add(weight, of_key, *acc);
                }
            }
        }
        for (member, acc) in acc.into_iter().enumerate() {
            for (vector, acc) in acc.into_iter().enumerate() {
                S::store(sums.add(member * stride + column + vector * S::WIDTH), acc);
            }
        }
    }
}
