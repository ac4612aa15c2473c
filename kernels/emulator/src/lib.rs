//! Runs the CUDA kernels of Nibble on a CPU: a [`Driver`] for tests, on machines without a card.
//!
//! A kernel's source is compiled with the machine's C++ compiler, each CUDA thread of a block becomes a fiber, and the
//! instructions that `common.cuh` wraps are carried out by the runtime in `runtime/`. A launch fails, with the kernel,
//! block and thread named, when
//! - an access lies outside of device memory or of the block's shared memory, or is misaligned;
//! - two threads access the same bytes of shared memory with no barrier in between, or anyone touches the destination
//!   of an asynchronous copy before it was waited for;
//! - a thread accesses bytes of global memory that another thread wrote, with no barrier in between within a block, no
//!   fence and atomic between blocks, or that were read as memory that nobody writes;
//! - a thread accesses memory that other kernels may write before it has waited for the kernel before;
//! - the lanes of a warp are at different collectives, a barrier waits for threads that have ended, or a block does not
//!   end.
//!
//! Blocks run one after another, in an order drawn from the seed; warps and lanes too. What is not modelled: blocks that
//! wait for each other, the order in which other blocks see writes, and how a tensor core rounds.

mod compiler;
mod library;
mod memory;
pub mod mutations;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nibble_kernels::KernelError;
use nibble_kernels::device::cuda::driver::{Address, Argument, Driver, Launch, Properties, Source};

use library::Library;
pub use library::Report;
use memory::Memory;
use mutations::Mutation;

/// An emulated card with host memory. Launches run at once, on the thread that submits them.
#[derive(Debug)]
pub struct Emulator {
    properties: Properties,
    memory: Mutex<Memory>,
    seed: u64,
    launches: AtomicU64,
    report: Mutex<Report>,
    mutation: Option<Mutation>,
}

impl Emulator {
    /// An emulated A100 whose launches order their blocks, warps and lanes by `seed` and their number.
    pub fn new(seed: u64) -> Self {
        Self {
            properties: Properties {
                name: "emulated A100".to_owned(),
                compute_capability: (8, 0),
                multiprocessors: 108,
                shared_bytes_per_block: 163 << 10,
            },
            memory: Mutex::new(Memory::default()),
            seed,
            launches: AtomicU64::new(0),
            report: Mutex::new(Report::default()),
            mutation: None,
        }
    }

    /// An emulated H100, whose kernels use the products of warpgroups.
    pub fn hopper(seed: u64) -> Self {
        let properties = Properties {
            name: "emulated H100".to_owned(),
            compute_capability: (9, 0),
            multiprocessors: 132,
            shared_bytes_per_block: 227 << 10,
        };
        Self { properties, ..Self::new(seed) }
    }

    /// Runs the kernels of one source with a fault.
    #[must_use]
    pub fn with_mutation(self, mutation: Mutation) -> Self {
        Self { mutation: Some(mutation), ..self }
    }

    /// Another number of multiprocessors, which is what launches choose their grids by.
    #[must_use]
    pub fn with_multiprocessors(mut self, multiprocessors: u32) -> Self {
        self.properties.multiprocessors = multiprocessors;
        self
    }

    /// What the latest launch did.
    pub fn report(&self) -> Report {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles a source, with the fault if there is one. A launch does so too; this tells a fault that does not compile
    /// from one that a test has found.
    ///
    /// # Errors
    /// When the fault cannot be planted, or what the compiler says.
    pub fn compile(&self, source: Source) -> Result<(), KernelError> {
        self.library(source).map(|_| ())
    }

    fn library(&self, source: Source) -> Result<Arc<Library>, KernelError> {
        let text = match &self.mutation {
            Some(mutation) if mutation.source == source.name => {
                mutation.apply(source.text).map_err(|reason| error("plant a fault", reason))?
            }
            _ => source.text.to_owned(),
        };
        let action = format!("compile {}", source.name);
        let warpgroups = self.properties.compute_capability == (9, 0);
        Library::of_source(source.name, &text, warpgroups).map_err(|reason| error(action, reason))
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        let reason = |reason| error(format!("allocate {bytes} bytes"), reason);
        self.memory().allocate(bytes).map_err(reason)
    }

    fn free(&self, address: Address, bytes: usize) {
        self.memory().free(address, bytes);
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), KernelError> {
        self.memory().write(from, to).map_err(|reason| error("write", reason))
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), KernelError> {
        self.memory().read(from, to).map_err(|reason| error("read", reason))
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), KernelError> {
        let memory = self.memory();
        let mut between = vec![0; bytes];
        let copied = memory.read(from, &mut between).and_then(|()| memory.write(&between, to));
        copied.map_err(|reason| error("copy", reason))
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelError> {
        let action = format!("run {}", launch.kernel);
        if launch.shared_bytes > self.properties.shared_bytes_per_block {
            let reason =
                format!("{} bytes of shared memory are more than the device has", launch.shared_bytes);
            return Err(error(action, reason));
        }
        let library = self.library(launch.source)?;
        let seed = self.seed.wrapping_mul(1009).wrapping_add(self.launches.fetch_add(1, Ordering::Relaxed));
        // Held while the kernel runs: nothing is freed under it, and launches are one after another.
        let memory = self.memory();
        let mut ranges = memory.ranges();
        for argument in &launch.arguments {
            if let Argument::Weights(address) = argument {
                let named = ranges.iter_mut().filter(|range| (range.start..range.end).contains(address));
                named.for_each(|range| range.is_weights = 1);
            }
        }
        let (report, outcome) =
            library.launch(launch, &ranges, seed).map_err(|reason| error(action.clone(), reason))?;
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = report;
        outcome.map_err(|reason| error(action, reason))
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        Ok(())
    }
}

fn error(action: impl Into<String>, reason: String) -> KernelError {
    KernelError::Device { device: "emulator".to_owned(), action: action.into(), reason }
}
