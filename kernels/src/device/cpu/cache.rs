//! Keys and values as the CPU holds them: as they are, or in half precision where activations are rounded as well. A
//! decode step reads the cache of its sequence once, so its bytes count like those of the weights.
//!
//! Tiles of AMX multiply pairs of bfloat16, so there the cache is of such pairs, and its blocks are tiles as they lie:
//!
//! ```text
//! keys     [block][kv_head][head_dim / 2][16 tokens][2 elements]
//! values   [block][kv_head][8 pairs of tokens][head_dim][2 tokens]
//! ```

use half::{bf16, f16};

use super::aligned::AlignedVec;
use super::simd::{InstructionSet, Simd};
use crate::backend::{Activations, Length};
use crate::error::KernelError;
use crate::ops::paged_attention::BLOCK_SIZE;

/// Keys or values of a layer on the CPU device.
#[derive(Clone)]
pub struct CpuCache(pub(crate) CacheValues);

/// The element types of a [`CpuCache`].
#[derive(Clone)]
pub(crate) enum CacheValues {
    F32(AlignedVec<f32>),
    F16(AlignedVec<f16>),
    Pairs(AlignedVec<Paired>),
}

/// An element of a cache in pairs, for tiles.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(transparent)]
pub(crate) struct Paired(bf16);

/// What a cache may be made of.
pub(crate) trait CacheElement: bytemuck::Pod + Send + Sync {
    /// Whether to widen it takes work.
    const NARROW: bool;
    /// Whether the elements are in pairs, for tiles.
    const PAIRED: bool = false;

    /// Where an element of a key lies in its block.
    #[inline(always)]
    fn key_at(token: usize, element: usize) -> usize {
        element * BLOCK_SIZE + token
    }
    /// Where an element of a value lies in its block.
    #[inline(always)]
    fn value_at(token: usize, element: usize, head_dim: usize) -> usize {
        token * head_dim + element
    }

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

impl CacheElement for Paired {
    const NARROW: bool = true;
    const PAIRED: bool = true;

    #[inline(always)]
    fn key_at(token: usize, element: usize) -> usize {
        (element / 2 * BLOCK_SIZE + token) * 2 + element % 2
    }
    #[inline(always)]
    fn value_at(token: usize, element: usize, head_dim: usize) -> usize {
        (token / 2 * head_dim + element) * 2 + token % 2
    }
    fn round(value: f32) -> Self {
        Self(bf16::from_f32(value))
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: the caller's promise; a `Paired` lies in memory as a bf16 does.
        unsafe { S::load_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(to: *mut Self, value: S::F32) {
        // SAFETY: the caller's promise, as above.
        unsafe { S::store_bf16(to.cast(), value) }
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

    pub(super) fn zeroed(elements: usize, activations: Activations, set: InstructionSet) -> Self {
        Self(match (activations, set) {
            (Activations::Float, _) => CacheValues::F32(AlignedVec::zeroed(elements)),
            (Activations::Integer, InstructionSet::Amx) => CacheValues::Pairs(AlignedVec::zeroed(elements)),
            (Activations::Integer, _) => CacheValues::F16(AlignedVec::zeroed(elements)),
        })
    }

    pub(super) fn write(&mut self, values: &[f32]) -> Result<(), KernelError> {
        super::fits("write_cache", values.len(), self.length())?;
        match &mut self.0 {
            CacheValues::F32(cache) => write(values, cache),
            CacheValues::F16(cache) => write(values, cache),
            CacheValues::Pairs(cache) => write(values, cache),
        }
        Ok(())
    }
}

#[cfg(test)]
impl CpuCache {
    /// An element of the key of a token, in the block that begins at `start`.
    pub(crate) fn key(&self, start: usize, token: usize, element: usize) -> f32 {
        match &self.0 {
            CacheValues::F32(keys) => keys[start + f32::key_at(token, element)],
            CacheValues::F16(keys) => keys[start + f16::key_at(token, element)].to_f32(),
            CacheValues::Pairs(keys) => keys[start + Paired::key_at(token, element)].0.to_f32(),
        }
    }

    /// The same of its value.
    pub(crate) fn value(&self, start: usize, token: usize, element: usize, head_dim: usize) -> f32 {
        match &self.0 {
            CacheValues::F32(values) => values[start + f32::value_at(token, element, head_dim)],
            CacheValues::F16(values) => values[start + f16::value_at(token, element, head_dim)].to_f32(),
            CacheValues::Pairs(values) => {
                values[start + Paired::value_at(token, element, head_dim)].0.to_f32()
            }
        }
    }

    /// `value` as it is kept.
    pub(crate) fn rounded(&self, value: f32) -> f32 {
        match &self.0 {
            CacheValues::F32(_) => value,
            CacheValues::F16(_) => f16::from_f32(value).to_f32(),
            CacheValues::Pairs(_) => bf16::from_f32(value).to_f32(),
        }
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
            CacheValues::Pairs(values) => values.len(),
        }
    }
}
