//! A kernel source compiled and loaded, and the runtime's C interface (`runtime/interface.h`).

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

use nibble_kernels::device::cuda::driver::{Argument, Launch};

use crate::compiler;

/// Device memory from `start` up to, not including, `end`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Whether the launch names it as weights.
    pub(crate) is_weights: u64,
}

/// What a launch did, over all blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Loads from global memory by single threads, of 1, 2, 4, 8 and 16 bytes.
    pub global_loads: [u64; 5],
    /// Stores to global memory by single threads, of 1, 2, 4, 8 and 16 bytes.
    pub global_stores: [u64; 5],
    /// Asynchronous copies started by single threads.
    pub async_copies: u64,
    /// Bytes they read.
    pub async_bytes: u64,
    /// Sectors of 32 bytes of global memory that warps' requests move.
    pub global_sectors: u64,
    /// Sectors that the bytes they ask for would fill: fewer where accesses are scattered.
    pub global_full_sectors: u64,
    /// Block barriers passed, once for each block.
    pub block_barriers: u64,
    /// Shuffles of warps.
    pub shuffles: u64,
    /// Products of matrices (16 x 8 x 16) of warps.
    pub matrix_products: u64,
    /// Cycles that loads of matrices from shared memory take without bank conflicts.
    pub matrix_load_cycles: u64,
    /// Cycles that bank conflicts add to them.
    pub matrix_conflict_cycles: u64,
    /// Cycles that other requests to shared memory take without bank conflicts.
    pub shared_cycles: u64,
    /// Cycles that bank conflicts add to them.
    pub shared_conflict_cycles: u64,
}

const ERROR_BYTES: usize = 1024;

#[repr(C)]
struct RawReport {
    report: Report,
    error: [c_char; ERROR_BYTES],
}

#[repr(C)]
struct RawArgument {
    is_float: u32,
    padding: u32,
    bits: u64,
}

#[repr(C)]
struct RawLaunch {
    kernel: *const c_void,
    name: *const c_char,
    grid: [u32; 3],
    block: u32,
    shared_bytes: u32,
    argument_count: u32,
    arguments: *const RawArgument,
    ranges: *const Range,
    range_count: u64,
    seed: u64,
}

type LaunchFunction = unsafe extern "C" fn(*const RawLaunch, *mut RawReport) -> c_int;

/// A loaded kernel source.
#[derive(Debug)]
pub(crate) struct Library(libloading::Library);

/// A source's name and text, and whether the device has products of warpgroups.
type Key = (String, String, bool);

/// A source that is being compiled, or was.
type Loading = Arc<OnceLock<Result<Arc<Library>, String>>>;

impl Library {
    /// Compiles and loads a source, once in this process.
    pub(crate) fn of_source(name: &str, text: &str, warpgroups: bool) -> Result<Arc<Self>, String> {
        static LOADED: LazyLock<Mutex<HashMap<Key, Loading>>> = LazyLock::new(Mutex::default);
        let key = (name.to_owned(), text.to_owned(), warpgroups);
        let loading = LOADED.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().clone();
        loading.get_or_init(|| Self::load(name, text, warpgroups).map(Arc::new)).clone()
    }

    fn load(name: &str, text: &str, warpgroups: bool) -> Result<Self, String> {
        let path = compiler::compile(name, text, warpgroups)?;
        // SAFETY: the object was made from the runtime and a kernel source; nothing in it runs at load time.
        unsafe { libloading::Library::new(&path) }.map(Self).map_err(|error| error.to_string())
    }

    /// Runs a launch of this source. The inner result is the kernel's.
    pub(crate) fn launch(
        &self,
        launch: &Launch,
        ranges: &[Range],
        seed: u64,
    ) -> Result<(Report, Result<(), String>), String> {
        let name = CString::new(launch.kernel).map_err(|error| error.to_string())?;
        // SAFETY: the runtime exports a function of this type.
        let run = unsafe { self.0.get::<LaunchFunction>(c"nibble_emulator_launch".to_bytes_with_nul()) };
        let run = run.map_err(|error| error.to_string())?;
        // SAFETY: only the symbol's address is used here.
        let kernel = unsafe { self.0.get::<*const c_void>(name.to_bytes_with_nul()) };
        let kernel = kernel.map_err(|_| format!("{} has no kernel {}", launch.source.name, launch.kernel))?;
        let arguments: Vec<RawArgument> = launch.arguments.iter().map(RawArgument::from).collect();
        let raw = RawLaunch {
            kernel: *kernel,
            name: name.as_ptr(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            argument_count: arguments.len() as u32,
            arguments: arguments.as_ptr(),
            ranges: ranges.as_ptr(),
            range_count: ranges.len() as u64,
            seed,
        };
        let mut report = RawReport { report: Report::default(), error: [0; ERROR_BYTES] };
        // SAFETY: the launch and what it points to live through the call; the kernel was found in the same object, and
        // the runtime lets it access only its own memory and `ranges`.
        let failed = unsafe { run(&raw const raw, &raw mut report) } != 0;
        // SAFETY: the runtime ends the message with a zero within the array.
        let message = unsafe { CStr::from_ptr(report.error.as_ptr()) }.to_string_lossy().into_owned();
        Ok((report.report, if failed { Err(message) } else { Ok(()) }))
    }
}

impl From<&Argument> for RawArgument {
    fn from(argument: &Argument) -> Self {
        let (is_float, bits) = match *argument {
            Argument::Address(address) | Argument::Weights(address) => (0, address),
            Argument::U32(value) => (0, u64::from(value)),
            Argument::F32(value) => (1, u64::from(value.to_bits())),
        };
        Self { is_float, padding: 0, bits }
    }
}
