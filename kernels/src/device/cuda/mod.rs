//! The CUDA device: 16-bit activations, kernels in `ops/*/kernel.cu`, submitted through a [`driver::Driver`].

pub mod card;
pub mod compiler;
pub mod driver;
mod element;
mod matrix;
mod memory;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub use element::Element;
pub use matrix::{CudaDenseMatrix, CudaPackedMatrix};
pub use memory::{CudaBuffer, CudaIndices, Memory};

use crate::backend::{Activations, Device, Length};
use crate::error::KernelError;
use crate::ops::sample::Sample;
use crate::ops::w4a16_matmul::layout;
use crate::tensor::{DenseMatrix, QuantizedMatrix};
use driver::{Address, Driver, Launch, Properties};

/// Bytes of [`Cuda::workspace`].
pub const WORKSPACE_BYTES: usize = 64 << 20;

/// Words of [`Cuda::counters`].
pub const COUNTERS: usize = 1 << 16;

/// A card, or whatever else runs CUDA kernels, with activations of one 16-bit type.
#[derive(Debug)]
pub struct Cuda {
    driver: Arc<dyn Driver>,
    element: Element,
    workspace: Memory,
    counters: Memory,
    /// Where elements lie on their way to the host.
    staging: Mutex<Vec<u16>>,
}

impl Cuda {
    /// A device on `driver` whose activations, caches and dense weights are of type `element`.
    ///
    /// # Errors
    /// When there is no memory for the workspace.
    pub fn new(driver: Arc<dyn Driver>, element: Element) -> Result<Self, KernelError> {
        let workspace = Memory::new(&driver, WORKSPACE_BYTES)?;
        let counters = Memory::new(&driver, COUNTERS * size_of::<u32>())?;
        Ok(Self { driver, element, workspace, counters, staging: Mutex::default() })
    }

    /// The type of activations, caches and dense weights.
    pub fn element(&self) -> Element {
        self.element
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// What runs the kernels.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Submits a kernel. Does not wait for it.
    ///
    /// # Errors
    /// When the source does not compile, or the device refuses the launch.
    pub fn submit(&self, launch: &Launch) -> Result<(), KernelError> {
        self.driver.launch(launch)
    }

    /// Memory of at least `bytes` bytes, with any content, for the launches of one operation: whatever the next
    /// operation submits may overwrite it.
    ///
    /// # Errors
    /// When `bytes` is more than [`WORKSPACE_BYTES`].
    pub fn workspace(&self, bytes: usize) -> Result<Address, KernelError> {
        let fits = bytes <= WORKSPACE_BYTES;
        KernelError::require(fits, "workspace", "bytes", bytes, "must be at most 64 MiB")?;
        Ok(self.workspace.address())
    }

    /// At least `count` 32-bit words that are zero; whoever counts with them leaves zeros behind.
    ///
    /// # Errors
    /// When `count` is more than [`COUNTERS`].
    pub fn counters(&self, count: usize) -> Result<Address, KernelError> {
        KernelError::require(count <= COUNTERS, "counters", "count", count, "must be at most 65536")?;
        Ok(self.counters.address())
    }
}

impl Device for Cuda {
    type Buffer = CudaBuffer;
    type Indices = CudaIndices;
    type Cache = CudaBuffer;
    type PackedMatrix = CudaPackedMatrix;
    type DenseMatrix = CudaDenseMatrix;

    fn buffer(&self, elements: usize) -> Result<CudaBuffer, KernelError> {
        let memory = Memory::new(&self.driver, elements * self.element.bytes())?;
        Ok(CudaBuffer { memory, elements })
    }

    fn indices(&self, elements: usize) -> Result<CudaIndices, KernelError> {
        let memory = Memory::new(&self.driver, elements * size_of::<u32>())?;
        Ok(CudaIndices { memory, elements })
    }

    fn cache(&self, elements: usize) -> Result<CudaBuffer, KernelError> {
        self.buffer(elements)
    }

    fn activation_bytes(&self) -> usize {
        self.element.bytes()
    }

    fn cache_element_bytes(&self) -> usize {
        self.element.bytes()
    }

    fn write(&self, values: &[f32], to: &mut CudaBuffer) -> Result<(), KernelError> {
        fits("write", values.len(), to.length())?;
        self.element.write(&*self.driver, values, to.address())
    }

    fn write_cache(&self, values: &[f32], to: &mut CudaBuffer) -> Result<(), KernelError> {
        self.write(values, to)
    }

    fn write_indices(&self, values: &[u32], to: &mut CudaIndices) -> Result<(), KernelError> {
        fits("write_indices", values.len(), to.length())?;
        self.driver.write(bytemuck::cast_slice(values), to.address())
    }

    fn read(&self, from: &CudaBuffer, range: Range<usize>, to: &mut [f32]) -> Result<(), KernelError> {
        fits("read", range.end, from.length())?;
        KernelError::check("read", "to", to.len(), range.len())?;
        let offset = (range.start * self.element.bytes()) as Address;
        // Whatever a panic left in there is overwritten.
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        self.element.read(&*self.driver, from.address() + offset, to, &mut staging)
    }

    fn pack_quantized(&self, name: &str, matrix: &QuantizedMatrix) -> Result<CudaPackedMatrix, KernelError> {
        let parts = layout::pack(matrix, self.element).map_err(|error| match error {
            KernelError::Value { operation, argument, found, requirement } => {
                KernelError::Value { operation, argument, found: format!("{found} in {name}"), requirement }
            }
            error => error,
        })?;
        CudaPackedMatrix::new(&self.driver, &parts)
    }

    fn pack_dense(&self, name: &str, matrix: &DenseMatrix<'_>) -> Result<CudaDenseMatrix, KernelError> {
        CudaDenseMatrix::new(&self.driver, self.element, name, matrix)
    }

    fn copy_quantized(&self, matrix: &CudaPackedMatrix) -> Result<CudaPackedMatrix, KernelError> {
        matrix.copy()
    }

    fn copy_dense(&self, matrix: &CudaDenseMatrix) -> Result<CudaDenseMatrix, KernelError> {
        matrix.copy()
    }

    fn activations(&self) -> Activations {
        Activations::Float
    }

    fn sampler(&self) -> Option<&dyn Sample<CudaBuffer>> {
        Some(self)
    }
}

fn fits(operation: &'static str, needed: usize, length: usize) -> Result<(), KernelError> {
    KernelError::require(needed <= length, operation, "elements", needed, "must fit the device buffer")
}

#[cfg(test)]
mod tests;
