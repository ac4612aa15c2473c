//! The command line as it was typed. What it means is decided in `commands`.

use clap::{Parser, Subcommand};

use crate::commands;

/// Quantize a large language model to INT4 and serve it, from one binary.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, about, propagate_version = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// One command each; every command's own arguments lie beside its code.
#[derive(Debug, Subcommand)]
enum Command {
    /// Turn a GGUF file into a Hugging Face directory.
    Import(commands::import::ImportArguments),
    /// Show what a model holds, layer by layer.
    Inspect(commands::inspect::InspectArguments),
    /// Quantize a model to INT4.
    Quantize(commands::quantize::QuantizeArguments),
    /// Measure the perplexity of a model on a text.
    Eval(commands::eval::EvalArguments),
    /// Serve a model over the OpenAI API.
    Serve(commands::serve::ServeArguments),
    /// Generate text from one prompt.
    Generate(commands::generate::GenerateArguments),
    /// Measure speed.
    #[command(subcommand)]
    Bench(commands::bench::BenchCommand),
    /// Compile the kernels of cards, and check them.
    #[command(subcommand)]
    Kernels(commands::kernels::KernelsCommand),
}

impl Arguments {
    /// Runs the command.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        match &self.command {
            Command::Import(arguments) => commands::import::run(arguments),
            Command::Inspect(arguments) => commands::inspect::run(arguments),
            Command::Quantize(arguments) => commands::quantize::run(arguments),
            Command::Eval(arguments) => commands::eval::run(arguments),
            Command::Serve(arguments) => commands::serve::run(arguments),
            Command::Generate(arguments) => commands::generate::run(arguments),
            Command::Bench(command) => commands::bench::run(command),
            Command::Kernels(command) => commands::kernels::run(command),
        }
    }
}
