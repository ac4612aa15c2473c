//! The CPU device: `f32` activations, all threads on one operation at a time, nothing left running when an
//! operation returns.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) mod aligned;
pub(crate) mod cache;
pub(crate) mod integer_product;
pub(crate) mod integer_rows;
#[cfg(target_arch = "x86_64")]
mod integer_tiles;
pub(crate) mod matrix;
pub(crate) mod panel_product;
mod peak;
mod quantized_codes;
pub(crate) mod quantized_panels;
pub(crate) mod simd;
pub(crate) mod thread_pool;
pub(crate) mod tile;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tile_shapes;

use aligned::AlignedVec;
pub use cache::CpuCache;
use integer_rows::IntegerRows;
pub use matrix::CpuDenseMatrix;
pub use peak::Peak;
pub use quantized_panels::CpuPackedMatrix;
pub use simd::InstructionSet;
pub use thread_pool::ThreadPool;

use crate::backend::{Activations, Device, Length, MatrixShape};
use crate::error::KernelError;
use crate::ops::paged_attention::AttentionScratch;
use crate::ops::sample::Sample;
use crate::tensor::{DenseMatrix, QuantizedMatrix};

/// The processor this program runs on.
pub struct Cpu {
    set: InstructionSet,
    pool: ThreadPool,
    activations: Activations,
    /// Rounded activations of one product; no two run at once.
    integer_rows: Mutex<IntegerRows>,
    /// The tasks of one attention.
    attention: Mutex<AttentionScratch>,
}

/// Activations of the CPU device.
#[derive(Clone)]
pub struct CpuBuffer(AlignedVec<f32>);

/// Indices of the CPU device.
#[derive(Clone)]
pub struct CpuIndices(AlignedVec<u32>);

impl Cpu {
    /// The CPU with `threads` threads and the fastest instruction set found.
    pub fn new(threads: usize) -> Self {
        Self::with_instruction_set(threads, InstructionSet::detect())
    }

    /// The CPU with a given instruction set.
    ///
    /// # Panics
    /// When the processor does not have `set`.
    pub fn with_instruction_set(threads: usize, set: InstructionSet) -> Self {
        assert!(InstructionSet::available().contains(&set), "this processor has no {set:?}");
        Self {
            set,
            pool: ThreadPool::new(threads),
            activations: Activations::Float,
            integer_rows: Mutex::new(IntegerRows::new()),
            attention: Mutex::new(AttentionScratch::new()),
        }
    }

    /// The same CPU with other activations.
    #[must_use]
    pub fn with_activations(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Memory for the rounded activations of a product.
    pub(crate) fn integer_rows(&self) -> MutexGuard<'_, IntegerRows> {
        // Whatever a panic left in there is overwritten by the next product.
        self.integer_rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for the tasks of an attention.
    pub(crate) fn attention_scratch(&self) -> MutexGuard<'_, AttentionScratch> {
        // As above.
        self.attention.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The instruction set in use.
    pub fn instruction_set(&self) -> InstructionSet {
        self.set
    }

    /// The threads that share an operation.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}

impl std::ops::Deref for CpuBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl std::ops::DerefMut for CpuBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl std::ops::Deref for CpuIndices {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.0
    }
}

impl Length for CpuBuffer {
    fn length(&self) -> usize {
        self.0.len()
    }
}

impl Length for CpuIndices {
    fn length(&self) -> usize {
        self.0.len()
    }
}

impl MatrixShape for CpuPackedMatrix {
    fn out_features(&self) -> usize {
        self.out_features()
    }
    fn in_features(&self) -> usize {
        self.in_features()
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
}

impl MatrixShape for CpuDenseMatrix {
    fn out_features(&self) -> usize {
        self.out_features()
    }
    fn in_features(&self) -> usize {
        self.in_features()
    }
    fn bytes(&self) -> usize {
        self.bytes()
    }
}

impl Device for Cpu {
    type Buffer = CpuBuffer;
    type Indices = CpuIndices;
    type Cache = CpuCache;
    type PackedMatrix = CpuPackedMatrix;
    type DenseMatrix = CpuDenseMatrix;

    fn buffer(&self, elements: usize) -> Result<CpuBuffer, KernelError> {
        Ok(CpuBuffer(AlignedVec::zeroed(elements)))
    }

    fn indices(&self, elements: usize) -> Result<CpuIndices, KernelError> {
        Ok(CpuIndices(AlignedVec::zeroed(elements)))
    }

    fn cache(&self, elements: usize) -> Result<CpuCache, KernelError> {
        Ok(CpuCache::zeroed(elements, self.activations, self.set))
    }

    fn activation_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn cache_element_bytes(&self) -> usize {
        CpuCache::element_bytes(self.activations)
    }

    fn write(&self, values: &[f32], to: &mut CpuBuffer) -> Result<(), KernelError> {
        fits("write", values.len(), to.0.len())?;
        to.0[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn write_cache(&self, values: &[f32], to: &mut CpuCache) -> Result<(), KernelError> {
        to.write(values)
    }

    fn write_indices(&self, values: &[u32], to: &mut CpuIndices) -> Result<(), KernelError> {
        fits("write_indices", values.len(), to.0.len())?;
        to.0[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&self, from: &CpuBuffer, range: Range<usize>, to: &mut [f32]) -> Result<(), KernelError> {
        fits("read", range.end, from.0.len())?;
        KernelError::check("read", "to", to.len(), range.len())?;
        to.copy_from_slice(&from.0[range]);
        Ok(())
    }

    fn pack_quantized(&self, _: &str, matrix: &QuantizedMatrix) -> Result<CpuPackedMatrix, KernelError> {
        Ok(CpuPackedMatrix::new(matrix, &self.pool))
    }

    fn copy_quantized(&self, matrix: &CpuPackedMatrix) -> Result<CpuPackedMatrix, KernelError> {
        Ok(matrix.clone())
    }

    fn copy_dense(&self, matrix: &CpuDenseMatrix) -> Result<CpuDenseMatrix, KernelError> {
        Ok(matrix.clone())
    }

    fn activations(&self) -> Activations {
        self.activations
    }

    fn sampler(&self) -> Option<&dyn Sample<CpuBuffer>> {
        None
    }

    fn pack_dense(&self, _: &str, matrix: &DenseMatrix<'_>) -> Result<CpuDenseMatrix, KernelError> {
        Ok(CpuDenseMatrix::new(matrix, &self.pool))
    }
}

fn fits(operation: &'static str, needed: usize, length: usize) -> Result<(), KernelError> {
    KernelError::require(needed <= length, operation, "elements", needed, "must fit the device buffer")
}

/// A slice whose disjoint parts are written by different tasks of one operation.
pub(crate) struct DisjointSlices<'a, T = f32> {
    start: *mut T,
    length: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: parts are only handed out through `slice`, whose caller promises that they are disjoint.
unsafe impl<T: Send> Sync for DisjointSlices<'_, T> {}

impl<'a, T> DisjointSlices<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), slice: std::marker::PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Safety
    /// No element may be part of two slices that live at the same time.
    ///
    /// # Panics
    /// When the range is outside the slice.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "part outside the slice");
        // SAFETY: within the slice, and disjoint from every other living part by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
