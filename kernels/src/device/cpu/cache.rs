//! Keys and values as the CPU holds them: as they are, or in half precision where activations are rounded as well. A
//! decode step reads the cache of its sequence once, so its bytes count like those of the weights.

use half::f16;

use super::aligned::AlignedVec;
use super::simd::Simd;
use crate::backend::{Activations, Length};
use crate::error::KernelError;

/// Keys or values of a layer on the CPU device.
#[derive(Clone)]
pub struct CpuCache(pub(crate) CacheValues);

/// The element types of a [`CpuCache`].
#[derive(Clone)]
pub(crate) enum CacheValues {
    F32(AlignedVec<f32>),
    F16(AlignedVec<f16>),
}

/// What a cache may be made of.
pub(crate) trait CacheElement: bytemuck::Pod + Send + Sync {
    /// Whether to widen it takes work.
    const NARROW: bool;

    /// The nearest element.
    fn round(value: f32) -> Self;
    /// Widens [`Simd::WIDTH`] elements.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32;
    /// Writes the elements nearest to `value`.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn store<S: Simd>(to: *mut Self, value: S::F32);
}

impl CacheElement for f32 {
    const NARROW: bool = false;

    fn round(value: f32) -> Self {
        value
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, value: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { S::store(to, value) }
    }
}

impl CacheElement for f16 {
    const NARROW: bool = true;

    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, value: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { S::store_f16(to, value) }
    }
}

impl CpuCache {
    /// Bytes of a key or value where `activations` multiply.
    pub const fn element_bytes(activations: Activations) -> usize {
        match activations {
            Activations::Float => size_of::<f32>(),
            Activations::Integer => size_of::<f16>(),
        }
    }

    pub(super) fn zeroed(elements: usize, activations: Activations) -> Self {
        Self(match activations {
            Activations::Float => CacheValues::F32(AlignedVec::zeroed(elements)),
            Activations::Integer => CacheValues::F16(AlignedVec::zeroed(elements)),
        })
    }

    pub(super) fn write(&mut self, values: &[f32]) -> Result<(), KernelError> {
        super::fits("write_cache", values.len(), self.length())?;
        match &mut self.0 {
            CacheValues::F32(cache) => write(values, cache),
            CacheValues::F16(cache) => write(values, cache),
        }
        Ok(())
    }
}

fn write<E: CacheElement>(values: &[f32], to: &mut [E]) {
    for (to, &value) in to.iter_mut().zip(values) {
        *to = E::round(value);
    }
}

impl Length for CpuCache {
    fn length(&self) -> usize {
        match &self.0 {
            CacheValues::F32(values) => values.len(),
            CacheValues::F16(values) => values.len(),
        }
    }
}
