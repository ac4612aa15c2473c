//! The tensors of one quantized linear layer: what the readers and the writers of all formats do alike.

use half::f16;
use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;

use super::{ActivationOrder, ModuleSettings};
use crate::checkpoint::{Checkpoint, CheckpointWriter, TensorInfo};
use crate::error::CheckpointError;

const HELP: &str =
    "the tensors do not fit config.json and its quantization_config; write the checkpoint again";

/// A linear layer that is being read.
#[derive(Clone, Copy)]
pub(super) struct LayerReader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) prefix: &'a str,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) settings: ModuleSettings,
}

/// What a format holds of a layer, in the order of a [`QuantizedMatrix`].
pub(super) struct LayerContents {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
    pub(super) zero_points: Vec<u8>,
    pub(super) input_permutation: Option<Vec<u32>>,
}

impl LayerReader<'_> {
    pub(super) fn group_size(&self) -> usize {
        self.settings.group_size.inputs(self.in_features)
    }

    pub(super) fn groups(&self) -> usize {
        self.in_features.div_ceil(self.group_size())
    }

    /// The middle of the range of codes: the zero point of a symmetric layer.
    pub(super) fn middle(&self) -> u8 {
        1 << (self.settings.bits - 1)
    }

    pub(super) fn has(&self, part: &str) -> bool {
        self.checkpoint.has(&self.name(part))
    }

    pub(super) fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    pub(super) fn error(&self, part: &str, found: impl ToString, expected: impl ToString) -> CheckpointError {
        let file = self.checkpoint.raw(&self.name(part)).map_or(self.checkpoint.path(), |info| info.file);
        CheckpointError::tensor(file, &self.name(part), found, expected, HELP)
    }

    /// An I32 tensor as words.
    pub(super) fn words(&self, part: &str, shape: &[usize]) -> Result<Vec<u32>, CheckpointError> {
        let TensorInfo { dtype, shape: found, data, .. } = self.checkpoint.raw(&self.name(part))?;
        if dtype != Dtype::I32 || found != shape {
            let found = format!("{dtype:?} {found:?}");
            return Err(self.error(part, found, format!("I32 {shape:?}")));
        }
        let words =
            data.chunks_exact(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        Ok(words.collect())
    }

    /// A matrix of any floating-point type.
    pub(super) fn floats(&self, part: &str, shape: [usize; 2]) -> Result<Vec<f32>, CheckpointError> {
        self.checkpoint.matrix(&self.name(part), shape[0], shape[1])
    }

    /// The input at each stored position, groups one after the other, by the index tensor `part`, which holds the
    /// group of each input; `None` when that is the inputs' own order, or nothing says otherwise.
    pub(super) fn input_order(&self, part: &str) -> Result<Option<Vec<u32>>, CheckpointError> {
        if self.settings.activation_order != ActivationOrder::Grouped && !self.has(part) {
            return Ok(None);
        }
        let group_size = self.group_size();
        let group_of_input = self.words(part, &[self.in_features])?;
        let in_order = |(input, &group): (usize, &u32)| group as usize == input / group_size;
        if group_of_input.iter().enumerate().all(in_order) {
            return Ok(None);
        }
        let mut order: Vec<u32> = (0..self.in_features as u32).collect();
        order.sort_by_key(|&input| group_of_input[input as usize]);
        for (position, &input) in order.iter().enumerate() {
            let (found, expected) = (group_of_input[input as usize] as usize, position / group_size);
            if found != expected {
                let groups = self.groups();
                let found = format!("a permutation of unequal groups (group {found} of {groups})");
                return Err(self.error(part, found, format!("{group_size} inputs in each group")));
            }
        }
        Ok(Some(order))
    }

    /// The matrix of `contents`.
    pub(super) fn matrix(&self, contents: LayerContents) -> Result<QuantizedMatrix, CheckpointError> {
        QuantizedMatrix::new(QuantizedParts {
            out_features: self.out_features,
            in_features: self.in_features,
            bits: self.settings.bits,
            group_size: self.group_size(),
            codes: contents.codes,
            scales: contents.scales,
            offsets: GroupOffsets::ZeroPoints(contents.zero_points),
            input_permutation: contents.input_permutation,
        })
        .map_err(|error| {
            let directory = self.checkpoint.path();
            CheckpointError::tensor(directory, self.prefix, error, "a valid matrix", HELP)
        })
    }
}

/// `rows` rows of `columns` elements, turned: `columns` rows.
pub(super) fn transposed<T: Copy>(elements: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| elements[row * columns + column])).collect()
}

/// A linear layer that is being written.
pub(super) struct LayerWriter<'a> {
    pub(super) writer: &'a mut CheckpointWriter,
    pub(super) prefix: &'a str,
    pub(super) matrix: &'a QuantizedMatrix,
}

impl LayerWriter<'_> {
    pub(super) fn refuse(&self, found: impl ToString, expected: impl ToString) -> CheckpointError {
        let help = "choose other quantization settings for this matrix";
        CheckpointError::tensor(self.writer.path(), self.prefix, found, expected, help)
    }

    /// The zero points, row-major `[out_features, groups]`; refuses those outside of `lowest..2^bits`, and minimums.
    pub(super) fn zero_points(&self, lowest: u8) -> Result<&[u8], CheckpointError> {
        let Some(zero_points) = self.matrix.zero_points() else {
            return Err(self.refuse("with minimums", "zero points, which the format can express"));
        };
        let highest = ((1u32 << self.matrix.bits()) - 1) as u8;
        match zero_points.iter().find(|&zero| !(lowest..=highest).contains(zero)) {
            Some(zero) => {
                let expected = format!("{lowest} to {highest}, which the format can express");
                Err(self.refuse(format!("with a zero point of {zero}"), expected))
            }
            None => Ok(zero_points),
        }
    }

    /// An I32 tensor.
    pub(super) fn words(
        &mut self,
        part: &str,
        shape: &[usize],
        words: impl IntoIterator<Item = u32>,
    ) -> Result<(), CheckpointError> {
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        self.writer.tensor(&format!("{}.{part}", self.prefix), Dtype::I32, shape, &bytes)
    }

    /// The scales, in an F16 tensor of the matrix's own shape or, `by_group`, turned.
    pub(super) fn scales(&mut self, part: &str, by_group: bool) -> Result<(), CheckpointError> {
        let (out, groups) = (self.matrix.out_features(), self.matrix.groups());
        let scales: Vec<f16> = self.matrix.scales().iter().copied().map(f16::from_f32).collect();
        let changed = self.matrix.scales().iter().zip(&scales).find(|(scale, half)| half.to_f32() != **scale);
        if let Some((scale, _)) = changed {
            return Err(self.refuse(format!("with a scale of {scale}"), "scales that F16 can hold exactly"));
        }
        let (scales, shape) = if by_group {
            (transposed(&scales, out, groups), [groups, out])
        } else {
            (scales, [out, groups])
        };
        let bytes: Vec<u8> = scales.into_iter().flat_map(f16::to_le_bytes).collect();
        self.writer.tensor(&format!("{}.{part}", self.prefix), Dtype::F16, &shape, &bytes)
    }
}
