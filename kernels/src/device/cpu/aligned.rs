//! Memory that starts on a cache line, so that a vector load never straddles two.

use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

const LINE_BYTES: usize = 64;

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// Asks for the cache line at `address`, which may lie anywhere.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it has no effect on what the program computes.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the cache lines of the `bytes` bytes from `address` on.
#[inline(always)]
pub(crate) fn prefetch_bytes<T>(address: *const T, bytes: usize) {
    for at in (0..bytes).step_by(LINE_BYTES) {
        prefetch(address.wrapping_byte_add(at));
    }
}

/// A fixed number of zero-initialized elements, 64-byte aligned. Large ones are mapped: their pages are zeroed when they are
/// first touched, and are huge where the system has such, because rows of activations lie in many pages.
pub(crate) struct AlignedVec<T> {
    memory: Memory,
    len: usize,
    element: PhantomData<T>,
}

/// The memory of an [`AlignedVec`], and how many bytes of it are before the first element.
enum Memory {
    Allocated(Vec<Line>),
    Mapped(MmapMut, usize),
}

/// From this many bytes on memory is mapped.
const MAPPED_BYTES: usize = 1 << 20;
const HUGE_PAGE_BYTES: usize = 2 << 20;

impl Memory {
    fn zeroed(bytes: usize) -> Self {
        let mapped = if bytes < MAPPED_BYTES { None } else { Self::map(bytes) };
        mapped.unwrap_or_else(|| Self::Allocated(vec![Line::zeroed(); bytes.div_ceil(LINE_BYTES)]))
    }

    /// Nothing where the system maps no memory.
    fn map(bytes: usize) -> Option<Self> {
        let map = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES)?).ok()?;
        // The system may not know huge pages, or may not give them: the memory is there all the same.
        #[cfg(target_os = "linux")]
        drop(map.advise(memmap2::Advice::HugePage));
        let before = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
        Some(Self::Mapped(map, before))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Allocated(lines) => bytemuck::cast_slice(lines),
            Self::Mapped(map, before) => &map[*before..],
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Allocated(lines) => bytemuck::cast_slice_mut(lines),
            Self::Mapped(map, before) => &mut map[*before..],
        }
    }
}

impl<T: Pod> AlignedVec<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { memory: Memory::zeroed(len * size_of::<T>()), len, element: PhantomData }
    }

    /// Bytes it holds, whole cache lines.
    pub(crate) fn bytes(&self) -> usize {
        (self.len * size_of::<T>()).next_multiple_of(LINE_BYTES)
    }
}

impl<T: Pod> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Pod> std::ops::Deref for AlignedVec<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.memory.bytes()[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> std::ops::DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = self.len * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.memory.bytes_mut()[..bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_is_zero_and_aligned_and_copies_are_their_own() {
        for len in [0, 1, 1000, MAPPED_BYTES / 4, 3 * HUGE_PAGE_BYTES / 4 + 5] {
            let mut values = AlignedVec::<f32>::zeroed(len);
            assert!(values.len() == len && values.iter().all(|&value| value == 0.0));
            assert!(values.as_ptr().addr().is_multiple_of(LINE_BYTES));
            assert!(values.bytes() >= 4 * len && values.bytes() < 4 * len + LINE_BYTES);
            values.fill(1.0);
            let copy = values.clone();
            values.fill(2.0);
            assert!(copy.len() == len && copy.iter().all(|&value| value == 1.0));
        }
    }
}
