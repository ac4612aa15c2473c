//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// Sixteen lanes of AVX-512, with VNNI's dot products or without.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>;

impl<const VNNI: bool> Avx512<VNNI> {
    /// Sixteen integers.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn load_i32(from: *const i32) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    /// Writes sixteen words.
    ///
    /// # Safety
    /// As for [`Simd`].
    #[inline(always)]
    pub(crate) unsafe fn store_u32(to: *mut u32, words: __m512i) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast(), words) }
    }
}

// SAFETY of every block below: the trait's contract (the instruction set is available, pointers are valid
// for WIDTH elements) is what each intrinsic needs; none of them needs alignment.
impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const WIDTH: usize = 16;
    const TILE_ROWS: usize = 12;
    type F32 = __m512;
    type U32 = __m512i;
    type I32 = __m512i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                from.cast(),
            ))))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u32(from: *const u32) -> Self::U32 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn nibble(words: Self::U32, shift: u32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
            let digits = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
            );
            _mm512_permutexvar_ps(shifted, digits)
        }
    }

    #[inline(always)]
    unsafe fn nibbles(words: Self::U32) -> [Self::U32; 2] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            [_mm512_and_si512(words, mask), _mm512_and_si512(_mm512_srli_epi32::<4>(words), mask)]
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: see above. Without VNNI pairs are summed in 16 bits: 2 * 127 * 128 fits.
        unsafe {
            let activations = _mm512_set1_epi32(activations);
            if VNNI {
                _mm512_dpbusd_epi32(sum, codes, activations)
            } else {
                let pairs = _mm512_maddubs_epi16(codes, activations);
                _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            }
        }
    }

    const PAIRS: bool = !VNNI;

    #[inline(always)]
    unsafe fn dot_pairs(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(activations))) }
    }

    #[inline(always)]
    unsafe fn add_pairs(sum: Self::I32, pairs: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))) }
    }

    #[inline(always)]
    unsafe fn dot_bytes(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return Self::dot(sum, codes, activations);
            }
            let [low, high] = Self::nibbles(codes);
            let high = Self::dot(Self::zero(), high, activations);
            Self::dot(Self::add_16_times(sum, high), low, activations)
        }
    }

    #[inline(always)]
    unsafe fn add_16_times(sum: Self::I32, value: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(sum, _mm512_slli_epi32::<4>(value)) }
    }

    #[inline(always)]
    unsafe fn add_i32(a: Self::I32, b: Self::I32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn bits(words: Self::U32, shift: u32, mask: i32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(mask)))
        }
    }

    #[inline(always)]
    unsafe fn fifth_bits(words: Self::U32, step: u32) -> [Self::U32; 2] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm512_set1_epi8(16);
            let even = _mm512_sllv_epi32(words, _mm512_set1_epi32(4 - step as i32));
            let odd = _mm512_srlv_epi32(words, _mm512_set1_epi32(step as i32));
            [_mm512_and_si512(even, mask), _mm512_and_si512(odd, mask)]
        }
    }

    #[inline(always)]
    unsafe fn or(a: Self::U32, b: Self::U32) -> Self::U32 {
        // SAFETY: see above.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn to_f32(value: Self::I32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(value) }
    }

    #[inline(always)]
    unsafe fn to_i32(value: Self::F32) -> Self::I32 {
        // SAFETY: see above.
        unsafe { _mm512_cvtps_epi32(value) }
    }

    #[inline(always)]
    unsafe fn store_steps(to: *mut i32, value: Self::I32) {
        // SAFETY: see above.
        unsafe {
            let order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            _mm_storeu_si128(to.cast(), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(value), order));
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, value) }
    }

    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F32) {
        // SAFETY: see above.
        unsafe {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            _mm256_storeu_si256(to.cast(), halves);
        }
    }

    #[inline(always)]
    unsafe fn scale(value: Self::F32, exponent: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_scalef_ps(value, exponent) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn min(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn round(a: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    unsafe fn power_of_two(a: Self::F32) -> Self::F32 {
        // SAFETY: see above.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    unsafe fn sum(a: Self::F32) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(a) }
    }

    #[inline(always)]
    unsafe fn largest(a: Self::F32) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(a) }
    }
}
