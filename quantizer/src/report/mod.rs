//! What quantization did, for people and for scripts.
//!
//! [`Report`] is what the pipeline measured; [`RunReport`] puts it together with how it was asked for and how well
//! the result does, and writes nibble_report.json, nibble_report.html and the model card.

mod chart;
mod html;
mod measure;
mod model_card;
mod run;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use nibble_model::self_test::Checksum;
use serde::{Deserialize, Serialize};

pub(crate) use self::measure::measure;
pub use self::run::{CalibrationDescription, Quality, REPORT_FILE, RunReport};

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
    /// Of up to 1024 outputs, evenly spaced.
    pub relative_error: f64,
    /// The inputs that carry most of that error, as parts of it, largest first.
    pub largest_error_inputs: Vec<InputShare>,
    /// The inputs that carry most of the activations' energy `sum of x^2`, as parts of it, largest first; none
    /// without calibration data.
    pub largest_activation_inputs: Vec<InputShare>,
    /// Of the dequantized weights: what is written must read back as these.
    pub checksum: Checksum,
}

/// An input channel of a linear layer and its part of a whole.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputShare {
    /// The input.
    pub input: usize,
    /// Its part; 1 is the whole.
    pub share: f64,
}

/// Linear layers that multiply the same input, and what more bits for them are worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitSensitivity {
    /// Their names.
    pub linear_layers: Vec<String>,
    /// Mean KL divergence of the model's predictions when they alone are rounded to nearest, in nats.
    pub kl_divergence: f64,
    /// Bits they were given.
    pub bits: u32,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// Whether that is more than what all others have.
    pub raised: bool,
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
    /// How much each unit of linear layers matters, where that was measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sensitivities: Vec<UnitSensitivity>,
    /// Every quantized matrix, in the order of the model.
    pub layers: Vec<MatrixReport>,
    /// What the quantized model computed before it was written; none without calibration data.
    #[serde(skip)]
    pub logits: Option<RunLogits>,
}

/// Logits that a run computed with the quantized weights in memory: what is written must give them again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunLogits {
    /// A prompt: the first calibration tokens.
    pub tokens: Vec<u32>,
    /// The logits of its last token, one for each token of the vocabulary.
    pub logits: Vec<f32>,
}

impl MatrixReport {
    /// The last part of the name, such as `up_proj`.
    pub fn kind(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// The decoder layer it belongs to, if it belongs to one.
    pub fn layer(&self) -> Option<usize> {
        self.name.split('.').find_map(|part| part.parse().ok())
    }
}

impl Report {
    /// The mean relative error of the matrices.
    pub fn mean_relative_error(&self) -> f64 {
        mean(self.layers.iter())
    }

    /// The kinds of matrices, in the order of the model.
    pub fn kinds(&self) -> Vec<&str> {
        let mut kinds: Vec<&str> = Vec::new();
        for matrix in &self.layers {
            if !kinds.contains(&matrix.kind()) {
                kinds.push(matrix.kind());
            }
        }
        kinds
    }

    /// The matrices of largest relative error, largest first.
    pub fn costliest_matrices(&self, count: usize) -> Vec<&MatrixReport> {
        let mut matrices: Vec<&MatrixReport> = self.layers.iter().collect();
        matrices.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
        matrices.truncate(count);
        matrices
    }

    /// The decoder layers of largest mean relative error and that mean, largest first.
    pub fn costliest_layers(&self, count: usize) -> Vec<(usize, f64)> {
        let mut layers: Vec<usize> = self.layers.iter().filter_map(MatrixReport::layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let of_layer = |layer| self.layers.iter().filter(move |matrix| matrix.layer() == Some(layer));
        let mut means: Vec<_> = layers.into_iter().map(|layer| (layer, mean(of_layer(layer)))).collect();
        means.sort_by(|a, b| b.1.total_cmp(&a.1));
        means.truncate(count);
        means
    }
}

fn mean<'a>(matrices: impl Iterator<Item = &'a MatrixReport> + Clone) -> f64 {
    let count = matrices.clone().count().max(1) as f64;
    matrices.map(|matrix| matrix.relative_error).sum::<f64>() / count
}
