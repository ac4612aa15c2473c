//! Eight lanes of AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// Eight lanes of AVX2 with FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

// SAFETY of every block below: the trait's contract (the instruction set is available, pointers are valid
// for WIDTH elements) is what each intrinsic needs; none of them needs alignment.
impl Simd for Avx2 {
    const WIDTH: usize = 8;
    const TILE_ROWS: usize = 6;
    type F32 = __m256;
    type U32 = __m256i;
    type I32 = __m256i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u32(from: *const u32) -> Self::U32 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn nibble(words: Self::U32, shift: u32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)))
        }
    }

    #[inline(always)]
    unsafe fn nibbles(words: Self::U32) -> [Self::U32; 2] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(words, mask), _mm256_and_si256(_mm256_srli_epi32::<4>(words), mask)]
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: see above. Pairs are summed in 16 bits: 2 * 127 * 128 fits.
        unsafe {
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(activations));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    const PAIRS: bool = true;

    #[inline(always)]
    unsafe fn dot_pairs(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(activations))) }
    }

    #[inline(always)]
    unsafe fn add_pairs(sum: Self::I32, pairs: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))) }
    }

    #[inline(always)]
    unsafe fn add_16_times(sum: Self::I32, value: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(sum, _mm256_slli_epi32::<4>(value)) }
    }

    #[inline(always)]
    unsafe fn add_i32(a: Self::I32, b: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn bits(words: Self::U32, shift: u32, mask: i32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(mask)))
        }
    }

    #[inline(always)]
    unsafe fn fifth_bits(words: Self::U32, step: u32) -> [Self::U32; 2] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi8(16);
            let even = _mm256_sllv_epi32(words, _mm256_set1_epi32(4 - step as i32));
            let odd = _mm256_srlv_epi32(words, _mm256_set1_epi32(step as i32));
            [_mm256_and_si256(even, mask), _mm256_and_si256(odd, mask)]
        }
    }

    #[inline(always)]
    unsafe fn or(a: Self::U32, b: Self::U32) -> Self::U32 {
        // SAFETY: see above.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    unsafe fn to_f32(value: Self::I32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(value) }
    }

    #[inline(always)]
    unsafe fn to_i32(value: Self::F32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm256_cvtps_epi32(value) }
    }

    #[inline(always)]
    unsafe fn store_steps(to: *mut i32, value: Self::I32) {
        // SAFETY: see above. Each half gives two even bytes, then two odd ones; pairs of both halves follow each other.
        unsafe {
            let order = _mm_setr_epi8(0, 8, 4, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
            let low = _mm_shuffle_epi8(_mm256_castsi256_si128(value), order);
            let high = _mm_shuffle_epi8(_mm256_extracti128_si256::<1>(value), order);
            _mm_storel_epi64(to.cast(), _mm_unpacklo_epi16(low, high));
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F32) {
        // SAFETY: see above.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
            _mm_storeu_si128(to.cast(), halves);
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn min(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn round(a: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    unsafe fn power_of_two(a: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    unsafe fn sum(a: Self::F32) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn largest(a: Self::F32) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
}
