//! Eight lanes in plain Rust, for processors without a faster set and as a check of the others.

use half::{bf16, f16};

use super::Simd;

const LANES: usize = 8;

/// Plain Rust, any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn each(function: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(function)
}

impl Simd for Portable {
    const WIDTH: usize = LANES;
    const TILE_ROWS: usize = 4;
    type F32 = [f32; LANES];
    type U32 = [u32; LANES];
    type I32 = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        // SAFETY: the caller gives LANES readable elements.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F32 {
        // SAFETY: the caller gives LANES readable elements.
        let values = unsafe { from.cast::<[f16; LANES]>().read_unaligned() };
        each(|lane| values[lane].to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::F32 {
        // SAFETY: the caller gives LANES readable elements.
        let values = unsafe { from.cast::<[bf16; LANES]>().read_unaligned() };
        each(|lane| values[lane].to_f32())
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F32 {
        // SAFETY: the caller gives LANES readable elements.
        let values = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        each(|lane| f32::from(values[lane]))
    }
    #[inline(always)]
    unsafe fn load_u32(from: *const u32) -> Self::U32 {
        // SAFETY: the caller gives LANES readable elements.
        unsafe { from.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn nibble(words: Self::U32, shift: u32) -> Self::F32 {
        each(|lane| ((words[lane] >> shift) & 15) as f32)
    }
    #[inline(always)]
    unsafe fn nibbles(words: Self::U32) -> [Self::U32; 2] {
        [words.map(|word| word & 0x0F0F_0F0F), words.map(|word| word >> 4 & 0x0F0F_0F0F)]
    }
    #[inline(always)]
    unsafe fn zero() -> Self::I32 {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        let activations = activations.to_le_bytes().map(|byte| i32::from(byte as i8));
        std::array::from_fn(|lane| {
            let codes = codes[lane].to_le_bytes().map(i32::from);
            codes.iter().zip(activations).fold(sum[lane], |sum, (code, activation)| sum + code * activation)
        })
    }
    #[inline(always)]
    unsafe fn add_16_times(sum: Self::I32, value: Self::I32) -> Self::I32 {
        std::array::from_fn(|lane| sum[lane] + 16 * value[lane])
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I32, b: Self::I32) -> Self::I32 {
        std::array::from_fn(|lane| a[lane].wrapping_add(b[lane]))
    }
    #[inline(always)]
    unsafe fn bits(words: Self::U32, shift: u32, mask: i32) -> Self::F32 {
        each(|lane| (words[lane] >> shift & mask as u32) as f32)
    }
    #[inline(always)]
    unsafe fn fifth_bits(words: Self::U32, step: u32) -> [Self::U32; 2] {
        [words.map(|word| word << (4 - step) & 0x1010_1010), words.map(|word| word >> step & 0x1010_1010)]
    }
    #[inline(always)]
    unsafe fn or(a: Self::U32, b: Self::U32) -> Self::U32 {
        std::array::from_fn(|lane| a[lane] | b[lane])
    }
    #[inline(always)]
    unsafe fn to_f32(value: Self::I32) -> Self::F32 {
        value.map(|value| value as f32)
    }
    #[inline(always)]
    unsafe fn to_i32(value: Self::F32) -> Self::I32 {
        value.map(|value| value.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn store_steps(to: *mut i32, value: Self::I32) {
        let bytes = [0, 2, 4, 6, 1, 3, 5, 7].map(|lane| value[lane] as u8);
        // SAFETY: the caller gives LANES writable bytes.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(bytes) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        // SAFETY: the caller gives LANES writable elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F32) {
        // SAFETY: the caller gives LANES writable elements.
        unsafe { to.cast::<[f16; LANES]>().write_unaligned(value.map(f16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane] + b[lane])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane] - b[lane])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane] * b[lane])
    }
    #[inline(always)]
    unsafe fn div(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane] / b[lane])
    }
    // Two roundings: a fused multiply-add without the instruction is a library call.
    #[inline(always)]
    unsafe fn multiply_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each(|lane| a[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane].max(b[lane]))
    }
    #[inline(always)]
    unsafe fn min(a: Self::F32, b: Self::F32) -> Self::F32 {
        each(|lane| a[lane].min(b[lane]))
    }
    #[inline(always)]
    unsafe fn round(a: Self::F32) -> Self::F32 {
        each(|lane| a[lane].round_ties_even())
    }
    #[inline(always)]
    unsafe fn power_of_two(a: Self::F32) -> Self::F32 {
        each(|lane| f32::from_bits(((a[lane] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F32) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(a: Self::F32) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}
