//! What every device must show: attention with probabilities that may be rounded, and rows that depend neither on others
//! nor on how their sequence was cut. Caches are filled by the device's own `rotary_embedding`, with angles of zero.

use super::{Args, BLOCK_SIZE, PagedAttention, cache_elements, reference};
use crate::check::{Checker, random};
use crate::error::KernelError;
use crate::ops::rotary_embedding::{self, RotaryEmbedding};

const NAME: &str = "paged_attention";
/// Query rows of a sequence that are compared: a few are enough of what takes the reference long.
const COMPARED: usize = 12;

/// Heads, and the window.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
}

/// Query rows and keys of each sequence of a step.
type Sequences = &'static [(usize, usize)];

const ALL: usize = usize::MAX;

const CASES: [(Shape, Sequences); 9] = [
    (shape(64, 8, 128, ALL), &[(1, 1), (1, 17), (1, 300), (1, 1024), (1, 4097)]),
    (shape(32, 8, 128, ALL), &[(1, 513), (70, 70), (1, 16), (33, 600)]),
    (shape(64, 8, 128, ALL), &[(200, 200)]),
    (shape(9, 3, 64, ALL), &[(1, 40), (64, 1100)]),
    (shape(14, 2, 64, ALL), &[(1, 2050), (20, 20)]),
    (shape(4, 4, 80, ALL), &[(1, 100), (50, 50)]),
    (shape(8, 2, 256, ALL), &[(1, 600), (10, 100)]),
    (shape(32, 8, 128, 64), &[(1, 1000), (100, 300), (1, 20)]),
    (shape(4, 2, 16, 1), &[(1, 33), (40, 40)]),
];

const fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: usize) -> Shape {
    Shape { heads, kv_heads, head_dim, window }
}

pub(crate) fn check<D: PagedAttention + RotaryEmbedding>(
    checker: &mut Checker<'_, D>,
) -> Result<(), KernelError> {
    for (shape, sequences) in CASES {
        let world = World::new(checker, shape, sequences)?;
        let whole = world.attend(checker, &(0..sequences.len()).collect::<Vec<_>>(), 0)?;
        let (found, expected) = world.reference(&whole);
        let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let allowed =
            |expected: f32, roundoff: f32| 1.05 * roundoff * expected.abs() + 2.0 * roundoff * largest + 2e-6;
        let Shape { heads, kv_heads, head_dim, window } = shape;
        let window = if window == ALL { String::new() } else { format!(", window {window}") };
        let name = format!("{heads}/{kv_heads} x {head_dim}, {sequences:?}{window}");
        let roundoff = checker.roundoff;
        checker.compare(NAME, name.clone(), (&found, &expected), |expected| allowed(expected, roundoff));
        for (sequence, rows) in world.rows.iter().enumerate() {
            let width = heads * head_dim;
            let alone = world.attend(checker, &[sequence], 0)?;
            let of_whole = &whole[rows.start * width..rows.end * width];
            checker.same_bits(NAME, format!("{name}: sequence {sequence} alone"), &alone, of_whole);
            let last = world.attend(checker, &[sequence], rows.len() - 1)?;
            let of_whole = &whole[(rows.end - 1) * width..rows.end * width];
            checker.same_bits(NAME, format!("{name}: last row of sequence {sequence}"), &last, of_whole);
        }
    }
    Ok(())
}

/// Sequences whose keys lie in the cache, in scattered blocks.
struct World<D: PagedAttention> {
    shape: Shape,
    /// Keys of each sequence.
    tokens: Vec<usize>,
    /// Query rows of each sequence among those of all.
    rows: Vec<std::ops::Range<usize>>,
    /// Keys of each sequence among those of all.
    first_keys: Vec<usize>,
    block_tables: Vec<Vec<u32>>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    key_cache: D::Cache,
    value_cache: D::Cache,
}

impl<D: PagedAttention + RotaryEmbedding> World<D> {
    fn new(checker: &Checker<'_, D>, shape: Shape, sequences: Sequences) -> Result<Self, KernelError> {
        let Shape { heads, kv_heads, head_dim, .. } = shape;
        let tokens: Vec<usize> = sequences.iter().map(|&(_, tokens)| tokens).collect();
        let (mut rows, mut first_keys, mut all_rows, mut all_keys) = (Vec::new(), Vec::new(), 0, 0);
        let (mut block_tables, mut slots, mut blocks) = (Vec::new(), Vec::new(), 0);
        for &(query_rows, tokens) in sequences {
            rows.push(all_rows..all_rows + query_rows);
            first_keys.push(all_keys);
            (all_rows, all_keys) = (all_rows + query_rows, all_keys + tokens);
            // Every second block belongs to nobody; a sequence's blocks lie backwards.
            let used = tokens.div_ceil(BLOCK_SIZE) as u32;
            let table: Vec<u32> = (0..used).rev().map(|block| 2 * (blocks + block) + 1).collect();
            let slot =
                |token: usize| table[token / BLOCK_SIZE] * BLOCK_SIZE as u32 + (token % BLOCK_SIZE) as u32;
            slots.extend((0..tokens).map(slot));
            block_tables.push(table);
            blocks += used;
        }
        let queries: Vec<f32> =
            random(all_rows * heads * head_dim, 1).iter().map(|value| value * 4.0).collect();
        let (_, queries) = checker.input(&queries)?;
        let (mut key, keys) = checker.input(&random(all_keys * kv_heads * head_dim, 2))?;
        let (value, values) = checker.input(&random(all_keys * kv_heads * head_dim, 3))?;
        // What lies in blocks and slots of others must not matter, not even when it is not a number.
        let elements = cache_elements(2 * blocks as usize + 1, kv_heads, head_dim);
        let (mut key_cache, mut value_cache) =
            (checker.unwritten_cache(elements)?, checker.unwritten_cache(elements)?);
        let mut query = checker.output(all_keys * kv_heads * head_dim)?;
        checker.device.rotary_embedding(rotary_embedding::Args {
            query: &mut query,
            key: &mut key,
            value: &value,
            cosines: &checker.input(&vec![1.0; head_dim / 2])?.0,
            sines: &checker.input(&vec![0.0; head_dim / 2])?.0,
            positions: &checker.indices(&vec![0; all_keys])?,
            slots: &checker.indices(&slots)?,
            key_cache: &mut key_cache,
            value_cache: &mut value_cache,
            rows: all_keys,
            heads: kv_heads,
            kv_heads,
            head_dim,
        })?;
        Ok(Self {
            shape,
            tokens,
            rows,
            first_keys,
            block_tables,
            queries,
            keys,
            values,
            key_cache,
            value_cache,
        })
    }

    /// Attention of `sequences`, without the first `skipped` rows of each.
    fn attend(
        &self,
        checker: &Checker<'_, D>,
        sequences: &[usize],
        skipped: usize,
    ) -> Result<Vec<f32>, KernelError> {
        let Shape { heads, kv_heads, head_dim, window } = self.shape;
        let width = heads * head_dim;
        let (mut queries, mut words, mut block_tables, mut rows) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for &sequence in sequences {
            let of_sequence = self.rows[sequence].start + skipped..self.rows[sequence].end;
            let first_position = self.tokens[sequence] - of_sequence.len();
            words.extend(
                [rows, of_sequence.len(), first_position, block_tables.len()].map(|word| word as u32),
            );
            rows += of_sequence.len();
            queries.extend_from_slice(&self.queries[of_sequence.start * width..of_sequence.end * width]);
            block_tables.extend_from_slice(&self.block_tables[sequence]);
        }
        let mut output = checker.output(rows * width)?;
        checker.device.paged_attention(Args {
            query: &checker.input(&queries)?.0,
            key_cache: &self.key_cache,
            value_cache: &self.value_cache,
            sequences: &checker.indices(&words)?,
            block_tables: &checker.indices(&block_tables)?,
            output: &mut output,
            sequence_count: sequences.len(),
            rows,
            heads,
            kv_heads,
            head_dim,
            window,
            longest: sequences.iter().map(|&sequence| self.tokens[sequence]).max().unwrap_or(0),
            longest_rows: sequences.iter().map(|&at| self.rows[at].len() - skipped).max().unwrap_or(0),
        })?;
        checker.values(&output, rows * width)
    }

    /// Some of the values of `whole`, and what they should be.
    fn reference(&self, whole: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Shape { heads, kv_heads, head_dim, window } = self.shape;
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (sequence, rows) in self.rows.iter().enumerate() {
            for row in rows.clone().step_by(rows.len().div_ceil(COMPARED)) {
                let position = self.tokens[sequence] - (rows.end - row);
                let visible = (position + 1).saturating_sub(window)..position + 1;
                for head in 0..heads {
                    let at = (row * heads + head) * head_dim;
                    let of_head = |source: &[f32]| -> Vec<f32> {
                        let start = |key: usize| {
                            ((self.first_keys[sequence] + key) * kv_heads + head / (heads / kv_heads))
                                * head_dim
                        };
                        visible.clone().flat_map(|key| &source[start(key)..][..head_dim]).copied().collect()
                    };
                    let query = &self.queries[at..][..head_dim];
                    expected.extend(reference::attention(
                        query,
                        &of_head(&self.keys),
                        &of_head(&self.values),
                    ));
                    found.extend_from_slice(&whole[at..][..head_dim]);
                }
            }
        }
        (found, expected)
    }
}
