//! Every CUDA kernel on the emulator: against its reference over ragged shapes, with poisoned outputs, in several orders
//! of blocks, warps and lanes; and whether faults in the kernels would be found.
//!
//! To add a kernel: a file with a `SUITE`, as `rms_norm.rs`, and a line in [`SUITES`].

mod dense_matmul;
mod embedding;
mod gather_rows;
mod lab;
mod machine;
mod mutations;
mod paged_attention;
mod refusals;
mod rms_norm;
mod rotary_embedding;
mod sample;
mod silu_mul;
mod w4a16_matmul;

/// All suites.
const SUITES: [lab::Suite; 10] = [
    dense_matmul::SUITE,
    embedding::SUITE,
    gather_rows::SUITE,
    paged_attention::SUITE,
    rms_norm::SUITE,
    rotary_embedding::SUITE,
    sample::SUITE,
    silu_mul::SUITE,
    w4a16_matmul::SUITE,
    w4a16_matmul::HOPPER_SUITE,
];
