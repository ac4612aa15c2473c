//! The command line as it was typed. What it means is decided in `commands`.

use clap::{Parser, Subcommand};

/// Quantize a large language model to INT4 and serve it, from one binary.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, about)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// One command each; every command's own arguments lie beside its code.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {}

impl Command {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {}
    }
}
