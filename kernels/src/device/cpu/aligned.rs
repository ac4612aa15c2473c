//! Memory that starts on a cache line, so that a vector load never straddles two.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

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
/// first touched, and are huge where the system has such. Weights and rows of activations lie in many pages, and a processor
/// that looks up a page for every 4 KiB reads them more slowly; so ones of some size share a mapping.
pub(crate) struct AlignedVec<T> {
    memory: Memory,
    len: usize,
    element: PhantomData<T>,
}

/// The memory of an [`AlignedVec`].
enum Memory {
    Allocated(Vec<Line>),
    /// From an offset on, nobody else's.
    Mapped(Arc<Mapping>, usize),
}

/// From this many bytes on memory is mapped, and from as many in a mapping of its own.
const MAPPED_BYTES: usize = 32 << 10;
const OWN_MAPPING_BYTES: usize = 4 << 20;
/// Bytes of a mapping that is shared. It is given back with the last that lies in it.
const SHARED_MAPPING_BYTES: usize = 16 << 20;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory of the system, handed out in parts, each once.
struct Mapping {
    /// Where the first huge page begins.
    start: NonNull<u8>,
    /// Unmaps it when it is dropped.
    _map: MmapMut,
}

// SAFETY: a mapping is memory that any thread may use; its parts belong to one `AlignedVec` each.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// At least `bytes` bytes, zero. Nothing where the system maps no memory.
    fn new(bytes: usize) -> Option<Arc<Self>> {
        // Whole huge pages, wherever the mapping begins.
        let bytes = bytes.checked_next_multiple_of(HUGE_PAGE_BYTES)?;
        let mut map = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES)?).ok()?;
        // The system may not know huge pages, or may not give them: the memory is there all the same.
        #[cfg(target_os = "linux")]
        drop(map.advise(memmap2::Advice::HugePage));
        let before = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
        let start = NonNull::new(map.as_mut_ptr().wrapping_add(before))?;
        Some(Arc::new(Self { start, _map: map }))
    }
}

/// The shared mapping that is being handed out, and how many bytes of it are.
static SHARED: Mutex<Option<(Arc<Mapping>, usize)>> = Mutex::new(None);

impl Memory {
    fn zeroed(bytes: usize) -> Self {
        let mapped = match bytes {
            ..MAPPED_BYTES => None,
            MAPPED_BYTES..OWN_MAPPING_BYTES => Self::share(bytes),
            _ => Mapping::new(bytes).map(|mapping| Self::Mapped(mapping, 0)),
        };
        mapped.unwrap_or_else(|| Self::Allocated(vec![Line::zeroed(); bytes.div_ceil(LINE_BYTES)]))
    }

    /// A part of the shared mapping, or of a new one when that is used up.
    fn share(bytes: usize) -> Option<Self> {
        let bytes = bytes.next_multiple_of(LINE_BYTES);
        // A panic leaves it as it was.
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((mapping, used)) = &mut *shared
            && *used + bytes <= SHARED_MAPPING_BYTES
        {
            let part = Self::Mapped(Arc::clone(mapping), *used);
            *used += bytes;
            return Some(part);
        }
        let mapping = Mapping::new(SHARED_MAPPING_BYTES)?;
        *shared = Some((Arc::clone(&mapping), bytes));
        Some(Self::Mapped(mapping, 0))
    }

    fn start(&self) -> *const u8 {
        match self {
            Self::Allocated(lines) => lines.as_ptr().cast(),
            Self::Mapped(mapping, offset) => mapping.start.as_ptr().wrapping_add(*offset),
        }
    }

    fn start_mut(&mut self) -> *mut u8 {
        match self {
            Self::Allocated(lines) => lines.as_mut_ptr().cast(),
            Self::Mapped(mapping, offset) => mapping.start.as_ptr().wrapping_add(*offset),
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
        // SAFETY: `zeroed` made room for `len` elements, which begin at a cache line and are some value of `T` whatever their
        // bytes; the part of a mapping is this one's alone.
        unsafe { std::slice::from_raw_parts(self.memory.start().cast(), self.len) }
    }
}

impl<T: Pod> std::ops::DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start_mut().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_is_zero_and_aligned_and_copies_are_their_own() {
        for len in [0, 1, 1000, MAPPED_BYTES / 4, 3 * HUGE_PAGE_BYTES / 4 + 5, OWN_MAPPING_BYTES / 4 + 1] {
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

    #[test]
    fn parts_of_a_shared_mapping_are_apart_and_outlive_each_other() {
        let parts: Vec<AlignedVec<u32>> =
            (0..60).map(|_| AlignedVec::zeroed(OWN_MAPPING_BYTES / 8 - 7)).collect();
        let parts: Vec<AlignedVec<u32>> = parts
            .into_iter()
            .enumerate()
            .map(|(index, mut part)| {
                assert!(part.iter().all(|&value| value == 0));
                part.fill(index as u32);
                part
            })
            .collect();
        let kept: Vec<_> = parts.into_iter().enumerate().filter(|(index, _)| index % 3 == 0).collect();
        assert!(kept.iter().all(|(index, part)| part.iter().all(|&value| value == *index as u32)));
    }
}
