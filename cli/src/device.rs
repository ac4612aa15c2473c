//! The device options that commands share, and models loaded on it.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::{Cpu, CpuCache, InstructionSet, Peak};
use nibble_kernels::device::cuda::card::Card;
use nibble_kernels::device::cuda::compiler::Compiler;
use nibble_kernels::device::cuda::driver::Driver;
use nibble_kernels::device::cuda::{Cuda, Element, Memory};
use nibble_kernels::tensor::FloatType;
use nibble_kernels::{Backend, KernelError};
use nibble_model::checkpoint::Checkpoint;
use nibble_model::config::ModelConfig;
use nibble_model::forward::{Model, ModelError, rounded_copy_bytes};

use crate::hub::model_path;
use crate::memory;

/// Bytes that are copied to measure what memory can do.
const HOST_COPY_BYTES: usize = 256 << 20;
const CARD_COPY_BYTES: usize = 2 << 30;

/// The CPU, for commands that compute there only.
#[derive(Debug, Args)]
pub(crate) struct DeviceArguments {
    /// The device of this command.
    #[arg(long, value_enum, default_value_t = CpuDevice::Auto)]
    device: CpuDevice,
    /// Threads of the CPU device; all processors when not given.
    #[arg(long)]
    threads: Option<usize>,
}

/// The choices of `--device` where there is one device.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CpuDevice {
    Auto,
    Cpu,
}

impl DeviceArguments {
    /// Threads to use.
    pub(crate) fn threads(&self) -> usize {
        threads(self.threads)
    }

    /// The CPU device, with activations as they are.
    pub(crate) fn cpu(&self) -> Cpu {
        match self.device {
            CpuDevice::Auto | CpuDevice::Cpu => Cpu::new(self.threads()),
        }
    }
}

/// Where and how a command runs a model.
#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    /// The device; auto takes the first card if there is one, and the CPU if not.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// Threads of the CPU device; all processors when not given.
    #[arg(long)]
    threads: Option<usize>,
    /// CPU: what quantized weights multiply. int8 rounds activations to eight bits, a scale for each group, and the
    /// output head as well, and is up to twice as fast; f32 takes them as they are. Without it `eval` takes f32,
    /// other commands int8.
    #[arg(long, value_enum)]
    activations: Option<ActivationsArgument>,
    /// CPU: the vector instructions to use; the fastest that the processor has when not given.
    #[arg(long, value_name = "NAME", value_parser = instruction_set)]
    instruction_set: Option<InstructionSet>,
    /// Card: the type of activations and of the KV cache; auto takes what the checkpoint names, f16 for float32.
    #[arg(long, value_enum, default_value_t = DataType::Auto)]
    dtype: DataType,
    #[command(flatten)]
    kernels: KernelCacheArguments,
}

/// Where compiled kernels are kept.
#[derive(Debug, Args)]
pub(crate) struct KernelCacheArguments {
    /// Card: where compiled kernels are kept and looked for; nibble/kernels in the user's cache directory when not
    /// given.
    #[arg(long, value_name = "DIR")]
    kernel_cache: Option<PathBuf>,
}

/// The choices of `--activations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ActivationsArgument {
    Int8,
    F32,
}

/// The vector instructions of that name, if the processor has them.
fn instruction_set(name: &str) -> Result<InstructionSet, String> {
    let available = InstructionSet::available();
    available.iter().find(|set| set.to_string() == name).copied().ok_or_else(|| {
        let names: Vec<String> = available.iter().map(ToString::to_string).collect();
        format!("this processor has {}", names.join(", "))
    })
}

/// The devices of `--device`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
}

/// The choices of `--dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DataType {
    Auto,
    F16,
    Bf16,
}

/// The device a command runs on.
pub(crate) enum ChosenDevice {
    /// The processor.
    Cpu {
        /// Threads that share an operation.
        threads: usize,
        /// What quantized weights multiply.
        activations: Activations,
        /// Vector instructions.
        set: InstructionSet,
    },
    /// A card.
    Cuda {
        card: Arc<Card>,
        /// The type of activations.
        element: Element,
    },
}

/// What a command does once the kind of its device is known.
pub(crate) trait Work {
    /// What comes of it.
    type Output;

    /// Does it. `open` makes a backend on the device; whoever compares two models needs two.
    fn run<B: Backend + Send + 'static>(
        self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<Self::Output>;
}

impl ModelArguments {
    /// The device for a model of `config`, as fast as it gets unless something else is asked for.
    pub(crate) fn device(&self, config: &ModelConfig) -> anyhow::Result<ChosenDevice> {
        self.device_or(config.float_type, Activations::Integer)
    }

    /// The device for a checkpoint of `float_type`, on the CPU with `activations` unless something else is asked for.
    pub(crate) fn device_or(
        &self,
        float_type: FloatType,
        activations: Activations,
    ) -> anyhow::Result<ChosenDevice> {
        let card = match self.device {
            Device::Cpu => None,
            Device::Cuda => Some(self.kernels.card()?),
            Device::Auto => match self.kernels.card() {
                Ok(card) => Some(card),
                Err(reason) => {
                    eprintln!("on the CPU: {reason:#}");
                    None
                }
            },
        };
        Ok(match card {
            Some(card) => ChosenDevice::Cuda { card: Arc::new(card), element: self.element(float_type) },
            None => ChosenDevice::Cpu {
                threads: threads(self.threads),
                set: self.instruction_set.unwrap_or_else(InstructionSet::detect),
                activations: match self.activations {
                    None => activations,
                    Some(ActivationsArgument::Int8) => Activations::Integer,
                    Some(ActivationsArgument::F32) => Activations::Float,
                },
            },
        })
    }

    fn element(&self, float_type: FloatType) -> Element {
        match (self.dtype, float_type) {
            (DataType::F16, _) | (DataType::Auto, FloatType::F16 | FloatType::F32) => Element::F16,
            (DataType::Bf16, _) | (DataType::Auto, FloatType::BF16) => Element::BF16,
        }
    }
}

impl KernelCacheArguments {
    /// The compiler that keeps its results there.
    pub(crate) fn compiler(&self) -> Compiler {
        let cache = || {
            let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
            let cache = variable("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))?;
            Some(cache.join("nibble/kernels"))
        };
        Compiler::new(self.kernel_cache.clone().or_else(cache))
    }

    /// The first card.
    pub(crate) fn card(&self) -> anyhow::Result<Card> {
        Ok(Card::open(0, self.compiler())?)
    }
}

impl ChosenDevice {
    /// What it is, for a user.
    pub(crate) fn description(&self) -> String {
        match self {
            Self::Cpu { threads, set, .. } => format!("{threads} threads, {set}"),
            Self::Cuda { card, element } => format!("{}, {element}", card.properties().name),
        }
    }

    /// The relative error of rounding a value to an activation.
    pub(crate) fn roundoff(&self) -> f32 {
        match self {
            Self::Cpu { .. } => f32::EPSILON / 2.0,
            Self::Cuda { element: Element::F16, .. } => 2.0_f32.powi(-11),
            Self::Cuda { element: Element::BF16, .. } => 2.0_f32.powi(-8),
        }
    }

    /// Seconds of each of `repeats` runs of what `submit` submits, on a card without what the host does between
    /// launches.
    pub(crate) fn time(
        &self,
        repeats: usize,
        submit: &mut dyn FnMut() -> Result<(), KernelError>,
    ) -> Result<Vec<f64>, KernelError> {
        match self {
            Self::Cpu { .. } => {
                submit()?;
                let mut run = |_| {
                    let started = Instant::now();
                    submit().map(|()| started.elapsed().as_secs_f64())
                };
                (0..repeats).map(&mut run).collect()
            }
            Self::Cuda { card, .. } => {
                let milliseconds = card.time_replayed(repeats, submit)?;
                Ok(milliseconds.into_iter().map(|time| time / 1e3).collect())
            }
        }
    }

    /// Bytes a second, read and written together, of copying memory of this device.
    pub(crate) fn copy_bandwidth(&self) -> Result<f64, KernelError> {
        const RUNS: usize = 9;
        let (bytes, times) = match self {
            &Self::Cpu { threads, .. } => {
                let from = vec![1_u64; HOST_COPY_BYTES / size_of::<u64>()];
                let mut to = from.clone();
                let part = from.len().div_ceil(threads);
                let mut copy = |_| {
                    let started = Instant::now();
                    std::thread::scope(|scope| {
                        for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                            scope.spawn(move || to.copy_from_slice(from));
                        }
                    });
                    started.elapsed().as_secs_f64()
                };
                (HOST_COPY_BYTES, (0..RUNS).map(&mut copy).collect::<Vec<_>>())
            }
            Self::Cuda { card, .. } => {
                let driver = Arc::clone(card) as Arc<dyn Driver>;
                let from = Memory::new(&driver, CARD_COPY_BYTES)?;
                let to = Memory::new(&driver, CARD_COPY_BYTES)?;
                let copy = || card.copy(from.address(), to.address(), CARD_COPY_BYTES);
                copy()?;
                let times = (0..RUNS).map(|_| Ok(card.time(copy)? / 1e3)).collect::<Result<Vec<_>, _>>()?;
                (CARD_COPY_BYTES, times)
            }
        };
        let fastest = times.into_iter().fold(f64::INFINITY, f64::min);
        Ok(2.0 * bytes as f64 / fastest)
    }

    /// Bytes a second that all threads together read from memory; a card's is not measured.
    pub(crate) fn read_bandwidth(&self) -> Option<f64> {
        let &Self::Cpu { threads, set, .. } = self else { return None };
        Some(Cpu::with_instruction_set(threads, set).read_bandwidth())
    }

    /// What it multiplies at most; a card's is not measured.
    pub(crate) fn peak(&self) -> Option<Peak> {
        let &Self::Cpu { threads, activations, set } = self else { return None };
        Some(Cpu::with_instruction_set(threads, set).with_activations(activations).peak())
    }

    /// Bytes of a key or value in a KV cache.
    pub(crate) fn cache_element_bytes(&self) -> usize {
        match self {
            &Self::Cpu { activations, .. } => CpuCache::element_bytes(activations),
            Self::Cuda { element, .. } => element.bytes(),
        }
    }

    /// Bytes of the eight-bit output head that is made beside the embedding table of `checkpoint`.
    pub(crate) fn head_copy_bytes(&self, checkpoint: &Checkpoint) -> u64 {
        match self {
            &Self::Cpu { activations, .. } => rounded_copy_bytes(checkpoint, activations),
            Self::Cuda { .. } => 0,
        }
    }

    /// What the KV cache takes at most unless told otherwise, beside weights of `weight_bytes` that are not yet loaded.
    pub(crate) fn kv_cache_bytes(&self, weight_bytes: u64) -> anyhow::Result<u64> {
        Ok(match self {
            Self::Cpu { .. } => memory::host_kv_cache_bytes(memory::free_bytes()),
            Self::Cuda { card, .. } => memory::card_kv_cache_bytes(card.memory()?.0 as u64, weight_bytes),
        })
    }

    /// Does `work` on it.
    pub(crate) fn run<W: Work>(&self, work: W) -> anyhow::Result<W::Output> {
        match self {
            &Self::Cpu { threads, activations, set } => {
                work.run(&|| Ok(Cpu::with_instruction_set(threads, set).with_activations(activations)))
            }
            Self::Cuda { card, element } => {
                work.run(&|| Ok(Cuda::new(Arc::clone(card) as Arc<dyn Driver>, *element)?))
            }
        }
    }
}

/// Threads asked for, or all there are.
fn threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1)
}

/// Opens the checkpoint of `model`: a directory, a GGUF file, or a Hugging Face id.
pub(crate) fn open_checkpoint(model: &str) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(&model_path(model)?)?)
}

/// Loads a checkpoint onto `backend` for sequences of up to `max_positions` tokens.
pub(crate) fn load<B: Backend>(
    checkpoint: &Checkpoint,
    backend: B,
    max_positions: usize,
) -> anyhow::Result<Model<B>> {
    Model::load(backend, checkpoint, max_positions).map_err(|error| {
        // On the CPU every form of a GGUF file has its kernel.
        let help = match &error {
            ModelError::Kernel(_) if checkpoint.is_gguf() => {
                "; run it with --device cpu, or make an INT4 directory of it with nibble import and nibble quantize"
            }
            _ => "",
        };
        let path = checkpoint.path().display();
        anyhow::Error::new(error).context(format!("cannot load {path}{help}"))
    })
}
