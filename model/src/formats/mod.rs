//! File formats of quantized weights: readers and writers of `QuantizedMatrix`.

mod quantization_config;

pub use quantization_config::{GptqVersion, GroupSize, QuantizationConfig};
