//! Where lines and cells of the report's charts lie; the template draws them as SVG.
//!
//! Errors span orders of magnitude, so that both charts have logarithmic scales.

use serde::Serialize;

use super::table::percent;
use super::{MatrixReport, Report};

const WIDTH: f64 = 960.0;
const LABEL_WIDTH: f64 = 84.0;
const RIGHT: f64 = 16.0;
const CHART_HEIGHT: f64 = 340.0;
const CHART_TOP: f64 = 12.0;
const CHART_BOTTOM: f64 = 36.0;
const CELL_HEIGHT: f64 = 26.0;
const WIDEST_CELL: f64 = 40.0;
/// Opacity of the cell of least error: seen as a cell still.
const LEAST_OPACITY: f64 = 0.06;
/// The least distance between two labels of layers.
const LABEL_DISTANCE: f64 = 32.0;

/// A label at a place of an axis.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Label {
    pub(super) at: f64,
    pub(super) text: String,
}

/// Error by depth: a line for each kind of matrix.
#[derive(Debug, Serialize)]
pub(super) struct ErrorChart {
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    bottom: f64,
    pub(super) errors: Vec<Label>,
    layers: Vec<Label>,
    pub(super) lines: Vec<Line>,
}

/// The line of one kind.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    pub(super) kind: String,
    pub(super) points: Vec<Point>,
}

/// A matrix on its line.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    title: String,
}

/// Layers by kinds, the larger the error the darker.
#[derive(Debug, Serialize)]
pub(super) struct HeatMap {
    width: f64,
    height: f64,
    left: f64,
    cell_width: f64,
    cell_height: f64,
    kinds: Vec<Label>,
    layers: Vec<Label>,
    pub(super) cells: Vec<Cell>,
    pub(super) scale: Vec<Shade>,
}

/// One matrix.
#[derive(Debug, Serialize)]
pub(super) struct Cell {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) opacity: f64,
    title: String,
}

/// A shade of the scale and the error it stands for.
#[derive(Debug, Serialize)]
pub(super) struct Shade {
    opacity: f64,
    text: String,
}

/// The decimal logarithms of the least and the largest error. `None` when no matrix of a layer has an error.
fn range(report: &Report) -> Option<(f64, f64)> {
    let logs = in_layers(report).map(|(_, matrix)| matrix.relative_error).filter(is_positive).map(f64::log10);
    let (least, largest) = logs
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, largest), log| (least.min(log), largest.max(log)));
    // One error alone still needs a scale of some length.
    let length = largest - least;
    if length.is_nan() || length < 0.0 {
        return None;
    }
    Some(if length < 0.1 { (least - 0.1, largest + 0.1) } else { (least, largest) })
}

fn is_positive(error: &f64) -> bool {
    *error > 0.0 && error.is_finite()
}

fn in_layers(report: &Report) -> impl Iterator<Item = (usize, &MatrixReport)> {
    report.layers.iter().filter_map(|matrix| Some((matrix.layer()?, matrix)))
}

/// The layer of the deepest matrix, plus one.
fn depth(report: &Report) -> usize {
    in_layers(report).map(|(layer, _)| layer + 1).max().unwrap_or(0)
}

fn title(layer: usize, matrix: &MatrixReport) -> String {
    format!(
        "layer {layer} {}: {} ({} bits, groups of {})",
        matrix.kind(),
        percent(matrix.relative_error),
        matrix.bits,
        matrix.group_size
    )
}

/// Labels of every so many layers, `step` apart each, the first at `first`.
fn layer_labels(depth: usize, first: f64, step: f64) -> Vec<Label> {
    let every = [1, 2, 5, 10, 20, 50, 100].into_iter().find(|&every| every as f64 * step >= LABEL_DISTANCE);
    (0..depth)
        .step_by(every.unwrap_or(200))
        .map(|layer| Label { at: first + layer as f64 * step, text: layer.to_string() })
        .collect()
}

/// The chart of error by depth; `None` when there is nothing to draw.
pub(super) fn error_chart(report: &Report) -> Option<ErrorChart> {
    let (least, largest) = range(report)?;
    let (right, bottom) = (WIDTH - RIGHT, CHART_HEIGHT - CHART_BOTTOM);
    let depth = depth(report);
    let step = (right - LABEL_WIDTH) / depth.saturating_sub(1).max(1) as f64;
    let y = |log: f64| bottom - (log - least) / (largest - least) * (bottom - CHART_TOP);
    let decades = least.floor() as i32..=largest.ceil() as i32;
    let errors = decades
        .flat_map(|decade| [1.0, 2.0, 5.0].map(|digit: f64| digit.log10() + f64::from(decade)))
        .filter(|log| (least..=largest).contains(log))
        .map(|log| Label { at: y(log), text: percent(10f64.powf(log)) });
    let lines = report.kinds().into_iter().map(|kind| {
        let of_kind = in_layers(report).filter(|(_, matrix)| matrix.kind() == kind);
        let drawn = of_kind.filter(|(_, matrix)| is_positive(&matrix.relative_error));
        let point = |(layer, matrix): (usize, &MatrixReport)| Point {
            x: LABEL_WIDTH + layer as f64 * step,
            y: y(matrix.relative_error.log10()),
            title: title(layer, matrix),
        };
        Line { kind: kind.to_owned(), points: drawn.map(point).collect() }
    });
    Some(ErrorChart {
        width: WIDTH,
        height: CHART_HEIGHT,
        left: LABEL_WIDTH,
        right,
        bottom,
        errors: errors.collect(),
        layers: layer_labels(depth, LABEL_WIDTH, step),
        lines: lines.filter(|line| !line.points.is_empty()).collect(),
    })
}

/// The heat map; `None` when there is nothing to draw.
pub(super) fn heat_map(report: &Report) -> Option<HeatMap> {
    let (least, largest) = range(report)?;
    let depth = depth(report);
    let cell_width = ((WIDTH - LABEL_WIDTH - RIGHT) / depth as f64).min(WIDEST_CELL);
    let kinds: Vec<&str> = report.kinds();
    let kinds: Vec<&str> = kinds
        .into_iter()
        .filter(|kind| in_layers(report).any(|(_, matrix)| matrix.kind() == *kind))
        .collect();
    let opacity = |error: f64| {
        let part = if is_positive(&error) { (error.log10() - least) / (largest - least) } else { 0.0 };
        LEAST_OPACITY + (1.0 - LEAST_OPACITY) * part
    };
    let cells = in_layers(report).filter_map(|(layer, matrix)| {
        let row = kinds.iter().position(|kind| *kind == matrix.kind())?;
        Some(Cell {
            x: LABEL_WIDTH + layer as f64 * cell_width,
            y: row as f64 * CELL_HEIGHT,
            opacity: opacity(matrix.relative_error),
            title: title(layer, matrix),
        })
    });
    let shades = [0.0, 0.25, 0.5, 0.75, 1.0].map(|part| {
        let error = 10f64.powf(least + part * (largest - least));
        Shade { opacity: opacity(error), text: percent(error) }
    });
    let label = |(row, kind): (usize, &&str)| Label {
        at: (row as f64 + 0.5) * CELL_HEIGHT,
        text: (*kind).to_owned(),
    };
    Some(HeatMap {
        width: WIDTH,
        height: kinds.len() as f64 * CELL_HEIGHT + 24.0,
        left: LABEL_WIDTH,
        cell_width,
        cell_height: CELL_HEIGHT,
        kinds: kinds.iter().enumerate().map(label).collect(),
        layers: layer_labels(depth, LABEL_WIDTH + 0.5 * cell_width, cell_width),
        cells: cells.collect(),
        scale: shades.into_iter().collect(),
    })
}
