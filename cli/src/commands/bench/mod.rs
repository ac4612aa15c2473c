//! `nibble bench`: speed, measured on this machine, of a model or of a server.

mod latency;
mod serve;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One sequence: tokens a second of a prompt and of decoding after it.
    #[command(after_help = "Example: nibble bench latency ./SmolLM2-135M-int4 --threads 2 --json")]
    Latency(latency::LatencyArguments),
    /// A running server under load: throughput, and latencies as its clients see them.
    Serve(serve::ServeArguments),
}

/// Runs the command.
pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Latency(arguments) => latency::run(arguments),
        BenchCommand::Serve(arguments) => serve::run(arguments),
    }
}
