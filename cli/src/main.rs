//! The one binary, `nibble`: reads arguments, calls the crates, prints.
#![forbid(unsafe_code)]

mod arguments;

use clap::Parser;

fn main() {
    arguments::Arguments::parse();
}
