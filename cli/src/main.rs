//! The one binary, `nibble`: reads arguments, calls the crates, prints.
#![forbid(unsafe_code)]

mod arguments;
mod commands;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    arguments::Arguments::parse().command.run()
}
