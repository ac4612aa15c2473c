//! What a device must offer: memory, and every operation.

use std::ops::Range;

use crate::error::KernelError;
use crate::ops;
use crate::tensor::{DenseMatrix, QuantizedMatrix};

/// Memory of a device: buffers of activations, indices and weights in the device's own form.
///
/// Everything is allocated before the first step: operations themselves never allocate and never wait, so
/// that a device may record a whole step once and replay it.
pub trait Device: Sync {
    /// Activations, in the device's activation type. Rows are contiguous.
    type Buffer: Length + Send;
    /// Unsigned words: token ids, positions, block tables.
    type Indices: Length + Send;
    /// Keys or values of a layer, in the device's cache type.
    type Cache: Length + Send;
    /// A quantized weight matrix, packed for the device.
    type PackedMatrix: MatrixShape + Send;
    /// A dense weight matrix, packed for the device.
    type DenseMatrix: MatrixShape + Send;

    /// A zeroed buffer of `elements` activations.
    ///
    /// # Errors
    /// When the device has not enough memory.
    fn buffer(&self, elements: usize) -> Result<Self::Buffer, KernelError>;

    /// A zeroed buffer of `elements` words.
    ///
    /// # Errors
    /// When the device has not enough memory.
    fn indices(&self, elements: usize) -> Result<Self::Indices, KernelError>;

    /// A zeroed cache of `elements` keys or values.
    ///
    /// # Errors
    /// When the device has not enough memory.
    fn cache(&self, elements: usize) -> Result<Self::Cache, KernelError>;

    /// Bytes of one activation in a buffer.
    fn activation_bytes(&self) -> usize;

    /// Bytes of one key or value in a cache.
    fn cache_element_bytes(&self) -> usize;

    /// Copies `values` to the start of `to`.
    ///
    /// # Errors
    /// When `to` is too short.
    fn write(&self, values: &[f32], to: &mut Self::Buffer) -> Result<(), KernelError>;

    /// Copies `values` to the start of `to`, rounded to the cache's type.
    ///
    /// # Errors
    /// When `to` is too short.
    fn write_cache(&self, values: &[f32], to: &mut Self::Cache) -> Result<(), KernelError>;

    /// Copies `values` to the start of `to`.
    ///
    /// # Errors
    /// When `to` is too short.
    fn write_indices(&self, values: &[u32], to: &mut Self::Indices) -> Result<(), KernelError>;

    /// Waits for the device and copies elements `range` of `from` to `to`.
    ///
    /// # Errors
    /// When the range is outside the buffer or does not have the length of `to`.
    fn read(&self, from: &Self::Buffer, range: Range<usize>, to: &mut [f32]) -> Result<(), KernelError>;

    /// Packs a quantized matrix for this device. `name` is the tensor's name in the checkpoint.
    ///
    /// # Errors
    /// When the device has no kernel for its bits or group size.
    fn pack_quantized(&self, name: &str, matrix: &QuantizedMatrix)
    -> Result<Self::PackedMatrix, KernelError>;

    /// Packs a dense matrix for this device. `name` is the tensor's name in the checkpoint.
    ///
    /// # Errors
    /// When the device has no kernel for its element type.
    fn pack_dense(&self, name: &str, matrix: &DenseMatrix<'_>) -> Result<Self::DenseMatrix, KernelError>;

    /// A second matrix with the values of `matrix`, copied on the device.
    ///
    /// # Errors
    /// When the device has not enough memory.
    fn copy_quantized(&self, matrix: &Self::PackedMatrix) -> Result<Self::PackedMatrix, KernelError>;

    /// A second matrix with the values of `matrix`, copied on the device.
    ///
    /// # Errors
    /// When the device has not enough memory.
    fn copy_dense(&self, matrix: &Self::DenseMatrix) -> Result<Self::DenseMatrix, KernelError>;

    /// What quantized matrices multiply here.
    fn activations(&self) -> Activations;

    /// The device's own sampling, if it has any: without, logits are read and sampled by the caller.
    fn sampler(&self) -> Option<&dyn ops::sample::Sample<Self::Buffer>>;
}

/// What quantized matrices multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Activations as they are, in the device's activation type.
    Float,
    /// Activations rounded to eight bits, with a scale for each row and each group of the weights, of at most 128
    /// inputs: faster. A dense output head of a quantized model is held in eight bits as well, and the KV cache of the CPU
    /// in half precision, on AMX in bfloat16.
    Integer,
}

/// A number of elements.
pub trait Length {
    /// How many elements there are.
    fn length(&self) -> usize;
}

/// The shape of a weight matrix in device form.
pub trait MatrixShape {
    /// Number of outputs.
    fn out_features(&self) -> usize;
    /// Number of inputs.
    fn in_features(&self) -> usize;
    /// Bytes of device memory it holds.
    fn bytes(&self) -> usize;
}

/// A device with every operation of a forward pass.
pub trait Backend:
    Device
    + ops::embedding::Embedding
    + ops::gather_rows::GatherRows
    + ops::rms_norm::RmsNorm
    + ops::rotary_embedding::RotaryEmbedding
    + ops::w4a16_matmul::W4a16Matmul
    + ops::dense_matmul::DenseMatmul
    + ops::paged_attention::PagedAttention
    + ops::silu_mul::SiluMul
{
}

impl<D> Backend for D where
    D: Device
        + ops::embedding::Embedding
        + ops::gather_rows::GatherRows
        + ops::rms_norm::RmsNorm
        + ops::rotary_embedding::RotaryEmbedding
        + ops::w4a16_matmul::W4a16Matmul
        + ops::dense_matmul::DenseMatmul
        + ops::paged_attention::PagedAttention
        + ops::silu_mul::SiluMul
{
}
