//! The device options that commands share, and models loaded on it.

use anyhow::Context;
use clap::{Args, ValueEnum};
use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::Model;

use crate::hub::model_directory;

/// Where a command computes.
#[derive(Debug, Args)]
pub(crate) struct DeviceArguments {
    /// The device; auto takes the best there is.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
    /// Threads of the CPU device; all processors when not given.
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

/// Where and how a command runs a model.
#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    /// What quantized weights multiply: int8 rounds activations to eight bits, a scale for each group, and the output
    /// head as well, and is up to twice as fast; f32 takes them as they are. Without it `eval` takes f32, other
    /// commands int8.
    #[arg(long, value_enum)]
    activations: Option<ActivationsArgument>,
}

/// The choices of `--activations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ActivationsArgument {
    Int8,
    F32,
}

/// The devices of `--device`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Device {
    Auto,
    Cpu,
}

impl DeviceArguments {
    /// Threads to use.
    pub(crate) fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(processors).max(1)
    }

    /// The CPU device, with activations as they are.
    pub(crate) fn cpu(&self) -> Cpu {
        match self.device {
            Device::Auto | Device::Cpu => Cpu::new(self.threads()),
        }
    }
}

impl ModelArguments {
    /// The CPU device, as fast as it gets unless something else is asked for.
    pub(crate) fn cpu(&self) -> Cpu {
        self.cpu_or(Activations::Integer)
    }

    /// The CPU device, with `default` unless something else is asked for.
    pub(crate) fn cpu_or(&self, default: Activations) -> Cpu {
        self.device.cpu().with_activations(match self.activations {
            None => default,
            Some(ActivationsArgument::Int8) => Activations::Integer,
            Some(ActivationsArgument::F32) => Activations::Float,
        })
    }
}

/// Opens the checkpoint of `model`: a directory, or a Hugging Face id.
pub(crate) fn open_checkpoint(model: &str) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(&model_directory(model)?)?)
}

/// Loads a checkpoint onto `cpu` for sequences of up to `max_positions` tokens.
pub(crate) fn load(checkpoint: &Checkpoint, cpu: Cpu, max_positions: usize) -> anyhow::Result<Model<Cpu>> {
    Model::load(cpu, checkpoint, max_positions)
        .with_context(|| format!("cannot load {}", checkpoint.directory().display()))
}
