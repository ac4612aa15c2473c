//! One run of `nibble quantize`: what was asked for, what came out, and its files.

use std::path::Path;

use nibble_model::checkpoint::replace_file;
use nibble_model::evaluation::Evaluation;
use serde::Serialize;

use super::{Report, html, model_card};
use crate::error::QuantizeError;
use crate::quality_gate::GateOutcome;
use crate::settings::Settings;

/// The report for scripts, in the checkpoint directory.
pub const REPORT_FILE: &str = "nibble_report.json";
/// The report for people, beside it.
const HTML_FILE: &str = "nibble_report.html";

/// Everything worth knowing of one run; as JSON it is what `nibble quantize --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// The version of Nibble.
    pub nibble_version: &'static str,
    /// The model that was quantized, as it was named.
    pub model: String,
    /// Its Hugging Face id, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// The command line.
    pub command: String,
    /// How it was quantized.
    pub settings: Settings,
    /// What it was calibrated on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationDescription>,
    /// How long quantization took, evaluation not counted.
    pub seconds: f64,
    /// The largest resident set of the process until then, where the system tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// How well the result does.
    #[serde(flatten)]
    pub quality: Option<Quality>,
    /// Whether that was good enough, where a limit was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality_gate: Option<GateOutcome>,
    /// What the pipeline measured.
    #[serde(flatten)]
    pub report: Report,
}

/// What a model was calibrated on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationDescription {
    /// The files, or `self`.
    pub sources: Vec<String>,
    /// Sequences used.
    pub samples: usize,
    /// Tokens of each.
    pub sequence_length: usize,
    /// Tokens in all.
    pub tokens: usize,
    /// Which sequences were drawn.
    pub seed: u64,
}

/// How well a quantized model does, beside its original.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// The original's perplexity.
    pub perplexity_before: f64,
    /// The quantized model's.
    pub perplexity_after: f64,
    /// Mean over predictions of KL(original || quantized), in nats.
    pub mean_kl_divergence: f64,
    /// Fraction of predictions where both put the same token first.
    pub top1_agreement: f64,
    /// Root mean square of the difference in the probability of the token that came.
    pub rms_probability_difference: f64,
    /// The text.
    pub eval_text: String,
    /// Tokens of a window.
    pub eval_window: usize,
    /// Predictions scored.
    pub predicted_tokens: usize,
}

impl Quality {
    /// The part of `evaluation` that is reported; `None` when it has no reference.
    pub fn new(evaluation: &Evaluation, eval_text: &Path, eval_window: usize) -> Option<Self> {
        let reference = evaluation.reference?;
        Some(Self {
            perplexity_before: reference.reference_perplexity,
            perplexity_after: evaluation.perplexity,
            mean_kl_divergence: reference.mean_kl_divergence,
            top1_agreement: reference.top1_agreement,
            rms_probability_difference: reference.rms_probability_difference,
            eval_text: eval_text.display().to_string(),
            eval_window,
            predicted_tokens: evaluation.predicted_tokens,
        })
    }

    /// How much perplexity rose, as a fraction.
    pub fn perplexity_increase(&self) -> f64 {
        self.perplexity_after / self.perplexity_before - 1.0
    }
}

impl RunReport {
    /// Writes nibble_report.json, nibble_report.html and the model card into the checkpoint directory `out`, each
    /// completely or not at all. `source` is the directory of the original, whose own model card may name a license.
    /// A README.md that Nibble did not write is left as it is.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, source: &Path, out: &Path) -> Result<(), QuantizeError> {
        let json = serde_json::to_string_pretty(self).map_err(report_error)?;
        replace_file(out, REPORT_FILE, (json + "\n").as_bytes())?;
        replace_file(out, HTML_FILE, html::render(self)?.as_bytes())?;
        model_card::write(self, source, out)
    }

    /// What the model is called: its id, or the last part of its directory.
    pub(super) fn title(&self) -> String {
        let directory = Path::new(&self.model).file_name().map(|name| name.to_string_lossy().into_owned());
        self.base_model.clone().or(directory).unwrap_or_else(|| self.model.clone())
    }
}

pub(super) fn report_error(error: impl ToString) -> QuantizeError {
    QuantizeError::Report(error.to_string())
}
