//! The command line as it was typed. What it means is decided in `commands`.

use clap::Parser;

/// Quantize a large language model to INT4 and serve it, from one binary.
#[derive(Debug, Parser)]
#[command(name = "nibble", version, about)]
pub(crate) struct Arguments {}
