//! nibble_report.html: one file, its charts inline SVG, nothing fetched from anywhere.

use minijinja::{Environment, context};
use serde::Serialize;

use super::chart::{error_chart, heat_map};
use super::run::{RunReport, report_error};
use super::table::{fields, percent, quality};
use super::{InputShare, MatrixReport, Report, UnitSensitivity};
use crate::error::QuantizeError;
use crate::quality_gate::GateStatus;

const TEMPLATE: &str = include_str!("report.html.jinja");
/// Matrices in the list of the most sensitive ones.
const SENSITIVE: usize = 10;

/// A matrix as a line of a table.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    bits: u32,
    group_size: usize,
    error: String,
    error_inputs: String,
    activation_inputs: String,
}

impl<'a> Row<'a> {
    fn new(matrix: &'a MatrixReport) -> Self {
        Self {
            name: &matrix.name,
            bits: matrix.bits,
            group_size: matrix.group_size,
            error: percent(matrix.relative_error),
            error_inputs: shares(&matrix.largest_error_inputs),
            activation_inputs: shares(&matrix.largest_activation_inputs),
        }
    }
}

fn shares(inputs: &[InputShare]) -> String {
    let texts: Vec<_> =
        inputs.iter().map(|InputShare { input, share }| format!("{input}: {}", percent(*share))).collect();
    texts.join(", ")
}

/// Linear layers that bits were spent on or not, as a line of a table.
#[derive(Serialize)]
struct UnitRow {
    names: String,
    kl: String,
    /// Of the largest.
    part: f64,
    bits: u32,
    group_size: usize,
}

/// Every unit, the most sensitive first.
fn unit_rows(report: &Report) -> Vec<UnitRow> {
    let mut units: Vec<_> = report.sensitivities.iter().collect();
    units.sort_by(|a, b| b.kl_divergence.total_cmp(&a.kl_divergence));
    let largest = units.first().map_or(0.0, |unit| unit.kl_divergence);
    let row = |unit: &UnitSensitivity| UnitRow {
        names: unit.linear_layers.join(", "),
        kl: format!("{:.2e}", unit.kl_divergence),
        part: if largest > 0.0 { unit.kl_divergence / largest } else { 0.0 },
        bits: unit.bits,
        group_size: unit.group_size,
    };
    units.into_iter().map(row).collect()
}

/// The page.
pub(super) fn render(run: &RunReport) -> Result<String, QuantizeError> {
    let report = &run.report;
    let mut settings = fields(&run.settings).map_err(report_error)?;
    settings.push(("nibble version".to_owned(), run.nibble_version.to_owned()));
    let calibration = fields(&run.calibration).map_err(report_error)?;
    let layers: Vec<_> = report
        .costliest_layers(5)
        .into_iter()
        .map(|(layer, error)| format!("{layer} ({})", percent(error)))
        .collect();
    let gate = run.quality_gate.map(|outcome| match outcome.status {
        GateStatus::Passed => {
            ("passed", format!("at most {} more perplexity", percent(outcome.max_perplexity_increase)))
        }
        _ => ("failed", outcome.warning().unwrap_or_default()),
    });
    let quality = run.quality.as_ref().map(quality);
    let page = context! {
        title => run.title(),
        model => run.model,
        command => run.command,
        settings => settings,
        calibration => calibration,
        bits_per_weight => format!("{:.3}", report.bits_per_weight),
        seconds => format!("{:.1}", run.seconds),
        peak_memory => run.peak_memory_bytes.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9)),
        mean_error => percent(report.mean_relative_error()),
        measure => if report.errors_are_of_outputs { "output error" } else { "weight error" },
        quality => quality,
        gate => gate,
        units => unit_rows(report),
        chart => error_chart(report),
        heat => heat_map(report),
        sensitive_layers => layers.join(", "),
        sensitive => report.costliest_matrices(SENSITIVE).into_iter().map(Row::new).collect::<Vec<_>>(),
        matrices => report.layers.iter().map(Row::new).collect::<Vec<_>>(),
    };
    // The name ends in .html: every value is escaped.
    let mut environment = Environment::new();
    environment.set_keep_trailing_newline(true);
    environment.render_named_str("report.html", TEMPLATE, page).map_err(report_error)
}
