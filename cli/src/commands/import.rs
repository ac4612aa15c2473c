//! `nibble import`: a GGUF file to a Hugging Face directory.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use nibble_kernels::tensor::FloatType;
use nibble_model::import::{ImportOptions, import};

use crate::output::Progress;

/// Arguments of `nibble import`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble import ./qwen2.5-coder-0.5b-instruct.gguf ./qwen2.5-coder-0.5b")]
pub(crate) struct ImportArguments {
    /// A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model.
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// The directory to write; it must not exist.
    out_dir: PathBuf,
    /// Element type of the weights. A value that it cannot hold is refused.
    #[arg(long, value_enum, default_value_t = ElementType::F16)]
    dtype: ElementType,
    /// Largest size of a weight file, in megabytes.
    #[arg(long, value_name = "MB", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..1 << 30))]
    max_shard_megabytes: u64,
}

/// The element types of `--dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ElementType {
    F16,
    Bf16,
    F32,
}

/// Runs the command.
pub(crate) fn run(arguments: &ImportArguments) -> anyhow::Result<()> {
    let started = Instant::now();
    let options = ImportOptions {
        float_type: match arguments.dtype {
            ElementType::F16 => FloatType::F16,
            ElementType::Bf16 => FloatType::BF16,
            ElementType::F32 => FloatType::F32,
        },
        max_shard_bytes: arguments.max_shard_megabytes * 1_000_000,
    };
    let mut bar = Progress::new(format!("importing {}", arguments.model.display()));
    let summary = import(&arguments.model, &arguments.out_dir, options, &mut |progress| {
        bar.update(progress.tensors_done as u64, progress.tensors as u64, progress.tensor);
    })?;
    drop(bar);
    println!(
        "{}: {:?}, {} tensors, {:.1} MB in {}, {:.1} s",
        arguments.out_dir.display(),
        summary.config.architecture,
        summary.tensors,
        summary.bytes as f64 / 1e6,
        summary.config.float_type,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
