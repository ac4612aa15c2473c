use half::bf16;

use super::{Args, BLOCK_SIZE, PagedAttention, cache_elements, reference};
use crate::backend::Activations;
use crate::backend::Device;
use crate::device::cpu::{Cpu, CpuCache, InstructionSet};
use crate::ops::rotary_embedding::{self, RotaryEmbedding};
use crate::testing::{random, upload};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;

/// Keys and values of one sequence of `tokens` tokens, and a cache that holds them in scattered blocks.
struct World {
    head_dim: usize,
    query: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    key_cache: CpuCache,
    value_cache: CpuCache,
    block_table: Vec<u32>,
}

impl World {
    fn new(cpu: &Cpu, tokens: usize, head_dim: usize) -> Self {
        let used = tokens.div_ceil(BLOCK_SIZE);
        let blocks = 2 * used + 1;
        let block_table: Vec<u32> = (0..used as u32).rev().map(|block| 2 * block + 1).collect();
        let query = random(tokens * HEADS * head_dim, 1).iter().map(|value| value * 4.0).collect();
        // Half precision and bfloat16 hold them exactly.
        let rounded = |seed| -> Vec<f32> {
            let values = random(tokens * KV_HEADS * head_dim, seed);
            values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
        };
        let (keys, values) = (rounded(2), rounded(3));
        // What lies in blocks and slots of others must not matter, not even when it is not a number.
        let elements = cache_elements(blocks, KV_HEADS, head_dim);
        let (mut key_cache, mut value_cache) = (cpu.cache(elements).unwrap(), cpu.cache(elements).unwrap());
        cpu.write_cache(&vec![f32::NAN; elements], &mut key_cache).unwrap();
        cpu.write_cache(&vec![f32::NAN; elements], &mut value_cache).unwrap();
        let slots: Vec<u32> = (0..tokens)
            .map(|token| block_table[token / BLOCK_SIZE] * BLOCK_SIZE as u32 + (token % BLOCK_SIZE) as u32)
            .collect();
        let mut indices = [cpu.indices(tokens).unwrap(), cpu.indices(tokens).unwrap()];
        cpu.write_indices(&vec![0; tokens], &mut indices[0]).unwrap();
        cpu.write_indices(&slots, &mut indices[1]).unwrap();
        // Turned by an angle of 0.
        cpu.rotary_embedding(rotary_embedding::Args {
            query: &mut cpu.buffer(tokens * KV_HEADS * head_dim).unwrap(),
            key: &mut upload(cpu, &keys),
            value: &upload(cpu, &values),
            cosines: &upload(cpu, &vec![1.0; head_dim / 2]),
            sines: &upload(cpu, &vec![0.0; head_dim / 2]),
            positions: &indices[0],
            slots: &indices[1],
            key_cache: &mut key_cache,
            value_cache: &mut value_cache,
            rows: tokens,
            heads: KV_HEADS,
            kv_heads: KV_HEADS,
            head_dim,
        })
        .unwrap();
        Self { head_dim, query, keys, values, key_cache, value_cache, block_table }
    }

    /// Attention of tokens `first..first + rows`, as `copies` sequences at once.
    fn attend(&self, cpu: &Cpu, first: usize, rows: usize, copies: usize, window: usize) -> Vec<f32> {
        let width = HEADS * self.head_dim;
        let queries = self.query[first * width..(first + rows) * width].repeat(copies);
        let words: Vec<u32> =
            (0..copies).flat_map(|copy| [(copy * rows) as u32, rows as u32, first as u32, 0]).collect();
        let mut sequences = cpu.indices(words.len()).unwrap();
        cpu.write_indices(&words, &mut sequences).unwrap();
        let mut block_tables = cpu.indices(self.block_table.len()).unwrap();
        cpu.write_indices(&self.block_table, &mut block_tables).unwrap();
        let mut output = cpu.buffer(copies * rows * width).unwrap();
        cpu.paged_attention(Args {
            query: &upload(cpu, &queries),
            key_cache: &self.key_cache,
            value_cache: &self.value_cache,
            sequences: &sequences,
            block_tables: &block_tables,
            output: &mut output,
            sequence_count: copies,
            rows: copies * rows,
            longest: first + rows,
            longest_rows: rows,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: self.head_dim,
            window,
        })
        .unwrap();
        output.to_vec()
    }
}

/// Every instruction set, with caches of either type.
fn devices() -> impl Iterator<Item = (Cpu, String)> {
    InstructionSet::available().into_iter().flat_map(|set| {
        [Activations::Float, Activations::Integer].map(|activations| {
            let cpu = Cpu::with_instruction_set(2, set).with_activations(activations);
            (cpu, format!("{set:?} {activations:?}"))
        })
    })
}

#[test]
fn every_instruction_set_agrees_with_the_reference() {
    for (cpu, device) in devices() {
        let tiles = cpu.instruction_set() == InstructionSet::Amx && cpu.activations() == Activations::Integer;
        for (tokens, head_dim, window) in [
            (1, 64, usize::MAX),
            (16, 16, usize::MAX),
            (75, 80, usize::MAX),
            (75, 64, 20),
            (60, 128, 1),
            (300, 32, usize::MAX),
            (530, 16, 260),
        ] {
            let world = World::new(&cpu, tokens, head_dim);
            let output = world.attend(&cpu, 0, tokens, 1, window);
            let head = |source: &[f32], token: usize, heads: usize, head: usize| {
                source[(token * heads + head) * head_dim..][..head_dim].to_vec()
            };
            for token in (0..tokens).step_by(tokens.div_ceil(80)).chain([tokens - 1]) {
                let first = (token + 1).saturating_sub(window);
                for index in 0..HEADS {
                    let kv_head = index / (HEADS / KV_HEADS);
                    let keys: Vec<f32> =
                        (first..=token).flat_map(|key| head(&world.keys, key, KV_HEADS, kv_head)).collect();
                    let values: Vec<f32> =
                        (first..=token).flat_map(|key| head(&world.values, key, KV_HEADS, kv_head)).collect();
                    let expected =
                        reference::attention(&head(&world.query, token, HEADS, index), &keys, &values);
                    let found = head(&output, token, HEADS, index);
                    // Tiles round queries and weights to bfloat16.
                    let tolerance = if tiles { 2e-2 } else { 3e-6 };
                    for (found, expected) in found.iter().zip(expected) {
                        assert!(
                            (found - expected).abs() < tolerance,
                            "{device} {tokens} {head_dim} {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_in_any_chunk_and_any_batch() {
    for (cpu, device) in devices() {
        // Alone, a query of the longer one is split into three segments; with many copies it is not.
        for (tokens, head_dim, window, chunks, copies) in [
            (70, 64, usize::MAX, &[1, 5, 16, 33][..], 3),
            (70, 64, 23, &[1, 5, 16, 33], 3),
            (600, 16, usize::MAX, &[1, 100], 1),
            (600, 16, usize::MAX, &[1], 5),
            (600, 16, 300, &[1, 7], 1),
        ] {
            let world = World::new(&cpu, tokens, head_dim);
            let width = HEADS * head_dim;
            let whole = world.attend(&cpu, 0, tokens, 1, window);
            for &chunk in chunks {
                for first in (0..tokens).step_by(chunk.max(tokens / 70 / chunk * chunk)) {
                    let rows = chunk.min(tokens - first);
                    let part = world.attend(&cpu, first, rows, copies, window);
                    let expected = whole[first * width..(first + rows) * width].repeat(copies);
                    assert_eq!(part, expected, "{device} {tokens} chunk {chunk} first {first}");
                }
            }
        }
    }
}

#[test]
fn unsupported_heads_are_refused_by_name() {
    for (heads, kv_heads, head_dim, name) in
        [(6, 4, 64, "heads"), (6, 2, 60, "head_dim"), (6, 2, 272, "head_dim"), (98, 2, 64, "heads")]
    {
        let message = super::check_heads(heads, kv_heads, head_dim).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}
