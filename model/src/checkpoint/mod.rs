//! A model directory: config.json and memory-mapped safetensors, one file or several with an index.
//!
//! Tensors are read when they are asked for; dense ones are borrowed from the map where their bytes are
//! aligned. A truncated file, a wrong element type or shape and a missing tensor are one clear error each.

mod replace_file;
mod shard;
mod writer;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use half::{bf16, f16};
use nibble_kernels::tensor::{DenseMatrix, DenseValues, QuantizedMatrix};
pub use replace_file::replace_file;
use safetensors::Dtype;
use shard::{Entry, Shard};
pub use writer::{CheckpointWriter, DEFAULT_SHARD_BYTES};

use crate::config::ModelConfig;
use crate::error::CheckpointError;

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open model directory.
pub struct Checkpoint {
    directory: PathBuf,
    config: ModelConfig,
    shards: Vec<Shard>,
    /// Shard of each tensor.
    tensors: BTreeMap<String, usize>,
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
        let index = directory.join(INDEX_FILE);
        let single = directory.join(SINGLE_FILE);
        let paths = if index.exists() && !single.exists() { indexed_files(&index)? } else { vec![single] };
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut tensors = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.entries.keys() {
                if let Some(other) = tensors.insert(name.clone(), number) {
                    let other = format!("also in {}", shards[other].path.display());
                    return Err(CheckpointError::tensor(
                        &shard.path,
                        name,
                        other,
                        "in one file only",
                        "write the checkpoint again",
                    ));
                }
            }
        }
        Ok(Self { directory: directory.to_owned(), config, shards, tensors })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|(name, &shard)| {
            let shard = &self.shards[shard];
            info(name, shard, &shard.entries[name])
        })
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name` as the file holds it.
    ///
    /// # Errors
    /// When there is none.
    pub fn raw(&self, name: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        let Some((name, &shard)) = self.tensors.get_key_value(name) else {
            let file = if self.shards.len() == 1 {
                self.shards[0].path.clone()
            } else {
                self.directory.join(INDEX_FILE)
            };
            let help = "the checkpoint is incomplete or of another architecture than config.json says";
            return Err(CheckpointError::tensor(&file, name, "missing", "present", help));
        };
        let shard = &self.shards[shard];
        Ok(info(name, shard, &shard.entries[name]))
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
            CheckpointError::tensor(&self.directory, name, error, "a matrix", "write the checkpoint again")
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
        if tensor.shape != shape {
            let (found, expected) = (format!("of shape {:?}", tensor.shape), format!("{shape:?}"));
            return Err(CheckpointError::tensor(tensor.file, name, found, expected, help));
        }
        match tensor.dtype {
            Dtype::F32 => Ok(DenseValues::F32(elements(tensor.data))),
            Dtype::F16 => Ok(DenseValues::F16(elements::<f16>(tensor.data))),
            Dtype::BF16 => Ok(DenseValues::BF16(elements::<bf16>(tensor.data))),
            other => {
                let found = format!("of element type {other:?}");
                Err(CheckpointError::tensor(tensor.file, name, found, "F32, F16 or BF16", help))
            }
        }
    }
}

fn info<'a>(name: &'a str, shard: &'a Shard, entry: &'a Entry) -> TensorInfo<'a> {
    let (dtype, shape) = (entry.dtype, entry.shape.as_slice());
    TensorInfo { name, dtype, shape, data: shard.bytes(entry), file: &shard.path }
}

/// Bytes of a map as elements: borrowed when aligned, else copied.
fn elements<T: Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()),
    }
}

/// The files an index names, in its directory.
pub(crate) fn indexed_files(index: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let text = std::fs::read_to_string(index).map_err(CheckpointError::io("read", index))?;
    let help = "fetch or write the checkpoint again";
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| CheckpointError::malformed(index, error, help))?;
    let Some(map) = json.get("weight_map").and_then(serde_json::Value::as_object) else {
        return Err(CheckpointError::field(index, "weight_map", "missing", "an object of tensor to file"));
    };
    let directory = index.parent().unwrap_or(Path::new("."));
    let mut files: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let plain =
            file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file));
        let Some(file) = plain else {
            return Err(CheckpointError::field(index, tensor, file, "the name of a file in this directory"));
        };
        files.push(file);
    }
    files.sort_unstable();
    files.dedup();
    Ok(files.into_iter().map(|file| directory.join(file)).collect())
}
