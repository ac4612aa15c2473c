//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// Sixteen lanes of AVX-512.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY of every block below: the trait's contract (the instruction set is available, pointers are valid
// for WIDTH elements) is what each intrinsic needs; none of them needs alignment.
impl Simd for Avx512 {
    const WIDTH: usize = 16;
    const TILE_ROWS: usize = 12;
    type F32 = __m512;
    type U32 = __m512i;

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
    unsafe fn store(to: *mut f32, value: Self::F32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, value) }
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
