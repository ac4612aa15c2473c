//! The elements of a tensor: decoded row by row, or as they are.

use std::borrow::Cow;

use bytemuck::Pod;
use half::{bf16, f16};
use nibble_kernels::tensor::{DenseMatrix, DenseValues, GroupOffsets, QuantizedMatrix, QuantizedParts};

use super::{GgufModel, RowOrder, TensorPlan};
use crate::checkpoint::LinearWeight;
use crate::error::CheckpointError;
use crate::gguf::{BlockGroups, BlockType, GgufTensor};

/// Elements of a matrix that are worth a thread.
const LEAST_ELEMENTS: usize = 1 << 18;
const DAMAGED: &str = "the file is damaged: fetch it again";

/// A tensor and how its rows lie.
struct Source<'a> {
    tensor: GgufTensor<'a>,
    block: BlockType,
    order: RowOrder,
    rows: usize,
    width: usize,
    row_bytes: usize,
}

impl<'a> Source<'a> {
    /// The blocks of row `row` of the checkpoint.
    fn row(&self, row: usize) -> &'a [u8] {
        &self.tensor.data[self.order.source_row(row) * self.row_bytes..][..self.row_bytes]
    }
}

impl GgufModel {
    /// The tensor `name`, a matrix or a vector, of this shape.
    fn source(&self, name: &str, shape: &[usize]) -> Result<Source<'_>, CheckpointError> {
        let help = "the file is incomplete, or of another architecture than its metadata say";
        let Some(&index) = self.by_name.get(name) else {
            return Err(CheckpointError::tensor(self.path(), name, "missing", "present", help));
        };
        let plan = &self.tensors[index];
        if plan.shape != shape {
            let (found, expected) = (format!("of shape {:?}", plan.shape), format!("{shape:?}"));
            return Err(CheckpointError::tensor(self.path(), &plan.source, found, expected, help));
        }
        self.source_of(plan)
    }

    fn source_of(&self, plan: &TensorPlan) -> Result<Source<'_>, CheckpointError> {
        let Some(tensor) = self.file.tensor(&plan.source) else {
            unreachable!("the plan holds only tensors that the file has");
        };
        let block = tensor.block_type(self.path())?;
        let (rows, width) = match *plan.shape {
            [rows, width] => (rows, width),
            _ => (1, tensor.elements()),
        };
        let row_bytes = width / block.elements() * block.bytes();
        // A vector is one row of blocks.
        let order = if plan.shape.len() == 2 { plan.rows } else { RowOrder::Same };
        Ok(Source { tensor, block, order, rows, width, row_bytes })
    }

    /// Decodes the tensor of `plan` and gives its rows, in the checkpoint's order, to `take`, which may stop it.
    ///
    /// # Errors
    /// When its type cannot be decoded, and those of `take`.
    pub(crate) fn decode(
        &self,
        plan: &TensorPlan,
        take: &mut dyn FnMut(&[f32]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let source = self.source_of(plan)?;
        let mut values = vec![0.0; source.width];
        for row in 0..source.rows {
            source.block.decode(source.row(row), &mut values);
            if plan.shape.len() == 1 && plan.rows != RowOrder::Same {
                // Put in order after decoding, because it is one row of blocks.
                values = (0..source.width).map(|index| values[plan.rows.source_row(index)]).collect();
            }
            take(&values)?;
        }
        Ok(())
    }

    /// Row `row` of the matrix `name`, `[rows, values.len()]`, decoded to `values`.
    ///
    /// # Errors
    /// When the matrix is missing or of another shape.
    ///
    /// # Panics
    /// When it has no such row.
    pub(crate) fn row(
        &self,
        name: &str,
        rows: usize,
        row: usize,
        values: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let source = self.source(name, &[rows, values.len()])?;
        source.block.decode(source.row(row), values);
        Ok(())
    }

    /// Whether the tensor `name` is quantized.
    pub(crate) fn is_quantized(&self, name: &str) -> bool {
        let plan = self.by_name.get(name).map(|&index| &self.tensors[index]);
        let block = plan.and_then(|plan| self.source_of(plan).ok()).map(|source| source.block);
        block.is_some_and(|block| block.groups().is_some())
    }

    /// The tensor `name` as floating-point elements: borrowed where the file has them so, else decoded.
    ///
    /// # Errors
    /// When it is missing, or of another shape.
    pub(crate) fn floats(&self, name: &str, shape: &[usize]) -> Result<DenseValues<'_>, CheckpointError> {
        let source = self.source(name, shape)?;
        let plan = &self.tensors[self.by_name[name]];
        if plan.rows == RowOrder::Same {
            match source.block {
                BlockType::F32 => return Ok(DenseValues::F32(elements(source.tensor.data))),
                BlockType::F16 => return Ok(DenseValues::F16(elements::<f16>(source.tensor.data))),
                BlockType::BF16 => return Ok(DenseValues::BF16(elements::<bf16>(source.tensor.data))),
                _ => {}
            }
        }
        let mut values = Vec::with_capacity(source.rows * source.width);
        self.decode(plan, &mut |row| {
            values.extend_from_slice(row);
            Ok(())
        })?;
        Ok(DenseValues::F32(Cow::Owned(values)))
    }

    /// The matrix `name`, `[out_features, in_features]`, as the file has it: with its codes where it is quantized.
    ///
    /// # Errors
    /// When it is missing, of another shape, or holds scales that are not finite.
    pub(crate) fn weight(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<LinearWeight<'_>, CheckpointError> {
        let source = self.source(name, &[out_features, in_features])?;
        let invalid = |error| {
            CheckpointError::tensor(self.path(), source.tensor.name, error, "a valid matrix", DAMAGED)
        };
        match source.block.groups() {
            Some(groups) => quantized(&source, groups).map(LinearWeight::Quantized).map_err(invalid),
            None => {
                let values = self.floats(name, &[out_features, in_features])?;
                DenseMatrix::new(out_features, in_features, values).map(LinearWeight::Dense).map_err(invalid)
            }
        }
    }
}

/// The matrix of the blocks of `source`.
fn quantized(
    source: &Source<'_>,
    groups: BlockGroups,
) -> Result<QuantizedMatrix, nibble_kernels::KernelError> {
    let (rows, width) = (source.rows, source.width);
    let of_row = width / groups.elements;
    let of_groups = rows * of_row;
    let mut codes = vec![0; rows * width];
    let mut scales = vec![0.0; of_groups];
    let mut minimums = vec![0.0; of_groups];
    // Large matrices of large models: every processor takes some rows.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows_each = rows.div_ceil(threads).max(LEAST_ELEMENTS.div_ceil(width.max(1))).max(1);
    std::thread::scope(|scope| {
        let codes = codes.chunks_mut((rows_each * width).max(1));
        let groups = scales.chunks_mut((rows_each * of_row).max(1));
        let parts = codes.zip(groups.zip(minimums.chunks_mut((rows_each * of_row).max(1))));
        for (part, (codes, (scales, minimums))) in parts.enumerate() {
            let read = move || {
                let (mut codes, mut scales, mut minimums) = (codes, scales, minimums);
                for row in part * rows_each..rows.min((part + 1) * rows_each) {
                    source.block.split(source.row(row), &mut |of_block, block_scales, block_minimums| {
                        put(&mut codes, of_block);
                        put(&mut scales, block_scales);
                        put(&mut minimums, block_minimums);
                    });
                }
            };
            if rows_each < rows {
                scope.spawn(read);
            } else {
                read();
            }
        }
    });
    QuantizedMatrix::new(QuantizedParts {
        out_features: rows,
        in_features: width,
        bits: groups.bits,
        group_size: groups.elements,
        codes,
        scales,
        offsets: match groups.zero_point {
            Some(zero_point) => GroupOffsets::ZeroPoints(vec![zero_point; of_groups]),
            None => GroupOffsets::Minimums(minimums),
        },
        input_permutation: None,
    })
}

/// Writes `values` to the start of `to`, which then begins behind them.
fn put<T: Copy>(to: &mut &mut [T], values: &[T]) {
    let (first, rest) = std::mem::take(to).split_at_mut(values.len());
    first.copy_from_slice(values);
    *to = rest;
}

/// The elements of `data`, copied where they are not aligned.
fn elements<T: Pod>(data: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(data) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(data.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()),
    }
}
