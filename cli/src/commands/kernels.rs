//! `nibble kernels`: the kernels of cards, compiled ahead of time and checked.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use clap::{Args, Subcommand};
use nibble_kernels::Backend;
use nibble_kernels::backend::Activations;
use nibble_kernels::check::{Outcome, check};
use nibble_kernels::device::cuda::compiler::{Architecture, Compiler};
use nibble_kernels::ops::cuda_sources;
use nibble_kernels::tensor::FloatType;

use crate::device::{KernelCacheArguments, ModelArguments, Work};

/// What to do with them.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelsCommand {
    /// Compile every kernel; needs NVRTC, and no card.
    #[command(after_help = "Example: nibble kernels compile --arch sm_80,sm_90 --output kernels; \
                            then: nibble serve MODEL --kernel-cache kernels")]
    Compile(CompileArguments),
    /// Compare every operation with its reference on this machine's device.
    Check(CheckArguments),
}

/// Arguments of `nibble kernels compile`.
#[derive(Debug, Args)]
pub(crate) struct CompileArguments {
    /// Architectures to compile for.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "sm_80,sm_86,sm_89,sm_90")]
    arch: Vec<Architecture>,
    /// Only the sources of this operation.
    #[arg(long, value_name = "NAME")]
    operation: Option<String>,
    /// Where the kernels go; where `--kernel-cache` would look for them when not given.
    #[arg(long, value_name = "DIR", conflicts_with = "kernel_cache")]
    output: Option<PathBuf>,
    #[command(flatten)]
    cache: KernelCacheArguments,
}

/// Arguments of `nibble kernels check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// Show the cases that fail only.
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    run: ModelArguments,
}

/// Runs the command.
pub(crate) fn run(command: &KernelsCommand) -> anyhow::Result<()> {
    match command {
        KernelsCommand::Compile(arguments) => compile(arguments),
        KernelsCommand::Check(arguments) => run_check(arguments),
    }
}

fn compile(arguments: &CompileArguments) -> anyhow::Result<()> {
    let compiler = match &arguments.output {
        Some(directory) => Compiler::new(Some(directory.clone())),
        None => arguments.cache.compiler(),
    };
    let wanted = |name: &str| arguments.operation.as_deref().is_none_or(|operation| operation == name);
    let mut failed = 0;
    for source in cuda_sources().into_iter().filter(|source| wanted(source.name)) {
        for &architecture in &arguments.arch {
            let started = Instant::now();
            match compiler.cubin(source, architecture) {
                Ok(cubin) => println!(
                    "{} {architecture}: {} KiB, {:.1} s",
                    source.name,
                    cubin.len().div_ceil(1024),
                    started.elapsed().as_secs_f64()
                ),
                Err(error) => {
                    failed += 1;
                    eprintln!("{error}");
                }
            }
        }
    }
    if failed > 0 {
        bail!("{failed} kernels could not be compiled");
    }
    Ok(())
}

fn run_check(arguments: &CheckArguments) -> anyhow::Result<()> {
    let device = arguments.run.device_or(FloatType::F16, Activations::Float)?;
    println!("{}", device.description());
    device.run(Check { roundoff: device.roundoff(), quiet: arguments.quiet })
}

/// All cases of all operations.
struct Check {
    roundoff: f32,
    quiet: bool,
}

impl Work for Check {
    type Output = ();

    fn run<B: Backend + Send + 'static>(self, open: &dyn Fn() -> anyhow::Result<B>) -> anyhow::Result<()> {
        let (mut cases, mut failed) = (0, 0);
        println!("error, as a part of what is allowed");
        check(&open()?, self.roundoff, &mut |outcome: Outcome| {
            cases += 1;
            failed += usize::from(!outcome.passed());
            if !self.quiet || !outcome.passed() {
                let verdict = if outcome.passed() { "" } else { "  FAILED" };
                println!("{:7.3}  {:16}  {}{verdict}", outcome.error, outcome.operation, outcome.case);
            }
        })?;
        if failed > 0 {
            bail!("{failed} of {cases} cases failed");
        }
        println!("{cases} cases passed");
        Ok(())
    }
}
