//! The 16-bit element types of the CUDA device, and the copies that convert to and from them.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::driver::{Address, Driver};
use crate::error::KernelError;
use crate::tensor::FloatType;

/// Elements that are converted at once: bounds the second copy of a large matrix on the host.
const CHUNK: usize = 4 << 20;

/// Threads that convert a large read, and the elements that are worth one.
const MOST_THREADS: usize = 8;
const LEAST_SHARE: usize = 1 << 18;

/// The type of activations, caches and dense weights on a CUDA device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.float_type().fmt(f)
    }
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        self.float_type().bytes()
    }

    /// The same type of a matrix on the host.
    pub fn float_type(self) -> FloatType {
        match self {
            Self::F16 => FloatType::F16,
            Self::BF16 => FloatType::BF16,
        }
    }

    /// The bits of `value`, rounded to nearest even.
    pub fn round(self, value: f32) -> u16 {
        match self {
            Self::F16 => f16::from_f32(value).to_bits(),
            Self::BF16 => bf16::from_f32(value).to_bits(),
        }
    }

    /// The value of an element with the bits `bits`.
    pub fn widen(self, bits: u16) -> f32 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f32(),
            Self::BF16 => bf16::from_bits(bits).to_f32(),
        }
    }

    /// Copies `values`, rounded to nearest even, to device memory.
    pub(super) fn write(self, driver: &dyn Driver, values: &[f32], to: Address) -> Result<(), KernelError> {
        match self {
            Self::F16 => write::<f16>(driver, values, to, HalfFloatSliceExt::convert_from_f32_slice),
            Self::BF16 => write::<bf16>(driver, values, to, HalfFloatSliceExt::convert_from_f32_slice),
        }
    }

    /// Copies elements in device memory to `to`, by way of `staging`.
    pub(super) fn read(
        self,
        driver: &dyn Driver,
        from: Address,
        to: &mut [f32],
        staging: &mut Vec<u16>,
    ) -> Result<(), KernelError> {
        if staging.len() < to.len() {
            staging.resize(to.len(), 0);
        }
        let staging = &mut staging[..to.len()];
        driver.read(from, cast_slice_mut(staging))?;
        // The logits of a large batch are millions of values in memory that nobody has touched yet: one thread would
        // take longer for them than a card for a step.
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let share = to.len().div_ceil(threads).max(LEAST_SHARE);
        let mut shares = staging.chunks(share).zip(to.chunks_mut(share));
        let Some((own_halves, own_values)) = shares.next() else { return Ok(()) };
        std::thread::scope(|scope| {
            for (halves, values) in shares {
                scope.spawn(move || self.widen_all(halves, values));
            }
            self.widen_all(own_halves, own_values);
        });
        Ok(())
    }

    /// The values of elements with the bits `halves`.
    fn widen_all(self, halves: &[u16], values: &mut [f32]) {
        match self {
            Self::F16 => cast_slice::<u16, f16>(halves).convert_to_f32_slice(values),
            Self::BF16 => cast_slice::<u16, bf16>(halves).convert_to_f32_slice(values),
        }
    }
}

fn write<H: Pod>(
    driver: &dyn Driver,
    values: &[f32],
    to: Address,
    convert: impl Fn(&mut [H], &[f32]),
) -> Result<(), KernelError> {
    let mut halves = vec![H::zeroed(); values.len().min(CHUNK)];
    for (index, chunk) in values.chunks(CHUNK).enumerate() {
        let halves = &mut halves[..chunk.len()];
        convert(halves, chunk);
        driver.write(cast_slice(halves), to + (index * CHUNK * size_of::<H>()) as Address)?;
    }
    Ok(())
}
