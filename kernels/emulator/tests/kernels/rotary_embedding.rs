//! The rotation, and keys and values in CUDA's cache.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::paged_attention::{BLOCK_SIZE, cache_elements};
use nibble_kernels::ops::rotary_embedding::{self, Args, RotaryEmbedding};

use crate::lab::{
    ELEMENTS, Lab, Outcome, Suite, check, check_rounded, check_same_bits, random, random_words, round,
};

pub(crate) const SUITE: Suite = Suite {
    source: rotary_embedding::cuda::SOURCE,
    cases: &[
        ("heads are rotated and cached", heads_are_rotated_and_cached),
        ("a row alone", a_row_has_the_same_bits_alone_and_in_a_batch),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("the next position", "positions[row]", 0, "positions[row] + 1"),
        fault("the next slot", "slots[row]", 0, "slots[row] + 1"),
        fault("one sign is wrong", "lower_low * cos_low - upper_low", 0, "lower_low * cos_low + upper_low"),
        fault("cosine for sine", "lower_high * sin_high", 0, "lower_high * cos_high"),
        fault(
            "a word is not rotated",
            "        rotate_word<Element>(lower.y, upper.y, cos.y, sin.y);\n",
            0,
            "",
        ),
        fault("values are rotated", "    if (!is_value) {\n", 0, "    {\n"),
        fault("queries are cached", "    if (!is_query) {\n", 0, "    {\n"),
        fault("keys in the cache of values", "is_value ? value_cache : key_cache", 0, "value_cache"),
        fault("the upper half is not stored", "        store_16(to + half, upper);\n", 0, ""),
        fault("the upper half is not cached", "        store_16(cached + half, upper);\n", 0, ""),
        fault(
            "another layout",
            "kv_head) * TOKENS + slot % TOKENS",
            0,
            "slot % TOKENS) * kv_heads + kv_head",
        ),
        fault("a block of other size", "TOKENS = 16", 0, "TOKENS = 8"),
        fault("threads past the last head", "    if (head >= heads + 2 * kv_heads) return;\n", 0, ""),
        fault(
            "the last head is forgotten",
            "heads + 2 * kv_heads) return",
            0,
            "heads + 2 * kv_heads - 1) return",
        ),
        fault("the first part of a row for all", "block_index_y() * THREADS", 0, "0 * THREADS"),
        fault("the wrong KV head", "head - heads;", 0, "head - heads + 1;"),
        fault("the wrong half", "upper = load_16(from + half)", 0, "upper = load_16(from + half - 8)"),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: rotary_embedding::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

const POSITIONS: usize = 40;
const BLOCKS: usize = 5;

struct Problem {
    element: Element,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

struct Rotated {
    query: Vec<f32>,
    key: Vec<f32>,
    key_cache: Vec<f32>,
    value_cache: Vec<f32>,
}

impl Problem {
    fn new(element: Element, rows: usize, (heads, kv_heads, head_dim): (usize, usize, usize)) -> Self {
        let half = head_dim / 2;
        let angle =
            |index: usize| (index / half) as f64 * 1e4f64.powf(-((index % half) as f64) / half as f64);
        let table = |function: fn(f64) -> f64| {
            (0..POSITIONS * half).map(|index| round(element, function(angle(index)) as f32)).collect()
        };
        // Every row another slot, out of order.
        let slots = (0..rows).map(|row| ((row * 7 + 3) % (BLOCKS * BLOCK_SIZE)) as u32).collect();
        Self {
            element,
            heads,
            kv_heads,
            head_dim,
            query: random(element, rows * heads * head_dim, 1, 3.0),
            key: random(element, rows * kv_heads * head_dim, 2, 3.0),
            value: random(element, rows * kv_heads * head_dim, 3, 3.0),
            positions: random_words(rows, 4, POSITIONS as u32),
            slots,
            cosines: table(f64::cos),
            sines: table(f64::sin),
        }
    }

    fn rows(&self) -> usize {
        self.positions.len()
    }

    fn run(&self, lab: &Lab, seed: u64) -> Result<Rotated, String> {
        let device = lab.device(self.element, seed);
        let (mut query, mut key) = (device.upload(&self.query), device.upload(&self.key));
        let cache = cache_elements(BLOCKS, self.kv_heads, self.head_dim);
        let (mut key_cache, mut value_cache) = (device.poisoned(cache), device.poisoned(cache));
        let args = Args {
            query: &mut query,
            key: &mut key,
            value: &device.upload(&self.value),
            cosines: &device.upload(&self.cosines),
            sines: &device.upload(&self.sines),
            positions: &device.words(&self.positions),
            slots: &device.words(&self.slots),
            key_cache: &mut key_cache,
            value_cache: &mut value_cache,
            rows: self.rows(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        };
        device.cuda.rotary_embedding(args).map_err(|error| error.to_string())?;
        let [query, key, key_cache, value_cache] =
            [query, key, key_cache, value_cache].map(|buffer| device.download(&buffer));
        Ok(Rotated { query, key, key_cache, value_cache })
    }

    /// The formula, for the heads of each row.
    fn rotated(&self, source: &[f32]) -> Vec<f64> {
        let (half, width) = (self.head_dim / 2, source.len() / self.rows());
        let element = |index: usize| {
            let (row, element) = (index / width, index % self.head_dim);
            let angle = self.positions[row] as usize * half + element % half;
            let (cos, sin) = (f64::from(self.cosines[angle]), f64::from(self.sines[angle]));
            let partner = if element < half { index + half } else { index - half };
            let (own, partner) = (f64::from(source[index]), f64::from(source[partner]));
            if element < half { own * cos - partner * sin } else { own * cos + partner * sin }
        };
        (0..source.len()).map(element).collect()
    }

    fn check(&self, lab: &Lab, seed: u64) -> Outcome {
        let found = self.run(lab, seed)?;
        let what =
            format!("{} rows of {}+{} heads of {}", self.rows(), self.heads, self.kv_heads, self.head_dim);
        // Two products of values up to 3 and a sum, in float.
        let allowed = |_| 1e-6;
        check_rounded(
            &format!("query, {what}"),
            self.element,
            &found.query,
            &self.rotated(&self.query),
            allowed,
        )?;
        check_rounded(&format!("key, {what}"), self.element, &found.key, &self.rotated(&self.key), allowed)?;
        check_same_bits(&format!("key cache, {what}"), &found.key_cache, &self.cached(&found.key))?;
        check_same_bits(&format!("value cache, {what}"), &found.value_cache, &self.cached(&self.value))
    }

    /// A cache that was full of NaN, after `rows` were written to it.
    fn cached(&self, rows: &[f32]) -> Vec<f32> {
        let (kv_heads, head_dim) = (self.kv_heads, self.head_dim);
        let mut cache = vec![round(self.element, f32::NAN); cache_elements(BLOCKS, kv_heads, head_dim)];
        for (index, head) in rows.chunks_exact(head_dim).enumerate() {
            let slot = self.slots[index / kv_heads] as usize;
            let head_of_block = slot / BLOCK_SIZE * kv_heads + index % kv_heads;
            let start = (head_of_block * BLOCK_SIZE + slot % BLOCK_SIZE) * head_dim;
            cache[start..start + head_dim].copy_from_slice(head);
        }
        cache
    }
}

fn heads_are_rotated_and_cached(lab: &Lab) -> Outcome {
    let shapes = [(1, 1, 16), (9, 3, 64), (4, 4, 80), (32, 8, 128), (3, 1, 256), (14, 2, 64)];
    for element in ELEMENTS {
        for (seed, shape) in shapes.into_iter().enumerate() {
            for rows in [1, 6, 33] {
                Problem::new(element, rows, shape).check(lab, seed as u64)?;
            }
        }
    }
    Ok(())
}

fn a_row_has_the_same_bits_alone_and_in_a_batch(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        let batch = Problem::new(element, 9, (6, 2, 64));
        let together = batch.run(lab, 1)?;
        for row in [0, 4, 8] {
            let query = row * 6 * 64..(row + 1) * 6 * 64;
            let key = row * 2 * 64..(row + 1) * 2 * 64;
            let alone = Problem {
                query: batch.query[query.clone()].to_vec(),
                key: batch.key[key.clone()].to_vec(),
                value: batch.value[key.clone()].to_vec(),
                positions: vec![batch.positions[row]],
                slots: vec![batch.slots[row]],
                cosines: batch.cosines.clone(),
                sines: batch.sines.clone(),
                ..batch
            };
            let alone = alone.run(lab, 2)?;
            check_same_bits("query", &alone.query, &together.query[query])?;
            check_same_bits("key", &alone.key, &together.key[key])?;
            let written = alone.key_cache.iter().filter(|value| !value.is_nan()).count();
            check(written == 2 * 64, || format!("one row wrote {written} elements of the key cache"))?;
        }
    }
    Ok(())
}

#[test]
fn rotary_embedding_rotates_heads_and_caches_them() -> Outcome {
    heads_are_rotated_and_cached(&Lab::sound())
}

#[test]
fn a_row_of_rotary_embedding_has_the_same_bits_alone_and_in_a_batch() -> Outcome {
    a_row_has_the_same_bits_alone_and_in_a_batch(&Lab::sound())
}
