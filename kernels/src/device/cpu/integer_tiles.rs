//! The integer product of many rows on AMX: the same integers as [`super::integer_product`]'s, 16 rows times 16 outputs
//! at a time.
//!
//! A tile of activations is 16 rows of rounded words as they lie ([`super::integer_rows`]); a tile of weights is 16
//! columns of a panel, codes unpacked to bytes, in the order in which the panel holds them. So a tile product adds four
//! inputs' products for each word, and its sums are those of the vector instructions: exact, in any order. What follows in
//! floating point is the same code.
//!
//! Weights are unpacked for a block of chunks, which all row tiles of the task share. A row tile is
//! multiplied with all chunks of the block first; then its sums are scaled, chunk after chunk, with its 256 totals in
//! registers. Sums go from tiles to vectors through memory, and a vector that is loaded soon after its tile was stored
//! waits for long: one chunk at a time took up to twice as long.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD and LDTILECFG.

use std::arch::asm;
use std::mem::MaybeUninit;

use super::integer_product::{Task, add};
use super::integer_rows::STEP_DEPTH;
use super::matrix::{Chunk, Chunks, PANEL_COLUMNS, chunks};
use super::panel_product::write_row;
use super::quantized_panels::IntegerPanels;
use super::simd::{Avx512, Simd};
use super::tile_shapes::TileShapes;

type Vector = Avx512<true>;

/// Rows and 32-bit columns of a tile.
const TILE: usize = 16;
/// Bytes of a row of a tile.
const ROW_BYTES: usize = 4 * TILE;
/// Column tiles of a panel.
const COLUMN_TILES: usize = PANEL_COLUMNS / TILE;
/// Inputs and chunks of a block, at most: its unpacked weights, a tile's activations and their sums stay in the first-level
/// cache.
const BLOCK_INPUTS: usize = 256;
const BLOCK_CHUNKS: usize = 4;
/// Bytes of the unpacked weights of a block: a chunk takes a tile of 16 rows for each 64 inputs, or a part of one.
const BLOCK_BYTES: usize = 2 * BLOCK_INPUTS * TILE;
/// From this many rows on tiles are faster than vectors.
pub(super) const LEAST_ROWS: usize = 13;
/// Rows whose totals a task keeps.
pub(super) const ROW_BLOCK: usize = 128;

/// Tiles 0 and 1: sums. 2 and 3: activations of `depth` words. 4 and 5: weights of `depth` rows.
fn shapes(depth: usize) -> TileShapes {
    let mut shapes = TileShapes::new();
    for tile in [0, 1] {
        shapes.set(tile, TILE, ROW_BYTES);
        shapes.set(2 + tile, TILE, 4 * depth);
        shapes.set(4 + tile, depth, ROW_BYTES);
    }
    shapes
}

/// Sums of 16 rows and 16 columns: `[row, column]`.
#[repr(C, align(64))]
struct SumTile([[i32; TILE]; TILE]);

/// The sums of a row tile and a block: `[column tile, chunk]`.
type Sums = MaybeUninit<[[SumTile; BLOCK_CHUNKS]; COLUMN_TILES]>;

/// Some chunks and 16 columns of a panel: unpacked codes, `[chunk, depth tile, word, column]`, and scale and minimum of the
/// columns, `[chunk, 2, column]`.
#[repr(C, align(64))]
struct Block {
    codes: [u8; BLOCK_BYTES],
    factors: [[[f32; TILE]; 2]; BLOCK_CHUNKS],
}

/// How chunks are cut into tiles: those of a weight are alike, but for the last, which is filled up with zeros.
#[derive(Clone, Copy)]
struct Cut {
    /// Words of a tile of activations.
    depth: usize,
    /// Tiles of a chunk.
    tiles: usize,
}

impl Cut {
    fn new(deepest: usize) -> Self {
        let words = 2 * deepest.div_ceil(STEP_DEPTH);
        let depth = words.clamp(1, TILE);
        Self { depth, tiles: words.div_ceil(depth) }
    }

    fn bytes(self) -> usize {
        self.tiles * self.depth * ROW_BYTES
    }
}

/// The chunks of a block.
struct Part {
    chunks: [Chunk; BLOCK_CHUNKS],
    count: usize,
}

impl Part {
    /// Takes as many of `rest` as fit.
    #[inline(always)]
    fn next(rest: &mut Chunks) -> Self {
        let mut part =
            Self { chunks: [Chunk { index: 0, start: 0, depth: 0, group: 0 }; BLOCK_CHUNKS], count: 0 };
        let mut inputs = 0;
        while part.count < BLOCK_CHUNKS {
            let Some(chunk) = rest.clone().next() else { break };
            inputs += chunk.depth;
            if inputs > BLOCK_INPUTS {
                break;
            }
            rest.next();
            part.chunks[part.count] = chunk;
            part.count += 1;
        }
        part
    }

    fn chunks(&self) -> &[Chunk] {
        &self.chunks[..self.count]
    }
}

/// Computes the rows of `task`, at most [`ROW_BLOCK`].
///
/// # Safety
/// The processor has AMX, and may use it; the output has the rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn compute<P: IntegerPanels>(task: &Task<'_, P>) {
    let rows = task.rows.len();
    // `[row, column]`.
    let mut totals = [const { MaybeUninit::<f32>::uninit() }; ROW_BLOCK * PANEL_COLUMNS];
    if task.weight.in_features() == 0 {
        totals.fill(MaybeUninit::new(0.0));
    }
    let mut blocks = MaybeUninit::<[Block; COLUMN_TILES]>::uninit();
    let blocks = blocks.as_mut_ptr().cast::<Block>();
    let cut = Cut::new(chunks(task.weight).next().map_or(0, |chunk| chunk.depth));
    // SAFETY: `available`, and no tile is used behind this function.
    let tiles = unsafe { shapes(cut.depth).load() };
    let mut rest = chunks(task.weight);
    // SAFETY: the chunks of a part lie within the weight and fit a block; rows of activations end at a whole tile
    // (`IntegerRows::fill`); row tiles below `rows` only.
    unsafe {
        let blocks = [blocks, blocks.add(1)];
        loop {
            let part = Part::next(&mut rest);
            if part.count == 0 {
                break;
            }
            unpack(task, &part, cut, blocks);
            if rest.clone().next().is_none() {
                prefetch_output(task);
            }
            for row in (0..rows).step_by(TILE) {
                multiply_and_scale(task, &part, cut, row, blocks, &mut totals);
            }
        }
    }
    drop(tiles);
    for (row, values) in task.rows.clone().zip(totals.chunks_exact(PANEL_COLUMNS)) {
        // SAFETY: this task alone writes its panel of its rows, which the output holds; the first chunk, or the lack of
        // one, has written the totals of every row.
        unsafe {
            let values = std::slice::from_raw_parts(values.as_ptr().cast(), PANEL_COLUMNS);
            write_row(task.weight, task.bias, task.output, task.panel, row, values);
        }
    }
}

/// Asks for the lines of the output that the task will write: each row lies in lines of its own, which no cache has.
#[inline(always)]
fn prefetch_output<P: IntegerPanels>(task: &Task<'_, P>) {
    /// Values of a cache line.
    const LINE: usize = 16;
    for row in task.rows.clone() {
        for column in (0..PANEL_COLUMNS).step_by(LINE) {
            let at = task.output.at(task.weight.out_features(), task.panel, row).wrapping_add(column);
            // SAFETY: it has no effect on what the program computes.
            unsafe { asm!("prefetchw [{}]", in(reg) at, options(nostack, readonly, preserves_flags)) };
        }
    }
}

/// Unpacks the codes and factors of `part`, and asks for those of the part after it; what the last tile of a chunk has
/// beyond it is zero.
#[inline(always)]
unsafe fn unpack<P: IntegerPanels>(
    task: &Task<'_, P>,
    part: &Part,
    cut: Cut,
    blocks: [*mut Block; COLUMN_TILES],
) {
    for (at, &chunk) in part.chunks().iter().enumerate() {
        task.weight.prefetch(task.panel, chunk.later(part.count));
        let steps = chunk.depth.div_ceil(STEP_DEPTH);
        for (tile, block) in blocks.into_iter().enumerate() {
            let column = tile * TILE;
            // SAFETY: the caller gives memory for two blocks, each with room for the tiles of all chunks, whose words follow
            // each other; the chunk has the steps; vectors of 16 columns lie within the panel.
            unsafe {
                let codes = (&raw mut (*block).codes).cast::<u8>().add(at * cut.bytes());
                for step in 0..steps {
                    let [even, odd] = task.weight.codes::<Vector>(task.panel, chunk, step, column);
                    Vector::store_u32(codes.add(2 * step * ROW_BYTES).cast(), even);
                    Vector::store_u32(codes.add((2 * step + 1) * ROW_BYTES).cast(), odd);
                }
                let beyond = cut.bytes() - 2 * steps * ROW_BYTES;
                if beyond > 0 {
                    codes.add(2 * steps * ROW_BYTES).write_bytes(0, beyond);
                }
                let [scale, minimum] = task.weight.scale_and_minimum::<Vector>(task.panel, chunk, column);
                let factors = (&raw mut (*block).factors).cast::<f32>().add(at * 2 * TILE);
                Vector::store(factors, scale);
                Vector::store(factors.add(TILE), minimum);
            }
        }
    }
}

/// Adds the chunks of `part` to the totals of 16 rows.
#[inline(always)]
unsafe fn multiply_and_scale<P: IntegerPanels>(
    task: &Task<'_, P>,
    part: &Part,
    cut: Cut,
    row: usize,
    blocks: [*mut Block; COLUMN_TILES],
    totals: &mut [MaybeUninit<f32>; ROW_BLOCK * PANEL_COLUMNS],
) {
    let first = task.rows.start + row;
    let mut sums = Sums::uninit();
    let tiles = sums.as_mut_ptr().cast::<SumTile>();
    let totals = totals.as_mut_ptr().cast::<f32>();
    // SAFETY: 16 rows of words and factors are readable (`IntegerRows::fill`), the totals have room for 16 rows from `row`
    // on, the blocks hold the part, and each chunk's sums are stored before they are loaded.
    unsafe {
        for (at, chunk) in part.chunks().iter().enumerate() {
            let words = task.input.words(first, chunk.start);
            let codes = [
                (&raw const (*blocks[0]).codes).cast::<u8>().add(at * cut.bytes()),
                (&raw const (*blocks[1]).codes).cast::<u8>().add(at * cut.bytes()),
            ];
            multiply(
                cut,
                words,
                4 * task.input.stride(),
                codes,
                [tiles.add(at), tiles.add(BLOCK_CHUNKS + at)],
            );
        }
        for (tile, block) in blocks.into_iter().enumerate() {
            let block_factors = (&raw const (*block).factors).cast::<f32>();
            let sums = tiles.add(tile * BLOCK_CHUNKS);
            let totals = totals.add(row * PANEL_COLUMNS + tile * TILE);
            let mut of_rows = [Vector::splat(0.0); TILE];
            if part.chunks[0].index > 0 {
                for (member, total) in of_rows.iter_mut().enumerate() {
                    *total = Vector::load(totals.add(member * PANEL_COLUMNS));
                }
            }
            for (at, chunk) in part.chunks().iter().enumerate() {
                let factors = block_factors.add(at * 2 * TILE);
                let factors = [Vector::load(factors), Vector::load(factors.add(TILE))];
                let [of_activations, sums_of_activations] = task.input.tile_factors(first, chunk.index);
                for (member, total) in of_rows.iter_mut().enumerate() {
                    let products = Vector::load_i32((&raw const (*sums.add(at)).0[member]).cast());
                    let of_row = [of_activations[member], sums_of_activations[member]];
                    *total = add::<Vector>(*total, products, factors, of_row);
                }
            }
            for (member, total) in of_rows.into_iter().enumerate() {
                Vector::store(totals.add(member * PANEL_COLUMNS), total);
            }
        }
    }
}

/// The sums of 16 rows of activations and the weights of a chunk, for both column tiles.
#[inline(always)]
unsafe fn multiply(
    cut: Cut,
    words: *const i32,
    stride: usize,
    codes: [*const u8; COLUMN_TILES],
    sums: [*mut SumTile; COLUMN_TILES],
) {
    // SAFETY: the caller gives 16 rows of words and the weights of a chunk; each of `sums` holds a tile.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm2, [{words} + {stride} * 1]",
            "tileloadd tmm4, [{left} + {row} * 1]",
            "tileloadd tmm5, [{right} + {row} * 1]",
            "tdpbsud tmm0, tmm2, tmm4",
            "tdpbsud tmm1, tmm2, tmm5",
            words = in(reg) words,
            stride = in(reg) stride,
            left = in(reg) codes[0],
            right = in(reg) codes[1],
            row = in(reg) ROW_BYTES,
            options(nostack, readonly),
        );
        if cut.tiles > 1 {
            asm!(
                "tileloadd tmm3, [{words} + {stride} * 1]",
                "tileloadd tmm4, [{left} + {row} * 1]",
                "tileloadd tmm5, [{right} + {row} * 1]",
                "tdpbsud tmm0, tmm3, tmm4",
                "tdpbsud tmm1, tmm3, tmm5",
                words = in(reg) words.add(cut.depth),
                stride = in(reg) stride,
                left = in(reg) codes[0].add(cut.depth * ROW_BYTES),
                right = in(reg) codes[1].add(cut.depth * ROW_BYTES),
                row = in(reg) ROW_BYTES,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{left} + {row} * 1], tmm0",
            "tilestored [{right} + {row} * 1], tmm1",
            left = in(reg) sums[0],
            right = in(reg) sums[1],
            row = in(reg) ROW_BYTES,
            options(nostack),
        );
    }
}
