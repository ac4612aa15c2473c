//! Attention: against the reference, and against itself in other chunks, batches and grids.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::device::cuda::driver::Source;
use nibble_kernels::ops::paged_attention::{
    self, Args, BLOCK_SIZE, PagedAttention, cache_elements, reference,
};

use crate::lab::{Lab, Outcome, Suite, check, check_same_bits, random};

/// The kernels for heads of 64 in F16, in which faults are looked for; others are other instances of the same code.
const SOURCE: Source = paged_attention::cuda::SOURCES[4];

pub(crate) const SUITE: Suite = Suite {
    source: SOURCE,
    cases: &[
        ("heads of 64 agree with the reference", heads_of_64_agree_with_the_reference),
        ("a row in any chunk and batch", a_row_has_the_same_bits_in_any_chunk_and_any_batch),
        ("shared memory", shared_memory_has_no_conflicts),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault(
            "the kernel before is not waited for, by the other kernel",
            "start_after_previous_kernel();",
            1,
            "let_next_kernel_start();",
        ),
        fault(
            "keys are read before they are there",
            "            block_barrier();  // everyone's keys",
            0,
            "            // everyone's keys",
        ),
        fault(
            "maxima are read before they are there",
            "            block_barrier();  // the maxima",
            0,
            "            // the maxima",
        ),
        fault(
            "weights are read before they are there",
            "            block_barrier();  // everyone's values",
            0,
            "            // everyone's values",
        ),
        fault(
            "sums are read before they are there",
            "        block_barrier();\n#pragma unroll\n        for (u32 n = 0; n < N; n++) {\n#pragma unroll\n            for (u32 i = 0; i < 2; i++) {\n                float total = 0.0f;",
            0,
            "#pragma unroll\n        for (u32 n = 0; n < N; n++) {\n#pragma unroll\n            for (u32 i = 0; i < 2; i++) {\n                float total = 0.0f;",
        ),
        fault(
            "the output is stored before it is whole",
            "        block_barrier();\n        for (u32 index = thread; index < columns.count",
            0,
            "        for (u32 index = thread; index < columns.count",
        ),
        fault(
            "the wait for keys is too weak",
            "            async_wait<2 * (STAGES - 1)>();\n",
            0,
            "            async_wait<2 * STAGES - 1>();\n",
        ),
        fault(
            "the wait for values is too weak",
            "async_wait<2 * (STAGES - 1) + 1>()",
            0,
            "async_wait<2 * STAGES>()",
        ),
        fault("keys of the next stage", "load_keys(tile + STAGES);", 0, "load_keys(tile + STAGES - 1);"),
        fault("what nobody sees is not zeroed", "position >= first_key && position <= last_key", 0, "true"),
        fault("the future is seen", "key > position || ", 0, ""),
        fault("what the window hides is seen", " || key < columns.oldest(position)", 0, ""),
        fault("a window one too long", "position - window + 1 : 0", 0, "position - window : 0"),
        fault(
            "tiles at the window's start are not masked",
            " && start >= seen_by_all_start) return",
            0,
            ") return",
        ),
        fault("tiles at the row's end are not masked", "start + TILE - 1 <= seen_by_all_end && ", 0, ""),
        fault(
            "one warp's maximum is forgotten",
            "other < GROUP_WARPS; other++)\n                    largest",
            0,
            "other < GROUP_WARPS - 1; other++)\n                    largest",
        ),
        fault(
            "a row without keys has a maximum",
            "largest == negative_infinity() ? 0.0f : largest",
            0,
            "largest",
        ),
        fault("what was summed is not rescaled", "split.sums[m][n][i] *= factor;", 0, ""),
        fault(
            "the total is not rescaled",
            "split.total[n][i] = multiply_add(split.total[n][i], factor,",
            0,
            "split.total[n][i] = multiply_add(split.total[n][i], 1.0f,",
        ),
        fault(
            "one warp's total is forgotten",
            "other < GROUP_WARPS; other++)\n                    total",
            0,
            "other < GROUP_WARPS - 1; other++)\n                    total",
        ),
        fault("a split is not cleared", "        split.clear();\n    }", 0, "    }"),
        fault(
            "splits are merged without weights",
            "split.sums[m][n][i + half] * weights.added",
            0,
            "split.sums[m][n][i + half]",
        ),
        fault("splits are combined without weights", "from[32 * part] * weights.added", 0, "from[32 * part]"),
        fault("the last split is not combined", "/ SPLIT - first_split + 1", 0, "/ SPLIT - first_split"),
        fault(
            "a split ends a tile late",
            "tile % TILES_PER_SPLIT == TILES_PER_SPLIT - 1) finish",
            0,
            "tile % TILES_PER_SPLIT == 0) finish",
        ),
        fault(
            "the next split's blocks are not looked up",
            "if (tile % TILES_PER_SPLIT == 0) load_numbers(tile / TILES_PER_SPLIT + 1);",
            0,
            "",
        ),
        fault("the sequence's first block for all", "first_number + key / BLOCK_TOKENS", 0, "first_number"),
        fault(
            "another KV head's keys",
            "static_cast<u64>(kv_head) * (BLOCK_TOKENS",
            0,
            "static_cast<u64>(0 * kv_head) * (BLOCK_TOKENS",
        ),
        fault(
            "heads and rows mixed up",
            "return (first + column) % shared; }",
            0,
            "return (first + column) / shared % shared; }",
        ),
        fault("the first sequence for all blocks", "            block -= blocks;\n", 0, ""),
        fault("values of other dimensions", "32 * dimension_tile);", 0, "32 * (dimension_tile ^ 1));"),
        fault("no padding", "ROW_BYTES = 2 * HEAD_DIM + 16", 0, "ROW_BYTES = 2 * HEAD_DIM"),
        fault(
            "no scale",
            "multiply_add(scores[n][i], scale, -safe)",
            0,
            "multiply_add(scores[n][i], 1.0f, -safe)",
        ),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: SOURCE.name, fault, pattern, occurrence, replacement }
}

const ALL: usize = usize::MAX;

/// Multiprocessors of a device that is never short of blocks, so that a block takes all splits, and of one that always
/// is, so that each split has a block of its own.
const GRIDS: [u32; 2] = [0, 1 << 20];

/// Rows of one sequence: the first one's position, and how many.
#[derive(Clone, Copy, Debug)]
struct Part {
    first: usize,
    rows: usize,
}

/// Heads of a model: `shared` query heads to each KV head.
#[derive(Clone, Copy, Debug)]
struct Heads {
    element: Element,
    head_dim: usize,
    kv_heads: usize,
    shared: usize,
}

impl Heads {
    const fn new(element: Element, head_dim: usize, kv_heads: usize, shared: usize) -> Self {
        Self { element, head_dim, kv_heads, shared }
    }

    fn width(self) -> usize {
        self.kv_heads * self.shared * self.head_dim
    }
}

/// One sequence, its keys and values in scattered blocks of caches that hold NaN everywhere else.
struct World {
    heads: Heads,
    tokens: usize,
    query: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    block_table: Vec<u32>,
}

impl World {
    fn new(heads: Heads, tokens: usize) -> Self {
        let Heads { element, head_dim, kv_heads, .. } = heads;
        let used = tokens.div_ceil(BLOCK_SIZE) as u32;
        Self {
            heads,
            tokens,
            query: random(element, tokens * heads.width(), 1, 4.0),
            keys: random(element, tokens * kv_heads * head_dim, 2, 1.0),
            values: random(element, tokens * kv_heads * head_dim, 3, 1.0),
            block_table: (0..used).rev().map(|block| 2 * block + 1).collect(),
        }
    }

    fn cache(&self, from: &[f32]) -> Vec<f32> {
        let Heads { head_dim, kv_heads, .. } = self.heads;
        let mut cache = vec![f32::NAN; cache_elements(2 * self.block_table.len() + 1, kv_heads, head_dim)];
        for (token, row) in from.chunks_exact(kv_heads * head_dim).enumerate() {
            let block = self.block_table[token / BLOCK_SIZE] as usize;
            for (head, elements) in row.chunks_exact(head_dim).enumerate() {
                let to = ((block * kv_heads + head) * BLOCK_SIZE + token % BLOCK_SIZE) * head_dim;
                cache[to..to + head_dim].copy_from_slice(elements);
            }
        }
        cache
    }

    /// The outputs of all parts in one batch, one after the other; and cycles that conflicts in shared memory cost.
    fn attend(&self, lab: &Lab, grid: u32, parts: &[Part], window: usize) -> Result<(Vec<f32>, u64), String> {
        let Heads { element, head_dim, kv_heads, shared } = self.heads;
        let device = lab.device_of_size(element, parts.len() as u64, grid);
        let width = self.heads.width();
        let (mut query, mut sequences, mut rows) = (Vec::new(), Vec::new(), 0);
        for part in parts {
            query.extend_from_slice(&self.query[part.first * width..(part.first + part.rows) * width]);
            sequences.extend([rows, part.rows, part.first, 0].map(|word| word as u32));
            rows += part.rows;
        }
        let poison = vec![0xff; 4 << 20];
        let workspace = device.cuda.workspace(poison.len());
        let poisoned = workspace.and_then(|workspace| device.cuda.driver().write(&poison, workspace));
        poisoned.map_err(|error| error.to_string())?;
        let mut output = device.poisoned(rows * width);
        let args = Args {
            query: &device.upload(&query),
            key_cache: &device.upload(&self.cache(&self.keys)),
            value_cache: &device.upload(&self.cache(&self.values)),
            sequences: &device.words(&sequences),
            block_tables: &device.words(&self.block_table),
            output: &mut output,
            sequence_count: parts.len(),
            rows,
            longest: parts.iter().map(|part| part.first + part.rows).max().unwrap_or(0),
            longest_rows: parts.iter().map(|part| part.rows).max().unwrap_or(0),
            heads: kv_heads * shared,
            kv_heads,
            head_dim,
            window,
        };
        device.cuda.paged_attention(args).map_err(|error| error.to_string())?;
        let report = device.emulator.report();
        Ok((device.download(&output), report.matrix_conflict_cycles + report.shared_conflict_cycles))
    }

    /// The last `rows` rows against the reference, in both grids.
    fn check(&self, lab: &Lab, rows: usize, window: usize) -> Outcome {
        let part = Part { first: self.tokens - rows, rows };
        for grid in GRIDS {
            let (found, _) = self.attend(lab, grid, &[part], window)?;
            self.check_rows(part, window, &found)?;
        }
        Ok(())
    }

    fn check_rows(&self, part: Part, window: usize, found: &[f32]) -> Outcome {
        let Heads { element, head_dim, kv_heads, shared } = self.heads;
        let heads = kv_heads * shared;
        // Weights and the output are rounded to 11 and 8 digits; values are below 1.
        let tolerance = if element == Element::F16 { 1e-3 } else { 8e-3 };
        let slice = |from: &[f32], token: usize, heads: usize, head: usize| {
            from[(token * heads + head) * head_dim..][..head_dim].to_vec()
        };
        for (row, outputs) in found.chunks_exact(heads * head_dim).enumerate() {
            let position = part.first + row;
            let seen = (position + 1).saturating_sub(window)..position + 1;
            for (head, output) in outputs.chunks_exact(head_dim).enumerate() {
                let gather = |from: &[f32]| -> Vec<f32> {
                    seen.clone().flat_map(|key| slice(from, key, kv_heads, head / shared)).collect()
                };
                let query = slice(&self.query, position, heads, head);
                let expected = reference::attention(&query, &gather(&self.keys), &gather(&self.values));
                for (&found, expected) in output.iter().zip(expected) {
                    let near = (found - expected).abs() <= tolerance;
                    check(near, || {
                        format!(
                            "{:?}, window {window}, position {position}, head {head}: {found}, not {expected}",
                            self.heads
                        )
                    })?;
                }
            }
        }
        Ok(())
    }
}

fn heads_of_64_agree_with_the_reference(lab: &Lab) -> Outcome {
    use Element::F16;
    for (heads, tokens, rows, window) in [
        (Heads::new(F16, 64, 2, 1), 1, 1, ALL),
        (Heads::new(F16, 64, 1, 8), 17, 17, ALL),
        (Heads::new(F16, 64, 2, 4), 65, 65, ALL),
        (Heads::new(F16, 64, 1, 7), 200, 30, 70),
        (Heads::new(F16, 64, 1, 8), 1000, 3, ALL),
        (Heads::new(F16, 64, 1, 5), 1100, 2, 600),
        (Heads::new(F16, 64, 1, 48), 33, 33, ALL),
    ] {
        World::new(heads, tokens).check(lab, rows, window)?;
    }
    Ok(())
}

fn every_head_size_agrees_with_the_reference(lab: &Lab) -> Outcome {
    use Element::{BF16, F16};
    for (heads, tokens, rows, window) in [
        (Heads::new(BF16, 64, 2, 4), 65, 65, ALL),
        (Heads::new(F16, 128, 1, 8), 300, 20, ALL),
        (Heads::new(F16, 128, 1, 5), 1100, 2, 600),
        (Heads::new(BF16, 128, 2, 1), 64, 9, 1),
        (Heads::new(BF16, 16, 3, 2), 40, 40, ALL),
        (Heads::new(F16, 80, 1, 4), 90, 20, ALL),
        (Heads::new(F16, 96, 1, 3), 90, 20, 50),
        (Heads::new(BF16, 256, 1, 4), 150, 10, ALL),
    ] {
        World::new(heads, tokens).check(lab, rows, window)?;
    }
    Ok(())
}

fn every_length_agrees_with_the_reference(lab: &Lab) -> Outcome {
    // A prompt has a row of each length up to its own.
    World::new(Heads::new(Element::F16, 64, 1, 2), 300).check(lab, 300, ALL)
}

/// Ways to cut `rows` rows up, each of which must give the same bits as all of them at once.
fn cuts(rows: usize) -> [Vec<usize>; 5] {
    let equal = |rows_each: usize| -> Vec<usize> {
        (0..rows).step_by(rows_each).map(|first| rows_each.min(rows - first)).collect()
    };
    [equal(1), equal(3), equal(7), vec![rows - 1, 1], vec![1, 9, 1, rows - 11]]
}

fn check_cuts(lab: &Lab, heads: Heads, tokens: usize, window: usize) -> Outcome {
    const ROWS: usize = 20;
    let world = World::new(heads, tokens);
    let first = tokens - ROWS;
    let (expected, _) = world.attend(lab, GRIDS[0], &[Part { first, rows: ROWS }], window)?;
    for grid in GRIDS {
        for cut in cuts(ROWS) {
            let mut next = first;
            let mut part = |&rows: &usize| {
                next += rows;
                Part { first: next - rows, rows }
            };
            let parts: Vec<Part> = cut.iter().map(&mut part).collect();
            let what = format!("{heads:?}, {tokens} tokens, window {window}");
            let (together, _) = world.attend(lab, grid, &parts, window)?;
            check_same_bits(&format!("{what}, a batch of {cut:?}"), &together, &expected)?;
            let last = &parts[parts.len() - 1..];
            let (alone, _) = world.attend(lab, grid, last, window)?;
            let tail = &expected[expected.len() - alone.len()..];
            check_same_bits(&format!("{what}, {last:?} alone"), &alone, tail)?;
        }
    }
    Ok(())
}

fn a_row_has_the_same_bits_in_any_chunk_and_any_batch(lab: &Lab) -> Outcome {
    check_cuts(lab, Heads::new(Element::F16, 64, 2, 8), 70, ALL)?;
    check_cuts(lab, Heads::new(Element::F16, 64, 1, 3), 1050, 530)?;
    check_cuts(lab, Heads::new(Element::F16, 64, 1, 1), 530, 20)
}

fn shared_memory_has_no_conflicts(lab: &Lab) -> Outcome {
    for rows in [1, 4, 20] {
        let world = World::new(Heads::new(Element::F16, 64, 1, 8), 130);
        let part = Part { first: 130 - rows, rows };
        let (_, cycles) = world.attend(lab, GRIDS[0], &[part], ALL)?;
        check(cycles == 0, || format!("{cycles} cycles of conflicts in shared memory with {rows} rows"))?;
    }
    Ok(())
}

#[test]
fn paged_attention_agrees_with_the_reference_for_heads_of_64() -> Outcome {
    heads_of_64_agree_with_the_reference(&Lab::sound())
}

#[test]
fn paged_attention_agrees_with_the_reference_for_every_head_size() -> Outcome {
    every_head_size_agrees_with_the_reference(&Lab::sound())
}

#[test]
fn paged_attention_agrees_with_the_reference_for_every_length() -> Outcome {
    every_length_agrees_with_the_reference(&Lab::sound())
}

#[test]
fn a_row_of_paged_attention_has_the_same_bits_in_any_chunk_and_any_batch() -> Outcome {
    a_row_has_the_same_bits_in_any_chunk_and_any_batch(&Lab::sound())
}

#[test]
fn a_row_of_paged_attention_over_heads_of_128_has_the_same_bits_too() -> Outcome {
    check_cuts(&Lab::sound(), Heads::new(Element::BF16, 128, 1, 8), 1050, ALL)
}

#[test]
fn paged_attention_has_no_conflicts_in_shared_memory() -> Outcome {
    shared_memory_has_no_conflicts(&Lab::sound())
}

#[test]
fn a_head_size_without_a_kernel_is_refused_by_name() -> Outcome {
    let world = World::new(Heads::new(Element::F16, 240, 1, 1), 1);
    let Err(message) = world.attend(&Lab::sound(), 108, &[Part { first: 0, rows: 1 }], ALL) else {
        return Err("heads of 240 were accepted".to_owned());
    };
    check(message.contains("head_dim") && message.contains("240"), || message)
}
