//! Every CUDA kernel on the emulator: against its reference over ragged shapes, with poisoned outputs, in several orders
//! of blocks, warps and lanes; and whether faults in the kernels would be found.
//!
//! To add a kernel: a file with a `SUITE`, as `rms_norm.rs`, and a line in [`SUITES`].

mod embedding;
mod gather_rows;
mod lab;
mod machine;
mod mutations;
mod refusals;
mod rms_norm;
mod rotary_embedding;
mod silu_mul;

/// All suites.
const SUITES: [lab::Suite; 5] =
    [embedding::SUITE, gather_rows::SUITE, rms_norm::SUITE, rotary_embedding::SUITE, silu_mul::SUITE];
