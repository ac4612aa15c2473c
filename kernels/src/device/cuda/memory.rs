//! Device memory that is given back when its owner is dropped.

use std::sync::Arc;

use super::driver::{Address, Driver};
use crate::backend::Length;
use crate::error::KernelError;

/// A range of device memory, zeroed when it was made. Without bytes it has the address 0.
#[derive(Debug)]
pub struct Memory {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// `bytes` zero bytes.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, KernelError> {
        let address = if bytes > 0 { driver.allocate(bytes)? } else { 0 };
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// The bytes of `values`.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn with(driver: &Arc<dyn Driver>, values: &[impl bytemuck::NoUninit]) -> Result<Self, KernelError> {
        let memory = Self::new(driver, size_of_val(values))?;
        if memory.bytes > 0 {
            driver.write(bytemuck::cast_slice(values), memory.address)?;
        }
        Ok(memory)
    }

    /// Another range with the same bytes.
    ///
    /// # Errors
    /// When the device has not enough memory.
    pub fn copy(&self) -> Result<Self, KernelError> {
        let memory = Self::new(&self.driver, self.bytes)?;
        if self.bytes > 0 {
            self.driver.copy(self.address, memory.address, self.bytes)?;
        }
        Ok(memory)
    }

    /// Where it starts.
    pub fn address(&self) -> Address {
        self.address
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.driver.free(self.address, self.bytes);
        }
    }
}

/// Activations of a CUDA device, 16 bits each.
#[derive(Debug)]
pub struct CudaBuffer {
    pub(super) memory: Memory,
    pub(super) elements: usize,
}

impl CudaBuffer {
    /// Where the first element lies.
    pub fn address(&self) -> Address {
        self.memory.address()
    }
}

impl Length for CudaBuffer {
    fn length(&self) -> usize {
        self.elements
    }
}

/// Indices of a CUDA device, 32 bits each.
#[derive(Debug)]
pub struct CudaIndices {
    pub(super) memory: Memory,
    pub(super) elements: usize,
}

impl CudaIndices {
    /// Where the first word lies.
    pub fn address(&self) -> Address {
        self.memory.address()
    }
}

impl Length for CudaIndices {
    fn length(&self) -> usize {
        self.elements
    }
}
