//! Vectors of `f32`: one small trait, so that each operation is written once for every instruction set.
//!
//! Code generic over [`Simd`] is `#[inline(always)]` down to the wrapper that [`dispatch!`] makes, which
//! alone carries `#[target_feature]`: only there does the compiler know the instructions it may use.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// The instruction sets the CPU device is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// Plain Rust, any processor.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same with VNNI's integer dot products.
    Avx512Vnni,
    /// The same with AMX's products of tiles of bytes and of bfloat16.
    Amx,
}

impl std::fmt::Display for InstructionSet {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Amx => "amx",
        })
    }
}

impl InstructionSet {
    /// Every instruction set this processor has, fastest last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                found.push(Self::Avx2);
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    found.push(Self::Avx512);
                    if is_x86_feature_detected!("avx512vnni") {
                        found.push(Self::Avx512Vnni);
                        if super::tile_shapes::available() {
                            found.push(Self::Amx);
                        }
                    }
                }
            }
        }
        found
    }

    /// The fastest instruction set this processor has.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }
}

/// Dot products of codes of four bits whose sums of pairs fit 16 bits: 8 * 2 * 15 * 127 < 2^15.
pub(crate) const DOTS_OF_PAIRS: usize = 8;

/// Vector arithmetic. All functions are safe to call only where the instruction set is available;
/// pointers must be valid for [`Simd::WIDTH`] elements and need no alignment.
pub(crate) trait Simd: Copy {
    /// Elements of a vector.
    const WIDTH: usize;
    /// Rows of the widest tile that stays in registers at two vectors of columns.
    const TILE_ROWS: usize;
    /// `WIDTH` values.
    type F32: Copy;
    /// `WIDTH` unsigned words.
    type U32: Copy;
    /// `WIDTH` sums of integers.
    type I32: Copy;

    unsafe fn splat(value: f32) -> Self::F32;
    unsafe fn load(from: *const f32) -> Self::F32;
    unsafe fn load_f16(from: *const f16) -> Self::F32;
    unsafe fn load_bf16(from: *const bf16) -> Self::F32;
    unsafe fn load_u8(from: *const u8) -> Self::F32;
    unsafe fn load_u32(from: *const u32) -> Self::U32;
    /// `(words >> shift) & 15` as `f32`.
    unsafe fn nibble(words: Self::U32, shift: u32) -> Self::F32;
    /// The low and the high four bits of each byte.
    unsafe fn nibbles(words: Self::U32) -> [Self::U32; 2];
    unsafe fn zero() -> Self::I32;
    /// `sum + codes[0] * activations[0] + ... + codes[3] * activations[3]` in each element, of the bytes of `codes`,
    /// without sign and below 128, and of `activations`, with sign.
    unsafe fn dot(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32;
    /// The same for any bytes.
    #[inline(always)]
    unsafe fn dot_bytes(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let [low, high] = Self::nibbles(codes);
            let high = Self::dot(Self::zero(), high, activations);
            Self::dot(Self::add_16_times(sum, high), low, activations)
        }
    }
    /// Whether products of bytes are summed in pairs of 16 bits first: then [`Simd::dot_pairs`] is faster than
    /// [`Simd::dot`] where codes have four bits.
    const PAIRS: bool = false;
    /// `sum` and such pairs: at most [`DOTS_OF_PAIRS`] of codes of four bits fit.
    #[inline(always)]
    unsafe fn dot_pairs(sum: Self::I32, codes: Self::U32, activations: i32) -> Self::I32 {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { Self::dot(sum, codes, activations) }
    }
    /// `sum` and the sums of [`Simd::dot_pairs`].
    #[inline(always)]
    unsafe fn add_pairs(sum: Self::I32, pairs: Self::I32) -> Self::I32 {
        // SAFETY: the caller vouches for the instruction set.
        unsafe { Self::add_i32(sum, pairs) }
    }
    /// `sum + 16 * value`.
    unsafe fn add_16_times(sum: Self::I32, value: Self::I32) -> Self::I32;
    unsafe fn add_i32(a: Self::I32, b: Self::I32) -> Self::I32;
    /// `(words >> shift) & mask` as `f32`.
    unsafe fn bits(words: Self::U32, shift: u32, mask: i32) -> Self::F32;
    /// Bits `step` and `4 + step` of each byte, below 4, moved to bit 4.
    unsafe fn fifth_bits(words: Self::U32, step: u32) -> [Self::U32; 2];
    unsafe fn or(a: Self::U32, b: Self::U32) -> Self::U32;
    unsafe fn to_f32(value: Self::I32) -> Self::F32;
    /// The nearest integers.
    unsafe fn to_i32(value: Self::F32) -> Self::I32;
    /// Writes the low bytes of each eight integers as two words: those of 0, 2, 4 and 6, then those of 1, 3, 5 and 7.
    unsafe fn store_steps(to: *mut i32, value: Self::I32);
    unsafe fn store(to: *mut f32, value: Self::F32);
    /// Rounds to nearest, ties to even.
    unsafe fn store_f16(to: *mut f16, value: Self::F32);
    /// Rounds to nearest, ties to even.
    #[inline(always)]
    unsafe fn store_bf16(to: *mut bf16, value: Self::F32) {
        let mut values = [0.0f32; 16];
        // SAFETY: no vector is longer than 16, and `to` has room for one.
        unsafe {
            Self::store(values.as_mut_ptr(), value);
            for (at, &value) in values[..Self::WIDTH].iter().enumerate() {
                *to.add(at) = bf16::from_f32(value);
            }
        }
    }
    /// `value * 2^exponent` for an integer exponent in -126..=128; once rounded, where the result is that small.
    #[inline(always)]
    unsafe fn scale(value: Self::F32, exponent: Self::F32) -> Self::F32 {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            // Two factors, because 2^-126 times a value below 1 must not be cut off at 2^-126.
            let half = Self::round(Self::mul(exponent, Self::splat(0.5)));
            let scaled = Self::mul(value, Self::power_of_two(half));
            Self::mul(scaled, Self::power_of_two(Self::sub(exponent, half)))
        }
    }
    unsafe fn add(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn sub(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn div(a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the processor can.
    unsafe fn multiply_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32;
    unsafe fn min(a: Self::F32, b: Self::F32) -> Self::F32;
    /// Nearest integers, as values.
    unsafe fn round(a: Self::F32) -> Self::F32;
    /// `2^a` for integers `a` in -126..=127.
    unsafe fn power_of_two(a: Self::F32) -> Self::F32;
    /// The sum of all elements, in one fixed order.
    unsafe fn sum(a: Self::F32) -> f32;
    /// The largest element.
    unsafe fn largest(a: Self::F32) -> f32;

    /// `e^a` to about 2 units in the last place, `a` clamped to -87..=88: below, the result would be a subnormal number, which
    /// takes processors many times as long, and softmax asks for it of every key that a query does not see.
    ///
    /// Cody-Waite reduction by ln 2 and the degree-6 polynomial of Cephes `expf` (S. Moshier).
    #[inline(always)]
    unsafe fn exp(a: Self::F32) -> Self::F32 {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let clamped = Self::min(Self::max(a, Self::splat(-87.0)), Self::splat(88.0));
            let exponent = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            let rest = Self::multiply_add(exponent, Self::splat(-0.693_359_4), clamped);
            let rest = Self::multiply_add(exponent, Self::splat(2.121_944_4e-4), rest);
            let mut polynomial = Self::splat(1.987_569_1e-4);
            for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                polynomial = Self::multiply_add(polynomial, rest, Self::splat(coefficient));
            }
            let square = Self::mul(rest, rest);
            let value = Self::add(Self::multiply_add(polynomial, square, rest), Self::splat(1.0));
            Self::scale(value, exponent)
        }
    }
}

/// Calls `function::<S>(arguments)` compiled for the instruction set `$set`.
///
/// The function must be `unsafe`, generic over `S: Simd` (and the one parameter given) and `#[inline(always)]`.
macro_rules! dispatch {
    ($set:expr, $(<$parameter:ident : $bound:path>)? $function:ident ( $($name:ident : $kind:ty),* $(,)? )) => {{
        use $crate::device::cpu::simd;
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn with_avx2 $(<$parameter: $bound>)? ($($name: $kind),*) {
            // SAFETY: this function's target features are those of `Avx2`; the rest is the caller's.
            unsafe { $function::<simd::Avx2 $(, $parameter)?>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
        unsafe fn with_avx512 $(<$parameter: $bound>)? ($($name: $kind),*) {
            // SAFETY: this function's target features are those of `Avx512`; the rest is the caller's.
            unsafe { $function::<simd::Avx512<false> $(, $parameter)?>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        unsafe fn with_vnni $(<$parameter: $bound>)? ($($name: $kind),*) {
            // SAFETY: this function's target features are those of `Avx512` with VNNI; the rest is the caller's.
            unsafe { $function::<simd::Avx512<true> $(, $parameter)?>($($name),*) }
        }
        match $set {
            #[cfg(target_arch = "x86_64")]
            simd::InstructionSet::Avx2 => with_avx2($($name),*),
            #[cfg(target_arch = "x86_64")]
            simd::InstructionSet::Avx512 => with_avx512($($name),*),
            #[cfg(target_arch = "x86_64")]
            simd::InstructionSet::Avx512Vnni | simd::InstructionSet::Amx => with_vnni($($name),*),
            _ => $function::<simd::Portable $(, $parameter)?>($($name),*),
        }
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::{InstructionSet, Simd};

    #[inline(always)]
    unsafe fn exp_all<S: Simd>(values: &mut [f32]) {
        for chunk in values.chunks_exact_mut(S::WIDTH) {
            // SAFETY: the chunk holds WIDTH elements; `dispatch` vouches for the instruction set.
            unsafe { S::store(chunk.as_mut_ptr(), S::exp(S::load(chunk.as_ptr()))) };
        }
    }

    #[test]
    fn exp_agrees_with_the_library_on_every_instruction_set() {
        let inputs: Vec<f32> = (0..32 * 600).map(|i| (i as f32 - 9000.0) / 105.0).collect();
        for set in InstructionSet::available() {
            let mut values = inputs.clone();
            let values = &mut values[..];
            // SAFETY: `set` is available here, and the slice is a multiple of every width.
            unsafe { dispatch!(set, exp_all(values: &mut [f32])) };
            for (&input, &value) in inputs.iter().zip(&*values) {
                let expected = f64::from(input.clamp(-87.0, 88.0)).exp();
                let error = (f64::from(value) - expected).abs() / expected;
                assert!(error < 4e-7, "{set:?}: exp({input}) = {value}, error {error:e}");
            }
        }
    }
}
