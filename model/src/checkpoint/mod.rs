//! A model directory: config.json and memory-mapped safetensors, one file or several with an index.
//!
//! Tensors are read when they are asked for; dense ones are borrowed from the map where their bytes are
//! aligned. A truncated file, a wrong element type or shape and a missing tensor are one clear error each.

mod padding;
mod replace_file;
mod shard;
mod tensor_files;
mod writer;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use half::{bf16, f16};
use nibble_kernels::tensor::{DenseMatrix, DenseValues, QuantizedMatrix};
pub use replace_file::replace_file;
use safetensors::Dtype;
pub use tensor_files::TensorFiles;
pub(crate) use tensor_files::indexed_files;
pub use writer::{CheckpointWriter, DEFAULT_SHARD_BYTES};

use crate::config::ModelConfig;
use crate::error::CheckpointError;

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open model directory.
pub struct Checkpoint {
    config: ModelConfig,
    /// That of the files; `config` may have a larger one.
    intermediate_size: usize,
    files: Arc<TensorFiles>,
}

/// A tensor as the file holds it.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its elements, row-major, little-endian.
    pub data: &'a [u8],
    /// The file it lies in.
    pub file: &'a Path,
}

/// The weight of a linear layer.
#[derive(Clone, Debug)]
pub enum LinearWeight<'a> {
    /// Floating-point elements.
    Dense(DenseMatrix<'a>),
    /// Group-wise integer codes.
    Quantized(QuantizedMatrix),
}

impl Checkpoint {
    /// Opens `directory`: reads config.json and the header of every weight file.
    ///
    /// # Errors
    /// Names the file and field that is missing, damaged or not supported.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let config = ModelConfig::from_file(&directory.join("config.json"))?;
        let files = Arc::new(TensorFiles::open(directory)?);
        Ok(Self { intermediate_size: config.intermediate_size, config, files })
    }

    /// A view of the same files with feed-forward layers of at least `intermediate_size`: dense matrices and vectors are
    /// read with zeros where they are shorter, which changes nothing that the model computes. [`Self::raw`] and
    /// [`Self::tensors`] give what the files hold. Quantized layers are not padded.
    pub fn padded(&self, intermediate_size: usize) -> Self {
        let intermediate_size = intermediate_size.max(self.intermediate_size);
        Self {
            config: ModelConfig { intermediate_size, ..self.config.clone() },
            intermediate_size: self.intermediate_size,
            files: Arc::clone(&self.files),
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.files.directory()
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.files.tensors()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.files.has(name)
    }

    /// The tensor `name` as the file holds it.
    ///
    /// # Errors
    /// When there is none.
    pub fn raw(&self, name: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        self.files.raw(name)
    }

    /// The tensor `name` of `length` elements of any floating-point type, widened: a norm's weight, a bias.
    ///
    /// # Errors
    /// When it is missing or has another shape or element type.
    pub fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.floats(name, &[length])?.to_f32())
    }

    /// The tensor `name`, `[rows, columns]` of any floating-point type, widened.
    ///
    /// # Errors
    /// When it is missing or has another shape or element type.
    pub(crate) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Vec<f32>, CheckpointError> {
        Ok(self.floats(name, &[rows, columns])?.to_f32())
    }

    /// The dense matrix `name`, `[out_features, in_features]`.
    ///
    /// # Errors
    /// When it is missing or has another shape or element type.
    pub fn dense(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<DenseMatrix<'_>, CheckpointError> {
        let values = self.floats(name, &[out_features, in_features])?;
        DenseMatrix::new(out_features, in_features, values).map_err(|error| {
            CheckpointError::tensor(self.directory(), name, error, "a matrix", "write the checkpoint again")
        })
    }

    /// The weight of the linear layer `prefix`.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape or element type.
    pub fn linear(
        &self,
        prefix: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<LinearWeight<'_>, CheckpointError> {
        match &self.config.quantization {
            Some(config) => config.read_linear(self, prefix, out_features, in_features),
            None => {
                self.dense(&format!("{prefix}.weight"), out_features, in_features).map(LinearWeight::Dense)
            }
        }
    }

    /// Refuses tensors of a quantized layer `prefix`, where `expected` says why there must be none.
    pub(crate) fn refuse_quantized(&self, prefix: &str, expected: &str) -> Result<(), CheckpointError> {
        let config = self.config.quantization.as_ref();
        match config.and_then(|config| config.tensor_of(self, prefix)) {
            Some(name) => {
                let help = "correct config.json or write the checkpoint again";
                Err(CheckpointError::tensor(self.raw(&name)?.file, &name, "there", expected, help))
            }
            None => Ok(()),
        }
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<DenseValues<'_>, CheckpointError> {
        let tensor = self.raw(name)?;
        let help = "the checkpoint does not fit its config.json";
        let mut stored = shape.to_vec();
        if self.config.intermediate_size != self.intermediate_size
            && let Some(axis) = padding::intermediate_axis(name)
        {
            stored[axis] = self.intermediate_size;
        }
        if tensor.shape != stored {
            let (found, expected) = (format!("of shape {:?}", tensor.shape), format!("{stored:?}"));
            return Err(CheckpointError::tensor(tensor.file, name, found, expected, help));
        }
        match tensor.dtype {
            Dtype::F32 => Ok(DenseValues::F32(elements(tensor, shape))),
            Dtype::F16 => Ok(DenseValues::F16(elements::<f16>(tensor, shape))),
            Dtype::BF16 => Ok(DenseValues::BF16(elements::<bf16>(tensor, shape))),
            other => {
                let found = format!("of element type {other:?}");
                Err(CheckpointError::tensor(tensor.file, name, found, "F32, F16 or BF16", help))
            }
        }
    }
}

/// The elements of `tensor`, padded to `shape`: borrowed when they are neither padded nor unaligned, else copied.
fn elements<'a, T: Pod>(tensor: TensorInfo<'a>, shape: &[usize]) -> Cow<'a, [T]> {
    let elements = match bytemuck::try_cast_slice(tensor.data) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => {
            let elements = tensor.data.chunks_exact(size_of::<T>());
            Cow::Owned(elements.map(bytemuck::pod_read_unaligned).collect())
        }
    };
    if tensor.shape == shape {
        return elements;
    }
    Cow::Owned(padding::padded(&elements, tensor.shape, shape))
}
