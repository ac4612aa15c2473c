//! The rotation and the cache write on the CPU: a task is a key head with its queries, of some rows.

use std::ops::Range;

use super::{Args, RotaryEmbedding};
use crate::device::cpu::cache::{CacheElement, CacheValues, CpuCache};
use crate::device::cpu::simd::{Simd, dispatch};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices, DisjointSlices};
use crate::error::KernelError;
use crate::ops::paged_attention::{BLOCK_SIZE, key_offset, value_offset};

/// Rows of a task. From as many on threads share the work: fewer are done before another thread hears of them.
const TASK_ROWS: usize = 16;
/// Elements of a key or value that are rounded before they are scattered.
const ROUNDED: usize = 64;

impl RotaryEmbedding for Cpu {
    fn rotary_embedding(&self, args: Args<'_, CpuBuffer, CpuIndices, CpuCache>) -> Result<(), KernelError> {
        args.check()?;
        let Args { query, key, value, cosines, sines, positions, slots, key_cache, value_cache, .. } = args;
        let Args { rows, heads, kv_heads, head_dim, .. } = args;
        let rotation = Rotation {
            query: DisjointSlices::new(query),
            key: DisjointSlices::new(key),
            value,
            cosines,
            sines,
            positions,
            slots,
            rows,
            heads,
            kv_heads,
            head_dim,
        };
        match (&mut key_cache.0, &mut value_cache.0) {
            (CacheValues::F32(keys), CacheValues::F32(values)) => {
                rotate_and_write(self, &rotation, keys, values);
            }
            (CacheValues::F16(keys), CacheValues::F16(values)) => {
                rotate_and_write(self, &rotation, keys, values);
            }
            (CacheValues::Pairs(keys), CacheValues::Pairs(values)) => {
                rotate_and_write(self, &rotation, keys, values);
            }
            _ => {
                let requirement = "must be of the element type of the keys";
                return KernelError::require(
                    false,
                    "rotary_embedding",
                    "value_cache",
                    "another",
                    requirement,
                );
            }
        }
        Ok(())
    }
}

/// What the tasks share, but for the caches.
struct Rotation<'a> {
    query: DisjointSlices<'a>,
    key: DisjointSlices<'a>,
    value: &'a [f32],
    cosines: &'a [f32],
    sines: &'a [f32],
    positions: &'a [u32],
    slots: &'a [u32],
    rows: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// The caches of a layer.
struct Caches<'a, E> {
    keys: DisjointSlices<'a, E>,
    values: DisjointSlices<'a, E>,
}

fn rotate_and_write<E: CacheElement>(cpu: &Cpu, rotation: &Rotation<'_>, keys: &mut [E], values: &mut [E]) {
    let caches = &Caches { keys: DisjointSlices::new(keys), values: DisjointSlices::new(values) };
    let set = cpu.instruction_set();
    let tasks = rotation.kv_heads * rotation.rows.div_ceil(TASK_ROWS);
    let task = |task: usize| {
        let first = task / rotation.kv_heads * TASK_ROWS;
        let part = Part { head: task % rotation.kv_heads, rows: first..rotation.rows.min(first + TASK_ROWS) };
        // SAFETY: the set was detected; each task has a head and rows of its own, and each row a slot.
        unsafe {
            dispatch!(set, <E: CacheElement> rotate_head(
                rotation: &Rotation<'_>,
                caches: &Caches<'_, E>,
                part: Part,
            ));
        }
    };
    if rotation.rows < TASK_ROWS {
        (0..tasks).for_each(task);
    } else {
        cpu.pool().run(tasks, &task);
    }
}

/// A key head and some rows.
struct Part {
    head: usize,
    rows: Range<usize>,
}

/// A key head and the query heads that go with it, for some rows.
///
/// # Safety
/// The instruction set of `S` is available, and no other thread has this head of these rows.
#[inline(always)]
unsafe fn rotate_head<S: Simd, E: CacheElement>(rotation: &Rotation<'_>, caches: &Caches<'_, E>, part: Part) {
    let &Rotation { heads, kv_heads, head_dim, .. } = rotation;
    let Part { head, rows } = part;
    let half = head_dim / 2;
    for row in rows {
        let position = rotation.positions[row] as usize;
        let cosines = &rotation.cosines[position * half..(position + 1) * half];
        let sines = &rotation.sines[position * half..(position + 1) * half];
        let from = (row * kv_heads + head) * head_dim;
        let first_query = (row * heads + head * heads / kv_heads) * head_dim;
        let last_query = (row * heads + (head + 1) * heads / kv_heads) * head_dim;
        let slot = rotation.slots[row] as usize;
        let (block, offset) = (slot / BLOCK_SIZE, slot % BLOCK_SIZE);
        let key_start = key_offset(block, head, kv_heads, head_dim);
        let value_start = value_offset(block, head, kv_heads, head_dim);
        // SAFETY: queries, keys, values and places in the cache of different key heads and rows are disjoint.
        unsafe {
            rotate(rotation.query.slice(first_query..last_query), cosines, sines);
            let key = rotation.key.slice(from..from + head_dim);
            rotate(key, cosines, sines);
            scatter::<S, E>(key, &caches.keys, |element| key_start + E::key_at(offset, element));
            let value = &rotation.value[from..from + head_dim];
            let place = |element| value_start + E::value_at(offset, element, head_dim);
            if E::PAIRED {
                scatter::<S, E>(value, &caches.values, place);
            } else {
                round::<S, E>(value, caches.values.slice(place(0)..place(0) + head_dim));
            }
        }
    }
}

/// Rounds `values` to the places that `place` gives them.
///
/// # Safety
/// No other thread has those places, and the instruction set of `S` is available.
#[inline(always)]
unsafe fn scatter<S: Simd, E: CacheElement>(
    values: &[f32],
    to: &DisjointSlices<'_, E>,
    place: impl Fn(usize) -> usize,
) {
    for (part, values) in values.chunks(ROUNDED).enumerate() {
        let mut rounded = [E::round(0.0); ROUNDED];
        // SAFETY: the caller's promise.
        unsafe {
            round::<S, E>(values, &mut rounded);
            for (at, &rounded) in rounded[..values.len()].iter().enumerate() {
                let at = place(part * ROUNDED + at);
                to.slice(at..at + 1)[0] = rounded;
            }
        }
    }
}

/// Rotates every head of a row.
#[inline(always)]
fn rotate(row: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let half = cosines.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (lower, upper) = head.split_at_mut(half);
        for (((lower, upper), cos), sin) in lower.iter_mut().zip(upper).zip(cosines).zip(sines) {
            (*lower, *upper) = (*lower * cos - *upper * sin, *upper * cos + *lower * sin);
        }
    }
}

#[inline(always)]
unsafe fn round<S: Simd, E: CacheElement>(from: &[f32], to: &mut [E]) {
    let whole = from.len() - from.len() % S::WIDTH;
    for at in (0..whole).step_by(S::WIDTH) {
        // SAFETY: below the common length.
        unsafe { E::store::<S>(to.as_mut_ptr().add(at), S::load(from.as_ptr().add(at))) };
    }
    for (to, &from) in to[whole..].iter_mut().zip(&from[whole..]) {
        *to = E::round(from);
    }
}
