//! File formats of quantized weights: readers and writers of `QuantizedMatrix`.

pub mod gptq;
mod quantization_config;

pub use quantization_config::{GptqVersion, GroupSize, QuantizationConfig};
