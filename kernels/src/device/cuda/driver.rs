//! The seam between the operations and whatever runs their kernels: a card's driver, or the emulator.

use std::fmt::Debug;

use crate::error::KernelError;

/// An address in the device's memory.
pub type Address = u64;

/// A CUDA source: one operation's kernels for all element types and shapes, compiled as one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The operation's name, which is the name of its folder.
    pub name: &'static str,
    /// What sets it apart from other sources of the operation, as part of a file's name; empty for an only one.
    pub variant: &'static str,
    /// The text of its `kernel.cu`.
    pub text: &'static str,
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// A pointer to device memory.
    Address(Address),
    /// A pointer to device memory that no kernel writes: it may be read before the kernel before has ended.
    Weights(Address),
    /// A 32-bit unsigned integer.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
}

/// Most arguments a kernel has.
pub const MAX_ARGUMENTS: usize = 32;

/// A kernel launch, as data. Where the card can, the kernel starts before those submitted earlier have ended: it waits
/// for them itself (`wait_for_previous_kernel` in `common.cuh`).
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The module.
    pub source: Source,
    /// The name of the entry point.
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The arguments in the order of the kernel's parameters.
    pub arguments: arrayvec::ArrayVec<Argument, MAX_ARGUMENTS>,
}

/// What a launch must know of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// The card's name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory a block can ask for.
    pub shared_bytes_per_block: u32,
}

/// A device that holds memory and runs launches in the order they are submitted.
pub trait Driver: Debug + Send + Sync {
    /// What the device is.
    fn properties(&self) -> &Properties;

    /// Zeroed device memory, aligned to 256 bytes. `bytes` is positive.
    ///
    /// # Errors
    /// When there is not enough memory.
    fn allocate(&self, bytes: usize) -> Result<Address, KernelError>;

    /// Gives back what [`Self::allocate`] gave, once everything submitted before has run.
    fn free(&self, address: Address, bytes: usize);

    /// Copies `from` to device memory, after everything submitted before.
    ///
    /// # Errors
    /// When the device failed.
    fn write(&self, from: &[u8], to: Address) -> Result<(), KernelError>;

    /// Waits for everything submitted before and copies device memory to `to`.
    ///
    /// # Errors
    /// When the device failed.
    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), KernelError>;

    /// Copies device memory to device memory, after everything submitted before. The ranges do not overlap.
    ///
    /// # Errors
    /// When the device failed.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), KernelError>;

    /// Submits a kernel. Does not wait for it.
    ///
    /// # Errors
    /// When the source does not compile, or the device refuses the launch.
    fn launch(&self, launch: &Launch) -> Result<(), KernelError>;

    /// Waits for everything submitted so far.
    ///
    /// # Errors
    /// When a kernel failed.
    fn synchronize(&self) -> Result<(), KernelError>;
}
