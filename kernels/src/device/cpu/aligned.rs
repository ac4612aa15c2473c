//! Memory that starts on a cache line, so that a vector load never straddles two.

use bytemuck::{Pod, Zeroable};

const LINE_BYTES: usize = 64;

#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// A fixed number of zero-initialized elements, 64-byte aligned.
#[derive(Clone)]
pub(crate) struct AlignedVec<T> {
    lines: Vec<Line>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Pod> AlignedVec<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(LINE_BYTES);
        Self { lines: vec![Line::zeroed(); lines], len, element: std::marker::PhantomData }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lines.len() * LINE_BYTES
    }
}

impl<T: Pod> std::ops::Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> std::ops::DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
