//! The CUDA device: 16-bit activations, kernels in `ops/*/kernel.cu`, submitted through a [`driver::Driver`].

pub mod driver;
