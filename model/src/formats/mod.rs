//! File formats of quantized weights: GPTQ, AWQ and compressed-tensors, each a reader and a writer of
//! `QuantizedMatrix`.
//!
//! [`QuantizationConfig`] is the way in: it is read from config.json or made from a [`QuantizationPlan`], knows
//! the settings of every linear layer, and reads and writes them. docs/formats.md has the formats in one table.

mod awq;
mod bit_stream;
mod compressed_tensors;
mod gptq;
mod layer;
mod module_pattern;
mod quantization_config;
mod settings;

pub use awq::AwqConfig;
pub use compressed_tensors::CompressedTensorsConfig;
pub use gptq::{GptqConfig, GptqVersion};
pub use module_pattern::Expression as ModuleExpression;
pub use quantization_config::{Format, Misfit, QuantizationConfig, QuantizationPlan};
pub use settings::{ActivationOrder, GroupSize, ModuleSettings};
