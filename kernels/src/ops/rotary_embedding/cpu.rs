//! The rotation and the cache write on the CPU, row after row: a few microseconds of a step.

use super::{Args, RotaryEmbedding};
use crate::device::cpu::{Cpu, CpuBuffer, CpuIndices};
use crate::error::KernelError;
use crate::ops::paged_attention::{BLOCK_SIZE, key_offset, value_offset};

impl RotaryEmbedding for Cpu {
    fn rotary_embedding(&self, args: Args<'_, CpuBuffer, CpuIndices>) -> Result<(), KernelError> {
        args.check()?;
        let Args { kv_heads, head_dim, .. } = args;
        let half = head_dim / 2;
        for row in 0..args.rows {
            let position = args.positions[row] as usize;
            let cosines = &args.cosines[position * half..(position + 1) * half];
            let sines = &args.sines[position * half..(position + 1) * half];
            let query_width = args.heads * head_dim;
            let key_range = row * kv_heads * head_dim..(row + 1) * kv_heads * head_dim;
            rotate(&mut args.query[row * query_width..(row + 1) * query_width], cosines, sines);
            rotate(&mut args.key[key_range.clone()], cosines, sines);

            let slot = args.slots[row] as usize;
            let (block, offset) = (slot / BLOCK_SIZE, slot % BLOCK_SIZE);
            let keys = args.key[key_range.clone()].chunks_exact(head_dim);
            let values = args.value[key_range].chunks_exact(head_dim);
            for (head, (key, value)) in keys.zip(values).enumerate() {
                let key_start = key_offset(block, head, kv_heads, head_dim) + offset;
                let cached = args.key_cache[key_start..].iter_mut().step_by(BLOCK_SIZE);
                for (cached, &key) in cached.zip(key) {
                    *cached = key;
                }
                let value_start = value_offset(block, head, kv_heads, head_dim) + offset * head_dim;
                args.value_cache[value_start..value_start + head_dim].copy_from_slice(value);
            }
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
