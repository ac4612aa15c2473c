//! The integer product of many rows on AMX: the same integers as [`super::integer_product`]'s, 16 rows times 16 outputs
//! at a time.
//!
//! A tile of activations is 16 rows of rounded words as they lie ([`super::integer_rows`]); a tile of weights is 16
//! columns of a panel, codes unpacked to bytes, in the order in which the panel holds them. So a tile product adds four
//! inputs' products for each word, and its sums are those of the vector instructions: exact, in any order. What follows in
//! floating point is the same code.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD and LDTILECFG.

use std::arch::asm;
use std::mem::MaybeUninit;

use super::integer_product::{Task, add, factors};
use super::integer_rows::{STEP_DEPTH, chunks};
use super::matrix::{CHUNK_DEPTH, PANEL_COLUMNS};
use super::panel_product::write_row;
use super::quantized_panels::IntegerPanels;
use super::simd::{Avx512, Simd};

/// Rows and 32-bit columns of a tile.
const TILE: usize = 16;
const TILE_BYTES: usize = TILE * TILE * 4;
/// Column tiles of a panel.
const COLUMN_TILES: usize = PANEL_COLUMNS / TILE;
/// Tiles of weights that the deepest chunk takes, one below the other.
const DEPTH_TILES: usize = CHUNK_DEPTH / (4 * TILE);
/// From this many rows on tiles are faster than vectors.
pub(super) const LEAST_ROWS: usize = 8;
/// Rows whose totals a task keeps.
pub(super) const ROW_BLOCK: usize = 128;

/// Whether the processor has AMX's products of bytes, and the operating system lets this process use them: asks it to.
pub(super) fn available() -> bool {
    // Linux saves tiles only for processes that asked for them.
    cfg!(target_os = "linux") && has_tiles() && request_permission()
}

fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    const BOTH: u32 = AMX_TILE | AMX_INT8;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BOTH == BOTH
}

fn request_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the call takes two numbers and touches no memory of the program.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_a_row: [u16; 16],
    rows: [u8; 16],
}

impl TileShapes {
    /// Tiles 0 and 1: sums. 2 and 3: activations of `depth` words. 4 to 7: weights of `depth` rows.
    fn new(depth: usize) -> Self {
        let (bytes, rows, full) = (4 * depth as u16, depth as u8, 4 * TILE as u16);
        let mut shapes =
            Self { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_a_row: [0; 16], rows: [0; 16] };
        shapes.bytes_of_a_row[..8].copy_from_slice(&[full, full, bytes, bytes, full, full, full, full]);
        shapes.rows[..8].copy_from_slice(&[16, 16, 16, 16, rows, rows, rows, rows]);
        shapes
    }
}

/// Unpacked codes of a chunk of a panel: `[column tile, depth tile]`.
#[repr(C, align(64))]
struct WeightTiles([[[u8; TILE_BYTES]; DEPTH_TILES]; COLUMN_TILES]);

/// Sums of 16 rows and the columns of a panel: `[column tile, row, column]`.
#[repr(C, align(64))]
struct SumTiles([[[i32; TILE]; TILE]; COLUMN_TILES]);

/// Computes the rows of `task`, at most [`ROW_BLOCK`].
///
/// # Safety
/// [`available`] said so; the output has the rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn compute<P: IntegerPanels>(task: &Task<'_, P>) {
    let rows = task.rows.len();
    let mut totals = [const { MaybeUninit::<f32>::uninit() }; ROW_BLOCK * PANEL_COLUMNS];
    if task.weight.in_features() == 0 {
        totals.fill(MaybeUninit::new(0.0));
    }
    let mut weights = WeightTiles([[[0; TILE_BYTES]; DEPTH_TILES]; COLUMN_TILES]);
    let mut sums = [const { SumTiles([[[0; TILE]; TILE]; COLUMN_TILES]) }; 2];
    // Words of a tile of activations: no chunk is longer than the first.
    let depth = (2 * task.weight.chunk_depth(0).div_ceil(STEP_DEPTH)).min(TILE);
    let shapes = TileShapes::new(depth);
    // SAFETY: the shapes are valid; the system saves tiles for this process.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
    for (chunk, inputs) in chunks(task.weight).enumerate() {
        let steps = inputs.len().div_ceil(STEP_DEPTH);
        let depth_tiles = (2 * steps).div_ceil(depth);
        let part = Part { chunk, start: inputs.start, depth, depth_tiles };
        // SAFETY: the chunk lies within the weight; rows of activations end at a whole tile (`IntegerRows::fill`); row
        // tiles below `rows` only.
        unsafe {
            unpack(task, &part, steps, &mut weights);
            load_weights(&weights, depth_tiles);
            // The sums of the next tile of rows are made while those of the last are scaled.
            multiply(task, &part, 0, &mut sums[0]);
            for (index, row) in (0..rows).step_by(TILE).enumerate() {
                if row + TILE < rows {
                    multiply(task, &part, row + TILE, &mut sums[(index + 1) % 2]);
                }
                scale(task, &part, row, &sums[index % 2], &mut totals);
            }
        }
    }
    // SAFETY: no tile is used behind this.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
    for (row, values) in task.rows.clone().zip(totals.chunks_exact(PANEL_COLUMNS)) {
        // SAFETY: this task alone writes its panel of its rows, which the output holds; the first chunk, or the lack of
        // one, has written the totals of every row.
        unsafe {
            let values = std::slice::from_raw_parts(values.as_ptr().cast(), PANEL_COLUMNS);
            write_row(task.weight, task.bias, task.output, task.panel, row, values);
        }
    }
}

/// A chunk of the inputs.
struct Part {
    chunk: usize,
    start: usize,
    /// Words of a tile of activations.
    depth: usize,
    /// Tiles of activations in the chunk.
    depth_tiles: usize,
}

/// Unpacks the codes of a chunk; what the last tile has beyond it is zero.
#[inline(always)]
unsafe fn unpack<P: IntegerPanels>(task: &Task<'_, P>, part: &Part, steps: usize, weights: &mut WeightTiles) {
    type Vector = Avx512<true>;
    for (tile, weights) in weights.0.iter_mut().enumerate() {
        let to = weights.as_mut_ptr().cast::<u8>();
        for step in 0..steps {
            // SAFETY: the chunk has the step; tile `n` holds words `n * depth` and so on, `TILE_BYTES` apart.
            unsafe {
                let codes = task.weight.codes::<Vector>(task.panel, part.start, step, tile * TILE);
                for (odd, codes) in codes.into_iter().enumerate() {
                    let word = 2 * step + odd;
                    let at = word / part.depth * TILE_BYTES + word % part.depth * 4 * TILE;
                    Vector::store_u32(to.add(at).cast(), codes);
                }
            }
        }
        for word in 2 * steps..part.depth_tiles * part.depth {
            let at = word / part.depth * TILE_BYTES + word % part.depth * 4 * TILE;
            // SAFETY: as above.
            unsafe { to.add(at).write_bytes(0, 4 * TILE) };
        }
    }
}

/// Loads tiles 4 and 5 with the first column tile's weights, 6 and 7 with the second's.
#[inline(always)]
unsafe fn load_weights(weights: &WeightTiles, depth_tiles: usize) {
    let at = |column: usize, depth: usize| weights.0[column][depth].as_ptr();
    // SAFETY: every tile of weights is readable.
    unsafe {
        asm!(
            "tileloadd tmm4, [{first} + {stride} * 1]",
            "tileloadd tmm6, [{second} + {stride} * 1]",
            first = in(reg) at(0, 0),
            second = in(reg) at(1, 0),
            stride = in(reg) 4 * TILE,
            options(nostack, readonly),
        );
        if depth_tiles > 1 {
            asm!(
                "tileloadd tmm5, [{first} + {stride} * 1]",
                "tileloadd tmm7, [{second} + {stride} * 1]",
                first = in(reg) at(0, 1),
                second = in(reg) at(1, 1),
                stride = in(reg) 4 * TILE,
                options(nostack, readonly),
            );
        }
    }
}

/// The sums of 16 rows from `row` of the task on.
#[inline(always)]
unsafe fn multiply<P: IntegerPanels>(task: &Task<'_, P>, part: &Part, row: usize, sums: &mut SumTiles) {
    let words = task.input.words(task.rows.start + row, part.start);
    let stride = 4 * task.input.stride();
    let [first, second] = &mut sums.0;
    // SAFETY: 16 rows of words are readable (`IntegerRows::fill`), `sums` holds two tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm2, [{words} + {stride} * 1]",
            "tdpbsud tmm0, tmm2, tmm4",
            "tdpbsud tmm1, tmm2, tmm6",
            words = in(reg) words,
            stride = in(reg) stride,
            options(nostack, readonly),
        );
        if part.depth_tiles > 1 {
            asm!(
                "tileloadd tmm3, [{words} + {stride} * 1]",
                "tdpbsud tmm0, tmm3, tmm5",
                "tdpbsud tmm1, tmm3, tmm7",
                words = in(reg) words.add(part.depth),
                stride = in(reg) stride,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{first} + {stride} * 1], tmm0",
            "tilestored [{second} + {stride} * 1], tmm1",
            first = in(reg) first.as_mut_ptr(),
            second = in(reg) second.as_mut_ptr(),
            stride = in(reg) 4 * TILE,
            options(nostack),
        );
    }
}

/// Scales the sums of up to 16 rows from `row` of the task on, and adds them to the totals.
#[inline(always)]
unsafe fn scale<P: IntegerPanels>(
    task: &Task<'_, P>,
    part: &Part,
    row: usize,
    sums: &SumTiles,
    totals: &mut [MaybeUninit<f32>; ROW_BLOCK * PANEL_COLUMNS],
) {
    type Vector = Avx512<true>;
    // SAFETY: both vectors of columns lie in the panel, and the totals hold the rows.
    unsafe {
        let factors = factors::<Vector, P>(task, part.start, 0);
        for member in 0..TILE.min(task.rows.len() - row) {
            let of_row = task.input.factors(task.rows.start + row + member, part.chunk);
            let totals = totals.as_mut_ptr().add((row + member) * PANEL_COLUMNS).cast::<f32>();
            let mut of_columns = [Vector::splat(0.0); 2];
            if part.chunk > 0 {
                of_columns = [Vector::load(totals), Vector::load(totals.add(TILE))];
            }
            let sums =
                [Vector::load_i32(sums.0[0][member].as_ptr()), Vector::load_i32(sums.0[1][member].as_ptr())];
            add::<Vector>(&mut of_columns, sums, factors, of_row);
            Vector::store(totals, of_columns[0]);
            Vector::store(totals.add(TILE), of_columns[1]);
        }
    }
}
