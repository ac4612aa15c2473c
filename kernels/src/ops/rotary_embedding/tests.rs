use super::{Args, RotaryEmbedding};
use crate::backend::{Activations, Device};
use crate::device::cpu::{Cpu, InstructionSet};
use crate::ops::paged_attention::{BLOCK_SIZE, key_offset, value_offset};
use crate::testing::{random, upload};

#[test]
fn rotates_by_the_angle_of_the_position_and_fills_the_slot() {
    for set in InstructionSet::available() {
        for head_dim in [8, 48, 128] {
            for activations in [Activations::Float, Activations::Integer] {
                let cpu = Cpu::with_instruction_set(1, set).with_activations(activations);
                check(&cpu, head_dim);
            }
        }
    }
}

fn check(cpu: &Cpu, head_dim: usize) {
    let (rows, heads, kv_heads, blocks) = (3, 4, 2, 3);
    let half = head_dim / 2;
    let angle = |position: usize, index: usize| position as f32 * 0.3 / (index + 1) as f32;
    let table = |function: fn(f32) -> f32| -> Vec<f32> {
        (0..64 * half).map(|index| function(angle(index / half, index % half))).collect()
    };
    let (query, key) = (random(rows * heads * head_dim, 1), random(rows * kv_heads * head_dim, 2));
    let value = random(rows * kv_heads * head_dim, 3);
    let (positions, slots) = ([0u32, 5, 63], [17u32, 2, 47]);
    let mut rotated_query = upload(cpu, &query);
    let mut rotated_key = upload(cpu, &key);
    let mut key_cache = cpu.cache(blocks * kv_heads * head_dim * BLOCK_SIZE).unwrap();
    let mut value_cache = cpu.cache(blocks * kv_heads * head_dim * BLOCK_SIZE).unwrap();
    let (mut position_indices, mut slot_indices) = (cpu.indices(rows).unwrap(), cpu.indices(rows).unwrap());
    cpu.write_indices(&positions, &mut position_indices).unwrap();
    cpu.write_indices(&slots, &mut slot_indices).unwrap();
    cpu.rotary_embedding(Args {
        query: &mut rotated_query,
        key: &mut rotated_key,
        value: &upload(cpu, &value),
        cosines: &upload(cpu, &table(f32::cos)),
        sines: &upload(cpu, &table(f32::sin)),
        positions: &position_indices,
        slots: &slot_indices,
        key_cache: &mut key_cache,
        value_cache: &mut value_cache,
        rows,
        heads,
        kv_heads,
        head_dim,
    })
    .unwrap();
    let expected = |source: &[f32], first: usize, position: u32, element: usize| {
        let index = element % half;
        let angle = f64::from(angle(position as usize, index));
        let (lower, upper) = (f64::from(source[first + index]), f64::from(source[first + index + half]));
        if element < half {
            lower * angle.cos() - upper * angle.sin()
        } else {
            upper * angle.cos() + lower * angle.sin()
        }
    };
    for row in 0..rows {
        for element in 0..heads * head_dim {
            let first = row * heads * head_dim + element / head_dim * head_dim;
            let wanted = expected(&query, first, positions[row], element % head_dim);
            assert!((f64::from(rotated_query[row * heads * head_dim + element]) - wanted).abs() < 1e-6);
        }
        let (block, offset) = (slots[row] as usize / BLOCK_SIZE, slots[row] as usize % BLOCK_SIZE);
        for head in 0..kv_heads {
            let first = (row * kv_heads + head) * head_dim;
            for element in 0..head_dim {
                let wanted = expected(&key, first, positions[row], element);
                let start = key_offset(block, head, kv_heads, head_dim);
                let cached = key_cache.key(start, offset, element);
                let tolerance = 1e-6 + (key_cache.rounded(wanted as f32) - wanted as f32).abs() * 1.01;
                assert!((f64::from(cached) - wanted).abs() < f64::from(tolerance));
                let start = value_offset(block, head, kv_heads, head_dim);
                let cached = value_cache.value(start, offset, element, head_dim);
                assert_eq!(cached, value_cache.rounded(value[first + element]));
            }
        }
    }
}
