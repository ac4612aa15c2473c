//! A card, through its driver. Libraries are opened when they are first needed; nothing links to them.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrayvec::ArrayVec;
use cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUevent_flags, CUfunction_attribute, CUgraphInstantiate_flags,
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::compiler::{Architecture, Compiler};
use super::driver::{Address, Argument, Driver, Launch, MAX_ARGUMENTS, Properties, Source};
use crate::error::KernelError;

/// The oldest driver that has every function in use, as `cuDriverGetVersion` counts: CUDA 12.8.
const OLDEST_DRIVER: i32 = 12080;

/// The first compute capability on which a kernel can start before the one before it has ended.
const STARTS_EARLY_FROM: (u32, u32) = (9, 0);

/// A graphics card and one stream on it.
pub struct Card {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    properties: Properties,
    compiler: Compiler,
    loaded: Mutex<Loaded>,
}

/// Sources and kernels that are on the card, by where the source's text lies: it never moves.
#[derive(Default)]
struct Loaded {
    modules: HashMap<usize, Arc<CudaModule>>,
    functions: HashMap<(usize, &'static str), Function>,
}

struct Function {
    handle: CudaFunction,
    /// The dynamic shared memory it is allowed.
    shared_bytes: u32,
}

/// Dynamic shared memory that every kernel is allowed without asking.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card").field("properties", &self.properties).finish_non_exhaustive()
    }
}

impl Card {
    /// How many cards there are.
    ///
    /// # Errors
    /// When there is no driver, or it is too old.
    pub fn count() -> Result<usize, KernelError> {
        find_driver()?;
        match CudaContext::device_count() {
            Ok(count) => Ok(count as usize),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(error) => Err(failed("cuda", "count the cards", &error)),
        }
    }

    /// Opens card `ordinal`, counted from 0. Kernels come from `compiler`.
    ///
    /// # Errors
    /// When there is no such card, its driver is missing or too old, or it is of a generation before sm_80.
    pub fn open(ordinal: usize, compiler: Compiler) -> Result<Self, KernelError> {
        let count = Self::count()?;
        let refused = |reason: String| {
            let action = format!("open card {ordinal}");
            KernelError::Device { device: "cuda".to_owned(), action, reason }
        };
        if ordinal >= count {
            return Err(refused(format!("there are {count} cards")));
        }
        let opened = |error| failed("cuda", &format!("open card {ordinal}"), &error);
        let context = CudaContext::new(ordinal).map_err(opened)?;
        let properties = properties(&context).map_err(opened)?;
        let (major, minor) = properties.compute_capability;
        if major < 8 {
            return Err(refused(format!(
                "{} is sm_{major}{minor}, expected sm_80 or later",
                properties.name
            )));
        }
        let stream = context.new_stream().map_err(opened)?;
        Ok(Self { context, stream, properties, compiler, loaded: Mutex::default() })
    }

    /// Free and total memory of the card in bytes, whoever uses the rest.
    ///
    /// # Errors
    /// When the card has failed.
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.context.mem_get_info().map_err(|error| self.failed("ask for its memory", &error))
    }

    /// Milliseconds that the card takes for what `submit` submits, from the end of what was submitted before.
    ///
    /// # Errors
    /// When `submit` fails, or a kernel does.
    pub fn time(&self, submit: impl FnOnce() -> Result<(), KernelError>) -> Result<f64, KernelError> {
        let record = || {
            let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            event.map_err(|error| self.failed("record an event", &error))
        };
        let start = record()?;
        submit()?;
        let end = record()?;
        let elapsed = start.elapsed_ms(&end).map_err(|error| self.failed("run the kernels", &error))?;
        Ok(f64::from(elapsed))
    }

    /// Milliseconds of each of `repeats` runs of what `submit` submits. It is submitted once, to compile and load what it
    /// needs, once to be recorded, and then replayed as one: what the host does between launches does not count.
    ///
    /// # Errors
    /// When `submit` fails or does anything but launch kernels, or a kernel fails.
    pub fn time_replayed(
        &self,
        repeats: usize,
        submit: &mut dyn FnMut() -> Result<(), KernelError>,
    ) -> Result<Vec<f64>, KernelError> {
        submit()?;
        self.synchronize()?;
        let failed = |error| self.failed("record launches", &error);
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed)?;
        let submitted = submit();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        submitted?;
        let Some(graph) = graph.map_err(failed)? else {
            return Ok(vec![0.0; repeats]);
        };
        let replay = || graph.launch().map_err(|error| self.failed("replay launches", &error));
        replay()?;
        (0..repeats).map(|_| self.time(replay)).collect()
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        // Entries are whole before they are inserted.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn module(&self, loaded: &mut Loaded, source: Source) -> Result<Arc<CudaModule>, KernelError> {
        let key = source.text.as_ptr().addr();
        if let Some(module) = loaded.modules.get(&key) {
            return Ok(Arc::clone(module));
        }
        let architecture = Architecture { compute_capability: self.properties.compute_capability };
        let cubin = self.compiler.cubin(source, architecture)?;
        let module = self.context.load_module(Ptx::from_binary(cubin));
        let module = module.map_err(|error| self.failed(&format!("load {}", source.name), &error))?;
        loaded.modules.insert(key, Arc::clone(&module));
        Ok(module)
    }

    /// The kernel of `launch`, allowed the shared memory that it asks for.
    fn function(&self, launch: &Launch) -> Result<CudaFunction, KernelError> {
        let loaded = &mut *self.loaded();
        let key = (launch.source.text.as_ptr().addr(), launch.kernel);
        if !loaded.functions.contains_key(&key) {
            let module = self.module(loaded, launch.source)?;
            let handle = module.load_function(launch.kernel).map_err(|error| {
                self.failed(&format!("find {} in {}", launch.kernel, launch.source.name), &error)
            })?;
            loaded.functions.insert(key, Function { handle, shared_bytes: UNASKED_SHARED_BYTES });
        }
        let Some(function) = loaded.functions.get_mut(&key) else {
            unreachable!("it was inserted above");
        };
        if launch.shared_bytes > function.shared_bytes {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let allowed = function.handle.set_attribute(attribute, launch.shared_bytes as i32);
            allowed.map_err(|error| {
                let action = format!("give {} {} bytes of shared memory", launch.kernel, launch.shared_bytes);
                self.failed(&action, &error)
            })?;
            function.shared_bytes = launch.shared_bytes;
        }
        Ok(function.handle.clone())
    }

    fn bind(&self) -> Result<(), KernelError> {
        self.context.bind_to_thread().map_err(|error| self.failed("use the card", &error))
    }

    fn failed(&self, action: &str, error: &DriverError) -> KernelError {
        failed(&self.properties.name, action, error)
    }
}

impl Driver for Card {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        self.bind()?;
        // SAFETY: the context is current; memory without content may be asked for.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            let free = self.memory().map_or(0, |(free, _)| free);
            self.failed(&format!("allocate {bytes} bytes, with {free} free"), &error)
        })?;
        // SAFETY: the memory was just allocated with this length, and nobody else has it.
        let zeroed = unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) };
        zeroed.map_err(|error| self.failed("clear memory", &error))?;
        Ok(address)
    }

    fn free(&self, address: Address, _: usize) {
        let freed = self.synchronize().and_then(|()| {
            // SAFETY: the caller gives back what `allocate` gave, once, and nothing submitted uses it any more.
            unsafe { result::free_sync(address) }.map_err(|error| self.failed("free memory", &error))
        });
        if let Err(error) = freed {
            tracing::warn!("{error}");
        }
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller owns the device memory. `from` is ordinary host memory, which the driver has read when the
        // call returns.
        let copied = unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) };
        copied.map_err(|error| self.failed("copy to the card", &error))
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller owns the device memory, and `to` is borrowed until the wait below is over.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
        let waited = self.synchronize();
        copied.map_err(|error| self.failed("copy from the card", &error))?;
        waited
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller owns both ranges.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(|error| self.failed("copy on the card", &error))
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelError> {
        self.bind()?;
        let function = self.function(launch)?;
        let mut parameters: ArrayVec<*mut c_void, MAX_ARGUMENTS> =
            launch.arguments.iter().map(parameter).collect();
        // The kernel may start early: it waits itself for what was launched before. A pending copy it always waits for.
        let mut starts_early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let can_start_early = self.properties.compute_capability >= STARTS_EARLY_FROM;
        let [x, y, z] = launch.grid;
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut starts_early,
            numAttrs: u32::from(can_start_early),
        };
        // SAFETY: operations check their arguments and make launches that stay inside the buffers they were given; the
        // buffers live until `free` has waited for this stream. The parameters point to the values of the arguments, of
        // the kernel's types and in its order, which are read before the call returns, as is the configuration.
        let launched = unsafe {
            let config = &raw const config;
            sys::cuLaunchKernelEx(config, function.cu_function(), parameters.as_mut_ptr(), ptr::null_mut())
        };
        launched.result().map_err(|error| self.failed(&format!("launch {}", launch.kernel), &error))
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        self.stream.synchronize().map_err(|error| self.failed("run the kernels", &error))
    }
}

/// Where the value of an argument lies.
fn parameter(argument: &Argument) -> *mut c_void {
    match argument {
        Argument::Address(address) | Argument::Weights(address) => ptr::from_ref(address).cast_mut().cast(),
        Argument::U32(value) => ptr::from_ref(value).cast_mut().cast(),
        Argument::F32(value) => ptr::from_ref(value).cast_mut().cast(),
    }
}

/// Opens the driver's library, which `cudarc` would otherwise look for with a panic.
fn find_driver() -> Result<(), KernelError> {
    let missing = |reason: String| {
        Err(KernelError::Device { device: "cuda".to_owned(), action: "find a card".to_owned(), reason })
    };
    // SAFETY: opening a library runs its initializers, which for the driver have no conditions.
    if !unsafe { sys::is_culib_present() } {
        return missing("no NVIDIA driver is installed (there is no libcuda.so.1)".to_owned());
    }
    let mut version = 0;
    // SAFETY: the pointer is to a live integer; this function may be called before any other.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
    asked.map_err(|error| failed("cuda", "ask for the driver's version", &error))?;
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return missing(format!("the driver is for CUDA {major}.{minor}, expected 12.8 or later; update it"));
    }
    match result::init() {
        Ok(()) | Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(()),
        Err(error) => Err(failed("cuda", "start the driver", &error)),
    }
}

fn properties(context: &CudaContext) -> Result<Properties, DriverError> {
    let attribute = |attribute| context.attribute(attribute).map(|value| value as u32);
    Ok(Properties {
        name: context.name()?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

fn failed(device: &str, action: &str, error: &DriverError) -> KernelError {
    let text = |part: Result<&std::ffi::CStr, DriverError>| {
        part.map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned())
    };
    let reason = format!("{} ({})", text(error.error_string()), text(error.error_name()));
    KernelError::Device { device: device.to_owned(), action: action.to_owned(), reason }
}
