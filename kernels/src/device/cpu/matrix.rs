//! Weight matrices as the CPU multiplies them: panels of 32 outputs, depth after depth.
//!
//! A panel holds the weights of 32 consecutive outputs; within it, the 32 weights of input 0 come first,
//! then those of input 1, and so on, so that one load gives the same input for many outputs. Missing outputs of
//! the last panel are zero. Quantized matrices: [`super::quantized_panels`].

use std::ops::Range;

use half::{bf16, f16};

use super::DisjointSlices;
use super::aligned::AlignedVec;
use super::simd::Simd;
use super::thread_pool::ThreadPool;
use super::tile::{BrainColumns, Columns, FloatColumns, HalfColumns};
use crate::tensor::{DenseMatrix, DenseValues};

/// Outputs of a panel.
pub(crate) const PANEL_COLUMNS: usize = 32;
/// Terms summed before the sum is scaled and added to the total: part of the reduction order.
pub(crate) const CHUNK_DEPTH: usize = 128;

/// What the panel product needs to know of a weight matrix.
pub(crate) trait Panels: Sync {
    /// Columns of one chunk, `V` vectors wide.
    type Chunk<S: Simd, const V: usize>: Columns<S>;

    fn out_features(&self) -> usize;
    fn in_features(&self) -> usize;
    /// Inputs of a group, which no chunk crosses.
    fn group_size(&self) -> usize;
    /// The input feature at each stored depth, when they are not in order.
    fn permutation(&self) -> Option<&[u32]>;
    /// A chunk of `panel` from column `column` on.
    ///
    /// # Safety
    /// `chunk` is one of [`chunks`], `column + V * S::WIDTH` is at most [`PANEL_COLUMNS`].
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        panel: usize,
        chunk: Chunk,
        column: usize,
    ) -> Self::Chunk<S, V>;
    /// What the sums of the columns in that chunk are multiplied by.
    ///
    /// # Safety
    /// As for [`Panels::chunk`].
    unsafe fn scale<S: Simd>(&self, panel: usize, chunk: Chunk, column: usize) -> S::F32;
}

/// Inputs whose terms are summed before the sum is scaled.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) index: usize,
    /// Its first input.
    pub(crate) start: usize,
    pub(crate) depth: usize,
    /// The group that it lies in.
    pub(crate) group: usize,
}

impl Chunk {
    /// As if this chunk lay `chunks` chunks of its depth later.
    pub(crate) fn later(self, chunks: usize) -> Self {
        let Self { index, start, depth, group } = self;
        Self { index: index + chunks, start: start + chunks * depth, depth, group: group + chunks }
    }

    pub(crate) fn inputs(self) -> Range<usize> {
        self.start..self.start + self.depth
    }
}

/// The chunks of a weight, in order.
#[derive(Clone)]
pub(crate) struct Chunks {
    next: Chunk,
    group_size: usize,
    group_end: usize,
    inputs: usize,
}

pub(crate) fn chunks<P: Panels>(weight: &P) -> Chunks {
    let group_size = weight.group_size();
    let next = Chunk { index: 0, start: 0, depth: 0, group: 0 };
    Chunks { next, group_size, group_end: group_size, inputs: weight.in_features() }
}

impl Iterator for Chunks {
    type Item = Chunk;

    #[inline(always)]
    fn next(&mut self) -> Option<Chunk> {
        let Chunk { index, start, group, .. } = self.next;
        if start >= self.inputs {
            return None;
        }
        let end = self.group_end.min(self.inputs).min(start + CHUNK_DEPTH);
        let group_ends = end == self.group_end;
        self.next = Chunk { index: index + 1, start: end, depth: 0, group: group + usize::from(group_ends) };
        self.group_end += if group_ends { self.group_size } else { 0 };
        Some(Chunk { index, start, depth: end - start, group })
    }
}

/// Stores values in panel order on all threads of `pool`; `value` gives them by output and input.
pub(super) fn pack<T: bytemuck::Pod + Send>(
    out: usize,
    inputs: usize,
    pool: &ThreadPool,
    value: impl Fn(usize, usize) -> T + Sync,
) -> AlignedVec<T> {
    let (panels, size) = (out.div_ceil(PANEL_COLUMNS), PANEL_COLUMNS * inputs);
    let mut packed = AlignedVec::zeroed(panels * size);
    let blocks = DisjointSlices::new(&mut packed);
    pool.run(panels, &|panel| {
        // SAFETY: each task has a panel of its own.
        let block = unsafe { blocks.slice(panel * size..(panel + 1) * size) };
        let first = panel * PANEL_COLUMNS;
        for column in 0..PANEL_COLUMNS.min(out - first) {
            for (input, row) in block.chunks_exact_mut(PANEL_COLUMNS).enumerate() {
                row[column] = value(first + column, input);
            }
        }
    });
    packed
}

/// A dense matrix in panels, in the element type it was stored in.
#[derive(Clone)]
pub(crate) struct DensePanels<T: bytemuck::Pod> {
    out_features: usize,
    in_features: usize,
    values: AlignedVec<T>,
}

impl<T: bytemuck::Pod + Send + Sync> DensePanels<T> {
    fn new(matrix: &DenseMatrix<'_>, values: &[T], pool: &ThreadPool) -> Self {
        let (out_features, in_features) = (matrix.out_features(), matrix.in_features());
        let value = |output: usize, input: usize| values[output * in_features + input];
        Self { out_features, in_features, values: pack(out_features, in_features, pool, value) }
    }

    fn weight(&self, output: usize, input: usize) -> T {
        let panel = output / PANEL_COLUMNS * PANEL_COLUMNS * self.in_features;
        self.values[panel + input * PANEL_COLUMNS + output % PANEL_COLUMNS]
    }
}

macro_rules! dense_panels {
    ($element:ty, $columns:ident) => {
        impl Panels for DensePanels<$element> {
            type Chunk<S: Simd, const V: usize> = $columns;

            fn out_features(&self) -> usize {
                self.out_features
            }
            fn in_features(&self) -> usize {
                self.in_features
            }
            fn group_size(&self) -> usize {
                self.in_features
            }
            fn permutation(&self) -> Option<&[u32]> {
                None
            }
            #[inline(always)]
            unsafe fn chunk<S: Simd, const V: usize>(
                &self,
                panel: usize,
                chunk: Chunk,
                column: usize,
            ) -> Self::Chunk<S, V> {
                let offset = (panel * self.in_features + chunk.start) * PANEL_COLUMNS + column;
                $columns { from: self.values[offset..].as_ptr(), stride: PANEL_COLUMNS }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(&self, _: usize, _: Chunk, _: usize) -> S::F32 {
                // SAFETY: the caller vouches for the instruction set.
                unsafe { S::splat(1.0) }
            }
        }
    };
}
dense_panels!(f32, FloatColumns);
dense_panels!(f16, HalfColumns);
dense_panels!(bf16, BrainColumns);

/// A dense weight matrix of the CPU device.
#[derive(Clone)]
pub struct CpuDenseMatrix {
    pub(crate) panels: DensePanelsOf,
}

/// The element types a [`CpuDenseMatrix`] may have.
#[derive(Clone)]
pub(crate) enum DensePanelsOf {
    F32(DensePanels<f32>),
    F16(DensePanels<f16>),
    BF16(DensePanels<bf16>),
}

impl CpuDenseMatrix {
    pub(crate) fn new(matrix: &DenseMatrix<'_>, pool: &ThreadPool) -> Self {
        let panels = match matrix.values() {
            DenseValues::F32(values) => DensePanelsOf::F32(DensePanels::new(matrix, values, pool)),
            DenseValues::F16(values) => DensePanelsOf::F16(DensePanels::new(matrix, values, pool)),
            DenseValues::BF16(values) => DensePanelsOf::BF16(DensePanels::new(matrix, values, pool)),
        };
        Self { panels }
    }

    pub(crate) fn out_features(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.out_features,
            DensePanelsOf::F16(panels) => panels.out_features,
            DensePanelsOf::BF16(panels) => panels.out_features,
        }
    }

    pub(crate) fn in_features(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.in_features,
            DensePanelsOf::F16(panels) => panels.in_features,
            DensePanelsOf::BF16(panels) => panels.in_features,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.values.bytes(),
            DensePanelsOf::F16(panels) => panels.values.bytes(),
            DensePanelsOf::BF16(panels) => panels.values.bytes(),
        }
    }

    /// The weight of `input` for `output`, widened.
    pub(crate) fn weight(&self, output: usize, input: usize) -> f32 {
        match &self.panels {
            DensePanelsOf::F32(panels) => panels.weight(output, input),
            DensePanelsOf::F16(panels) => panels.weight(output, input).to_f32(),
            DensePanelsOf::BF16(panels) => panels.weight(output, input).to_f32(),
        }
    }
}
