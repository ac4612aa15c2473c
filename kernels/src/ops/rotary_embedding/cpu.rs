//! The rotation and the cache write on the CPU, key head after key head, each with its queries.

use super::{Args, RotaryEmbedding};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices, DisjointSlices};
use crate::error::KernelError;
use crate::ops::paged_attention::{BLOCK_SIZE, key_offset, value_offset};

/// From this many rows on threads share the work: fewer are done before another thread hears of them.
const SHARED_ROWS: usize = 16;

impl RotaryEmbedding for Cpu {
    fn rotary_embedding(&self, args: Args<'_, CpuBuffer, CpuIndices>) -> Result<(), KernelError> {
        args.check()?;
        let Args { heads, kv_heads, head_dim, rows, value, cosines, sines, positions, slots, .. } = args;
        let half = head_dim / 2;
        let (query, key) = (DisjointSlices::new(args.query), DisjointSlices::new(args.key));
        let (key_cache, value_cache) =
            (DisjointSlices::new(args.key_cache), DisjointSlices::new(args.value_cache));
        // One key head and the query heads that go with it, for every row.
        let head_of_every_row = |head: usize| {
            for row in 0..rows {
                let position = positions[row] as usize;
                let cosines = &cosines[position * half..(position + 1) * half];
                let sines = &sines[position * half..(position + 1) * half];
                let from = row * kv_heads + head;
                let first_query = (row * heads + head * heads / kv_heads) * head_dim;
                let last_query = (row * heads + (head + 1) * heads / kv_heads) * head_dim;
                let (block, offset) = (slots[row] as usize / BLOCK_SIZE, slots[row] as usize % BLOCK_SIZE);
                let key_start = key_offset(block, head, kv_heads, head_dim) + offset;
                let value_start = value_offset(block, head, kv_heads, head_dim) + offset * head_dim;
                // SAFETY: queries, keys, values and places in the cache of different key heads are disjoint.
                unsafe {
                    rotate(query.slice(first_query..last_query), cosines, sines);
                    let key = key.slice(from * head_dim..(from + 1) * head_dim);
                    rotate(key, cosines, sines);
                    for (at, &key) in key.iter().enumerate() {
                        let at = key_start + at * BLOCK_SIZE;
                        key_cache.slice(at..at + 1)[0] = key;
                    }
                    let value = &value[from * head_dim..(from + 1) * head_dim];
                    value_cache.slice(value_start..value_start + head_dim).copy_from_slice(value);
                }
            }
        };
        if rows < SHARED_ROWS {
            (0..kv_heads).for_each(head_of_every_row);
        } else {
            self.pool().run(kv_heads, &head_of_every_row);
        }
        Ok(())
    }
}

/// Rotates every head of a row.
fn rotate(row: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let half = cosines.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (lower, upper) = head.split_at_mut(half);
        for (((lower, upper), cos), sin) in lower.iter_mut().zip(upper).zip(cosines).zip(sines) {
            (*lower, *upper) = (*lower * cos - *upper * sin, *upper * cos + *lower * sin);
        }
    }
}
