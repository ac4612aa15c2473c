//! RTN, AWQ and GPTQ quantization to INT4, one decoder layer at a time.
//!
//! [`quantize`] reads a checkpoint, quantizes the linear layers of its decoder layers and writes a checkpoint in one
//! of the formats of `nibble_model`. In memory are: one decoder layer, the Hessian of one input, and the calibration
//! sequences' hidden states; never the model.
#![forbid(unsafe_code)]

mod allocation;
pub mod calibration;
mod error;
mod grid;
mod hessian;
mod journal;
mod methods;
mod output;
mod pipeline;
mod plan;
pub mod quality_gate;
pub mod report;
mod settings;
mod threads;
mod verify;

pub use calibration::Calibration;
pub use error::QuantizeError;
pub use pipeline::{Progress, RunOptions, quantize};
pub use plan::{Change, Override};
pub use report::{MatrixReport, Report};
pub use settings::{GptqSettings, Method, RangeSearch, Settings};
pub use verify::{Verification, verify};
