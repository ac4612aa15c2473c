//! One module per command: its arguments, and what it does.

pub(crate) mod bench;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod kernels;
pub(crate) mod quantize;
pub(crate) mod serve;
