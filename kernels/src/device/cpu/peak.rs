//! What the processor multiplies and reads at most: the limits of every operation.

use std::hint::black_box;
use std::time::Instant;

use super::aligned::AlignedVec;
use super::simd::{InstructionSet, Simd, dispatch};
use super::{Activations, Cpu};

/// Multiplications and additions a second that all threads do together with operands in registers.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Of `f32`.
    pub float: f64,
    /// What quantized weights multiply: bytes where activations are rounded, else `f32`.
    pub products: f64,
    /// What attention multiplies: bfloat16 where the cache is of it, else `f32`.
    pub attention: f64,
}

/// Sums of a loop: two vectors of weights times so many rows, enough to hide how long a sum takes.
const ROWS: usize = 6;
const ITERATIONS: usize = 20_000;
/// Measurements; the fastest counts.
const RUNS: usize = 20;
/// Bytes that are read to measure how fast: more than most caches hold. They are read in so many tasks.
const READ_BYTES: usize = 1 << 30;
const READ_TASKS: usize = 256;
const READ_RUNS: usize = 5;

impl Cpu {
    /// Measures [`Peak`] for its threads, instruction set and activations, in some milliseconds.
    pub fn peak(&self) -> Peak {
        let set = self.instruction_set();
        let float = self.fastest(&|operations| {
            // SAFETY: the set was detected.
            unsafe { dispatch!(set, multiply_floats(operations: &mut f64)) }
        });
        let rounded = self.activations == Activations::Integer;
        #[cfg(target_arch = "x86_64")]
        if rounded && set == InstructionSet::Amx {
            // SAFETY: the set was detected.
            let products = self.fastest(&|operations| unsafe { multiply_tiles_of_bytes(operations) });
            // SAFETY: as above.
            let attention = self.fastest(&|operations| unsafe { multiply_tiles_of_bfloat16(operations) });
            return Peak { float, products, attention };
        }
        let products = if rounded {
            self.fastest(&|operations| {
                // SAFETY: the set was detected.
                unsafe { dispatch!(set, multiply_bytes(operations: &mut f64)) }
            })
        } else {
            float
        };
        Peak { float, products, attention: float }
    }

    /// Bytes a second that all threads together read from memory in huge pages, as weights and the KV cache lie.
    pub fn read_bandwidth(&self) -> f64 {
        let set = self.instruction_set();
        let mut values = AlignedVec::<f32>::zeroed(READ_BYTES / size_of::<f32>());
        // Pages that were never written are all the same one.
        values.fill(1.0);
        let part = values.len() / READ_TASKS;
        let seconds = (0..READ_RUNS).map(|_| {
            let started = Instant::now();
            self.pool().run(READ_TASKS, &|task| {
                let values = &values[task * part..(task + 1) * part];
                // SAFETY: the set was detected.
                unsafe { dispatch!(set, read(values: &[f32])) };
            });
            started.elapsed().as_secs_f64()
        });
        READ_BYTES as f64 / seconds.fold(f64::INFINITY, f64::min)
    }

    /// Operations a second of `work` on all threads; it says how many it did.
    fn fastest(&self, work: &(dyn Fn(&mut f64) + Sync)) -> f64 {
        let threads = self.pool().threads();
        let mut operations = 0.0;
        work(&mut operations);
        let seconds = (0..RUNS).map(|_| {
            let started = Instant::now();
            self.pool().run(threads, &|_| work(&mut 0.0));
            started.elapsed().as_secs_f64()
        });
        operations * threads as f64 / seconds.fold(f64::INFINITY, f64::min)
    }
}

/// Reads `values`, which are whole cache lines, and asks for what comes later.
#[inline(always)]
unsafe fn read<S: Simd>(values: &[f32]) {
    const LINE: usize = 16;
    const AHEAD: usize = 32 * LINE;
    // SAFETY: the caller vouches for the instruction set; a line is whole vectors.
    unsafe {
        let mut sums = [S::splat(0.0); 2];
        for line in values.chunks_exact(LINE) {
            super::aligned::prefetch(line.as_ptr().wrapping_add(AHEAD));
            for (at, sum) in (0..LINE).step_by(S::WIDTH).zip([0, 1].into_iter().cycle()) {
                sums[sum] = S::add(sums[sum], S::load(line[at..].as_ptr()));
            }
        }
        black_box(S::sum(sums[0]) + S::sum(sums[1]));
    }
}

#[inline(always)]
unsafe fn multiply_floats<S: Simd>(operations: &mut f64) {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let (factor, addend) = (S::splat(black_box(0.5)), S::splat(black_box(1.0)));
        let mut sums = [[S::splat(0.0); 2]; ROWS];
        for _ in 0..ITERATIONS {
            for sum in sums.as_flattened_mut() {
                *sum = S::multiply_add(*sum, factor, addend);
            }
        }
        for sum in sums.as_flattened() {
            black_box(S::sum(*sum));
        }
    }
    *operations = (ITERATIONS * 2 * ROWS * S::WIDTH * 2) as f64;
}

#[inline(always)]
unsafe fn multiply_bytes<S: Simd>(operations: &mut f64) {
    /// Words of activations that take turns, so that no product is the last one again.
    const WORDS: usize = 64;
    let words = black_box([0x0102_0304_i32; WORDS + ROWS]);
    let codes = black_box([[1_u32; 16]; 2]);
    // SAFETY: the caller vouches for the instruction set; no vector is longer than 16.
    unsafe {
        let codes = [S::load_u32(codes[0].as_ptr()), S::load_u32(codes[1].as_ptr())];
        let mut sums = [[S::zero(); 2]; ROWS];
        for iteration in 0..ITERATIONS {
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = words[iteration % WORDS + row];
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    *sum = if S::PAIRS { S::dot_pairs(*sum, codes, word) } else { S::dot(*sum, codes, word) };
                }
            }
        }
        for sum in sums.as_flattened() {
            black_box(S::sum(S::to_f32(*sum)));
        }
    }
    *operations = (ITERATIONS * 2 * ROWS * S::WIDTH * 4 * 2) as f64;
}

/// Multiplies two tiles by two with the instruction `$instruction`, whose tiles have `$depth` terms for each sum.
#[cfg(target_arch = "x86_64")]
macro_rules! multiply_tiles {
    ($name:ident, $instruction:literal, $depth:literal) => {
        unsafe fn $name(operations: &mut f64) {
            use std::arch::asm;
            let mut shapes = super::tile_shapes::TileShapes::new();
            (0..8).for_each(|tile| shapes.set(tile, 16, 64));
            // SAFETY: the caller vouches for AMX; tiles that were just loaded are zeros.
            unsafe {
                let tiles = shapes.load();
                for _ in 0..ITERATIONS {
                    asm!(
                        concat!($instruction, " tmm0, tmm4, tmm6"),
                        concat!($instruction, " tmm1, tmm4, tmm7"),
                        concat!($instruction, " tmm2, tmm5, tmm6"),
                        concat!($instruction, " tmm3, tmm5, tmm7"),
                        options(nostack, nomem),
                    );
                }
                drop(tiles);
            }
            *operations = (ITERATIONS * 4 * 16 * 16 * $depth * 2) as f64;
        }
    };
}
#[cfg(target_arch = "x86_64")]
multiply_tiles!(multiply_tiles_of_bytes, "tdpbsud", 64);
#[cfg(target_arch = "x86_64")]
multiply_tiles!(multiply_tiles_of_bfloat16, "tdpbf16ps", 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_multiplies() {
        for set in InstructionSet::available() {
            for activations in [Activations::Float, Activations::Integer] {
                let peak = Cpu::with_instruction_set(2, set).with_activations(activations).peak();
                for operations in [peak.float, peak.products, peak.attention] {
                    assert!(operations.is_finite() && operations > 1e6, "{set:?} {activations:?}: {peak:?}");
                }
            }
        }
    }
}
