//! A model: a directory of config.json and memory-mapped safetensors, one file or several with an index, or a GGUF
//! file ([`crate::gguf_model`]), memory-mapped as well.
//!
//! Tensors are read when they are asked for; dense ones are borrowed from the map where their bytes are
//! aligned. A truncated file, a wrong element type or shape and a missing tensor are one clear error each.

mod padding;
mod replace_file;
mod rows;
mod shard;
mod tensor_files;
mod writer;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use half::{bf16, f16};
use nibble_kernels::tensor::{DenseMatrix, DenseValues, FloatType, QuantizedMatrix};
pub use replace_file::replace_file;
pub(crate) use rows::EmbeddingRows;
use safetensors::Dtype;
pub use tensor_files::TensorFiles;
pub(crate) use tensor_files::indexed_files;
pub use writer::{CheckpointWriter, DEFAULT_SHARD_BYTES};

use crate::chat_template::ChatTemplate;
use crate::config::{Fields, ModelConfig};
use crate::error::CheckpointError;
use crate::generation_config::GenerationConfig;
use crate::gguf_model::GgufModel;
use crate::tokenizer::Tokenizer;

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open model.
pub struct Checkpoint {
    config: ModelConfig,
    /// That of the files; `config` may have a larger one.
    intermediate_size: usize,
    source: Source,
}

/// What holds the tensors.
#[derive(Clone)]
enum Source {
    Directory(Arc<TensorFiles>),
    Gguf(Arc<GgufModel>),
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
    /// Opens the model at `path`: a directory, or a GGUF file. Reads its config and the header of every weight file.
    ///
    /// # Errors
    /// Names the file and field that is missing, damaged or not supported.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if path.is_file() {
            // What GGUF files hold in floating point is F16, as a rule.
            let model = GgufModel::open(path, FloatType::F16)?;
            return Ok(Self {
                intermediate_size: model.config().intermediate_size,
                config: model.config().clone(),
                source: Source::Gguf(Arc::new(model)),
            });
        }
        let config = ModelConfig::from_file(&path.join("config.json"))?;
        let files = Arc::new(TensorFiles::open(path)?);
        Ok(Self { intermediate_size: config.intermediate_size, config, source: Source::Directory(files) })
    }

    /// A view of the same files with feed-forward layers of at least `intermediate_size`: dense matrices and vectors are
    /// read with zeros where they are shorter, which changes nothing that the model computes. [`Self::raw`] and
    /// [`Self::tensors`] give what the files hold. Quantized layers are not padded.
    pub fn padded(&self, intermediate_size: usize) -> Self {
        let intermediate_size = intermediate_size.max(self.intermediate_size);
        Self {
            config: ModelConfig { intermediate_size, ..self.config.clone() },
            intermediate_size: self.intermediate_size,
            source: self.source.clone(),
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The directory, or the GGUF file.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Directory(files) => files.directory(),
            Source::Gguf(model) => model.path(),
        }
    }

    /// Whether this is a GGUF file: what stands in the files of a directory is in its metadata, or not there.
    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When it is missing or malformed, or gives ids that the model has no embedding for.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        match &self.source {
            Source::Directory(files) => Tokenizer::open(files.directory(), &self.config),
            Source::Gguf(model) => Ok(Tokenizer::new(model.tokenizer()?.inner, model.path().to_owned())),
        }
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// When it is no template.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, CheckpointError> {
        match &self.source {
            Source::Directory(files) => ChatTemplate::open(files.directory()),
            Source::Gguf(model) => {
                let config = Fields::from_value(model.path(), String::new(), model.tokenizer_config()?)?;
                ChatTemplate::of_config(model.path(), &config)
            }
        }
    }

    /// How the model's makers want its tokens picked; without a word of theirs there are no defaults.
    ///
    /// # Errors
    /// When generation_config.json is malformed.
    pub fn generation_config(&self) -> Result<GenerationConfig, CheckpointError> {
        match &self.source {
            Source::Directory(files) => GenerationConfig::open(files.directory()),
            Source::Gguf(_) => Ok(GenerationConfig::default()),
        }
    }

    /// Bytes of all tensors, as they are stored.
    pub fn weight_bytes(&self) -> u64 {
        match &self.source {
            Source::Directory(files) => files.tensors().map(|tensor| tensor.data.len() as u64).sum(),
            Source::Gguf(model) => model.bytes(),
        }
    }

    /// Every tensor of a directory, sorted by name. None for a GGUF file, whose elements lie in blocks.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        let files = match &self.source {
            Source::Directory(files) => Some(files),
            Source::Gguf(_) => None,
        };
        files.into_iter().flat_map(|files| files.tensors())
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Directory(files) => files.has(name),
            Source::Gguf(model) => model.has(name),
        }
    }

    /// The tensor `name` as the file of a directory holds it.
    ///
    /// # Errors
    /// When there is none, or this is a GGUF file, whose elements lie in blocks.
    pub fn raw(&self, name: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        match &self.source {
            Source::Directory(files) => files.raw(name),
            Source::Gguf(model) => Err(CheckpointError::tensor(
                model.path(),
                name,
                "in a GGUF file",
                "in a safetensors file",
                "make a directory of the file with nibble import",
            )),
        }
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
            CheckpointError::tensor(self.path(), name, error, "a matrix", "write the checkpoint again")
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
            None => self.weight(&format!("{prefix}.weight"), out_features, in_features),
        }
    }

    /// The matrix `name`, `[out_features, in_features]`, with its codes where a GGUF file has it quantized.
    ///
    /// # Errors
    /// When it is missing or has another shape or element type.
    pub fn weight(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<LinearWeight<'_>, CheckpointError> {
        match &self.source {
            Source::Gguf(model) if model.is_quantized(name) => model.weight(name, out_features, in_features),
            _ => self.dense(name, out_features, in_features).map(LinearWeight::Dense),
        }
    }

    /// The rows of the embedding table where they are best read from the file itself: it is quantized there.
    pub(crate) fn embedding_rows(&self, name: &'static str) -> Option<EmbeddingRows> {
        match &self.source {
            Source::Gguf(model) if model.is_quantized(name) => {
                Some(EmbeddingRows::new(Arc::clone(model), name))
            }
            _ => None,
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
        let mut stored = shape.to_vec();
        if self.config.intermediate_size != self.intermediate_size
            && let Some(axis) = padding::intermediate_axis(name)
        {
            stored[axis] = self.intermediate_size;
        }
        let files = match &self.source {
            Source::Directory(files) => files,
            Source::Gguf(model) => {
                let values = model.floats(name, &stored)?;
                return Ok(if stored == shape { values } else { padded_values(&values, &stored, shape) });
            }
        };
        let tensor = files.raw(name)?;
        let help = "the checkpoint does not fit its config.json";
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

/// `values` of shape `stored`, widened and padded to `shape`.
fn padded_values(values: &DenseValues<'_>, stored: &[usize], shape: &[usize]) -> DenseValues<'static> {
    DenseValues::F32(Cow::Owned(padding::padded(&values.to_f32(), stored, shape)))
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
