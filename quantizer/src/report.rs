//! What quantization did, for people and for scripts.

use serde::{Deserialize, Serialize};

/// One quantized matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// The linear layer, such as `model.layers.0.mlp.up_proj`.
    pub name: String,
    /// Bits of a code.
    pub bits: u32,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// Weights of the matrix.
    pub weights: usize,
    /// Bits stored for each weight, scales and zero points included.
    pub bits_per_weight: f64,
    /// `|(W - Wq) X|^2 / |W X|^2` over the calibration data `X`; without calibration data `|W - Wq|^2 / |W|^2`.
    /// Where errors of earlier layers are corrected, `W` are the corrected weights.
    pub relative_error: f64,
}

/// The whole model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Bits stored for each weight of the quantized matrices, scales and zero points included.
    pub bits_per_weight: f64,
    /// Whether relative errors are of outputs over calibration data; else they are of the weights.
    pub errors_are_of_outputs: bool,
    /// Decoder layers that an earlier run had finished.
    pub resumed_layers: usize,
    /// Every quantized matrix, in the order of the model.
    pub layers: Vec<MatrixReport>,
}

impl Report {
    /// The mean relative error of the matrices.
    pub fn mean_relative_error(&self) -> f64 {
        let sum: f64 = self.layers.iter().map(|matrix| matrix.relative_error).sum();
        sum / self.layers.len().max(1) as f64
    }
}
