//! The quality gate: how much perplexity may rise, and what to say when it rose more.
//!
//! ```text
//! increase = perplexity after / perplexity before - 1
//! ```

use std::fmt::Write;
use std::path::Path;
use std::str::FromStr;

use nibble_model::error::CheckpointError;
use nibble_model::formats::{Format, GroupSize};
use serde::{Deserialize, Serialize};

use crate::report::{REPORT_FILE, Report};
use crate::settings::Settings;

/// Matrices and layers that are named.
const NAMED: usize = 5;
/// Groups of this many inputs or fewer are not worth making smaller: their scales take a bit per weight and more.
const SMALLEST_GROUP: usize = 32;
/// Calibration tokens below which more of them usually help.
const ENOUGH_CALIBRATION_TOKENS: usize = 128 * 2048;

/// The largest increase of perplexity that is accepted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QualityGate {
    /// As a fraction: 0.05 for `5%`.
    pub max_perplexity_increase: f64,
}

/// Whether a checkpoint passed its gate. In nibble_report.json under `quality_gate`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateOutcome {
    /// Where it stands.
    pub status: GateStatus,
    /// The largest increase accepted, as a fraction.
    pub max_perplexity_increase: f64,
    /// The increase measured, as a fraction; none before it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_increase: Option<f64>,
}

/// Where a checkpoint stands with its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateStatus {
    /// Not measured yet, or the measurement was cut off.
    Pending,
    /// Perplexity rose by no more than was accepted.
    Passed,
    /// Perplexity rose by more.
    Failed,
}

impl FromStr for QualityGate {
    type Err = String;

    /// A percentage with its sign, such as `5%` or `2.5%`. A bare `5` or `0.05` is refused: it could be either.
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected a percentage with its sign, such as 5%";
        let Some(number) = text.strip_suffix('%') else {
            return Err(format!("\"{text}\" could be a percentage or a fraction; {expected}"));
        };
        match number.trim_end().parse::<f64>() {
            Ok(percent) if percent >= 0.0 && percent.is_finite() => {
                Ok(Self { max_perplexity_increase: percent / 100.0 })
            }
            _ => Err(format!("\"{text}\" is not a percentage of 0 or more; {expected}")),
        }
    }
}

impl QualityGate {
    /// Before the measurement.
    pub fn pending(self) -> GateOutcome {
        let Self { max_perplexity_increase } = self;
        GateOutcome { status: GateStatus::Pending, max_perplexity_increase, perplexity_increase: None }
    }

    /// The outcome for the perplexities `before` and `after`. What is not a number has failed.
    pub fn judge(self, before: f64, after: f64) -> GateOutcome {
        let increase = after / before - 1.0;
        let status =
            if increase <= self.max_perplexity_increase { GateStatus::Passed } else { GateStatus::Failed };
        // JSON has no infinity; what overflows has risen by more than any number.
        let perplexity_increase = Some(if increase.is_finite() { increase } else { f64::MAX });
        GateOutcome { status, perplexity_increase, ..self.pending() }
    }
}

impl GateOutcome {
    /// What to warn of, unless the checkpoint passed.
    pub fn warning(&self) -> Option<String> {
        let limit = 100.0 * self.max_perplexity_increase;
        match (self.status, self.perplexity_increase) {
            (GateStatus::Passed, _) => None,
            (GateStatus::Failed, Some(increase)) => Some(format!(
                "this checkpoint failed its quality gate: perplexity rose by {}, more than {limit}%",
                percent(increase)
            )),
            (GateStatus::Failed, None) => {
                Some(format!("this checkpoint failed its quality gate of {limit}% more perplexity"))
            }
            (GateStatus::Pending, _) => Some(format!(
                "the quality gate of this checkpoint ({limit}% more perplexity) was never measured to the end"
            )),
        }
    }
}

/// The outcome that the nibble_report.json of a checkpoint directory records; none without a report or a gate.
///
/// # Errors
/// When the report cannot be read or its `quality_gate` is malformed.
pub fn recorded_outcome(directory: &Path) -> Result<Option<GateOutcome>, CheckpointError> {
    #[derive(Deserialize)]
    struct Recorded {
        quality_gate: Option<GateOutcome>,
    }
    let path = directory.join(REPORT_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
    let help = "quantize the model again, or remove the file";
    let recorded: Recorded =
        serde_json::from_slice(&text).map_err(|error| CheckpointError::malformed(&path, error, help))?;
    Ok(recorded.quality_gate)
}

/// What to tell the user of a failed gate: by how much, which layers cost most, what to try.
pub fn explain_failure(
    outcome: GateOutcome,
    report: &Report,
    settings: &Settings,
    calibration_tokens: Option<usize>,
) -> String {
    let mut text = outcome.warning().unwrap_or_default();
    let measure = if report.errors_are_of_outputs { "output error" } else { "weight error" };
    let layers = report.costliest_layers(NAMED);
    let layers = layers.iter().map(|(layer, error)| format!("layer {layer} ({})", percent(*error)));
    let matrices = report.costliest_matrices(NAMED);
    let matrices =
        matrices.iter().map(|matrix| format!("{} ({})", matrix.name, percent(matrix.relative_error)));
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    // Writing to a String cannot fail.
    let _ = write!(text, "\n  costliest layers by mean {measure}: {}", list(&mut layers.into_iter()));
    let _ = write!(text, "\n  costliest matrices by {measure}: {}", list(&mut matrices.into_iter()));
    for advice in advice(settings, calibration_tokens) {
        let _ = write!(text, "\n  try {advice}");
    }
    text
}

/// What is likely to bring perplexity down, the strongest first.
fn advice(settings: &Settings, calibration_tokens: Option<usize>) -> Vec<String> {
    let mut advice = Vec::new();
    if settings.method.gptq().is_none() {
        advice.push("--method gptq, which makes up for rounding errors".to_owned());
    } else if !settings.correction {
        advice.push("without --correct false: layers that make up for the errors of those before".to_owned());
    }
    if settings.symmetric {
        advice.push("without --sym: a zero point for each group".to_owned());
    }
    let finer = match settings.group_size {
        GroupSize::PerChannel => Some(128),
        GroupSize::Inputs(size) if size > SMALLEST_GROUP => Some((size / 2).max(SMALLEST_GROUP)),
        GroupSize::Inputs(_) => None,
    };
    if let Some(size) = finer {
        advice.push(format!("a smaller --group-size, such as {size}"));
    }
    if settings.target_bits.is_none() && settings.format != Format::Awq {
        advice.push("--target-bits 4.5, which spends bits where they matter most".to_owned());
    }
    if settings.needs_calibration()
        && let Some(tokens) = calibration_tokens.filter(|&tokens| tokens < ENOUGH_CALIBRATION_TOKENS)
    {
        advice.push(format!(
            "more calibration data (--samples, --sequence-length; now {tokens} tokens), or data closer to the use"
        ));
    }
    if settings.bits < 8 {
        advice.push(format!("more than {} --bits", settings.bits));
    }
    advice
}

fn percent(fraction: f64) -> String {
    if fraction >= 10.0 {
        return "more than 1000 %".to_owned();
    }
    format!("{:.2} %", 100.0 * fraction)
}

#[cfg(test)]
mod tests {
    use nibble_model::formats::GptqVersion;

    use super::*;
    use crate::report::tests::report;
    use crate::settings::{GptqSettings, Method, RangeSearch};

    #[test]
    fn only_a_percentage_with_its_sign_is_a_limit() {
        let limit = |text: &str| text.parse::<QualityGate>().map(|gate| gate.max_perplexity_increase);
        assert_eq!(limit("5%"), Ok(0.05));
        assert_eq!(limit("2.5 %"), Ok(0.025));
        assert_eq!(limit("0%"), Ok(0.0));
        for refused in ["5", "0.05", "", "%", "-1%", "nan%", "inf%", "5%%", "five%"] {
            let error = limit(refused).unwrap_err();
            assert!(error.contains(refused) && error.contains("such as 5%"), "{error}");
        }
    }

    #[test]
    fn perplexity_may_rise_to_the_limit_and_no_further() {
        let gate = QualityGate { max_perplexity_increase: 0.25 };
        assert_eq!(gate.pending().status, GateStatus::Pending);
        assert_eq!(gate.judge(4.0, 5.0).status, GateStatus::Passed);
        assert_eq!(gate.judge(4.0, 3.0).perplexity_increase, Some(-0.25));
        let failed = gate.judge(4.0, 6.0);
        assert_eq!((failed.status, failed.perplexity_increase), (GateStatus::Failed, Some(0.5)));
        for overflow in [f64::NAN, f64::INFINITY] {
            let outcome = gate.judge(4.0, overflow);
            assert_eq!(outcome.status, GateStatus::Failed);
            let text = serde_json::to_string(&outcome).unwrap();
            assert_eq!(serde_json::from_str::<GateOutcome>(&text).unwrap(), outcome);
        }
        assert!(gate.judge(4.0, 5.0).warning().is_none());
        assert!(failed.warning().unwrap().contains("rose by 50.00 %, more than 25%"));
    }

    #[test]
    fn a_failure_names_the_costliest_layers_and_what_would_help() {
        let gate = QualityGate { max_perplexity_increase: 0.05 };
        let mut settings = Settings {
            method: Method::RoundToNearest,
            correction: true,
            damping: 0.01,
            overrides: Vec::new(),
            target_bits: None,
            quantize_lm_head: false,
            pad_for_tensor_parallel: None,
            bits: 4,
            group_size: GroupSize::Inputs(128),
            symmetric: true,
            range: RangeSearch::MinMax,
            format: Format::Gptq(GptqVersion::V1),
            threads: 1,
        };
        let failed = gate.judge(20.0, 22.0);
        let text = explain_failure(failed, &report(3), &settings, None);
        for part in
            ["10.00 %", "more than 5%", "layer 2 (", "model.layers.2.mlp.down_proj (", "--method gptq"]
        {
            assert!(text.contains(part), "no {part} in {text}");
        }
        for part in ["without --sym", "--group-size, such as 64", "4 --bits"] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(!text.contains("calibration"), "rtn has none: {text}");
        settings.method = Method::Gptq(GptqSettings { activation_order: true });
        settings.group_size = GroupSize::Inputs(32);
        settings.symmetric = false;
        let advice = advice(&settings, Some(4096));
        assert_eq!(advice.len(), 3, "{advice:?}");
        assert!(advice[0].contains("--target-bits") && advice[1].contains("now 4096 tokens"), "{advice:?}");
    }

    #[test]
    fn the_recorded_outcome_is_read_from_the_report() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(recorded_outcome(directory.path()).unwrap(), None);
        let path = directory.path().join(REPORT_FILE);
        std::fs::write(&path, r#"{"bits_per_weight": 4.5}"#).unwrap();
        assert_eq!(recorded_outcome(directory.path()).unwrap(), None);
        let outcome = QualityGate { max_perplexity_increase: 0.05 }.judge(20.0, 22.0);
        std::fs::write(&path, serde_json::json!({ "quality_gate": outcome }).to_string()).unwrap();
        assert_eq!(recorded_outcome(directory.path()).unwrap(), Some(outcome));
        std::fs::write(&path, r#"{"quality_gate": {"status": "splendid"}}"#).unwrap();
        let error = recorded_outcome(directory.path()).unwrap_err().to_string();
        assert!(error.contains(REPORT_FILE) && error.contains("splendid"), "{error}");
    }
}
