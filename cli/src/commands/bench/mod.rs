//! `nibble bench`: speed, measured on this machine, of a model or of a server.

mod kernels;
mod latency;
mod model;
mod serve;
mod throughput;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One sequence: tokens a second of a prompt and of decoding after it.
    #[command(after_help = "Example: nibble bench latency ./SmolLM2-135M-int4 --threads 2 --json")]
    Latency(latency::LatencyArguments),
    /// Many sequences: tokens a second of all of them together.
    #[command(after_help = "Example: nibble bench throughput ./llama-3-70b --load-format dummy --streams 64")]
    Throughput(throughput::ThroughputArguments),
    /// Single operations in the shapes of large models, beside what the device's memory can do.
    Kernels(kernels::KernelsArguments),
    /// A running server under load: throughput, and latencies as its clients see them.
    Serve(serve::ServeArguments),
}

/// Runs the command.
pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Latency(arguments) => latency::run(arguments),
        BenchCommand::Throughput(arguments) => throughput::run(arguments),
        BenchCommand::Kernels(arguments) => kernels::run(arguments),
        BenchCommand::Serve(arguments) => serve::run(arguments),
    }
}
