//! Reports of made-up runs.

use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};
use nibble_model::formats::{Format, GptqVersion, GroupSize};

use super::chart::{error_chart, heat_map};
use super::table::{fields, percent};
use super::*;
use crate::hessian::HessianSum;
use crate::quality_gate::QualityGate;
use crate::settings::{GptqSettings, Method, RangeSearch, Settings};
use crate::threads::Threads;

/// A report of `layers` layers; errors grow with depth, those of down_proj are largest.
pub(crate) fn report(layers: usize) -> Report {
    let kinds = ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"];
    let matrix = |layer: usize, kind: usize| MatrixReport {
        name: format!("model.layers.{layer}.{}", kinds[kind]),
        bits: 4,
        group_size: 128,
        weights: 4096,
        bits_per_weight: 4.156,
        relative_error: 0.001 * (layer + 1) as f64 * 10f64.powi(kind as i32),
        largest_error_inputs: vec![InputShare { input: 7 + layer, share: 0.25 }],
        largest_activation_inputs: vec![InputShare { input: 9, share: 0.5 }],
        checksum: Checksum::of_bytes(&[layer as u8, kind as u8]),
    };
    let matrices = (0..layers).flat_map(|layer| (0..kinds.len()).map(move |kind| matrix(layer, kind)));
    Report {
        bits_per_weight: 4.156,
        errors_are_of_outputs: true,
        resumed_layers: 0,
        sensitivities: Vec::new(),
        layers: matrices.collect(),
        logits: None,
    }
}

/// A run that failed its gate.
pub(crate) fn run_report() -> RunReport {
    let gptq = GptqSettings { activation_order: true };
    RunReport {
        nibble_version: "1.2.3",
        model: "models/<b>x".to_owned(),
        base_model: Some("org/model".to_owned()),
        command: "nibble quantize 'a model' out".to_owned(),
        settings: Settings {
            method: Method::Gptq(gptq),
            correction: true,
            damping: 0.01,
            overrides: Vec::new(),
            target_bits: None,
            quantize_lm_head: false,
            pad_for_tensor_parallel: None,
            bits: 4,
            group_size: GroupSize::Inputs(128),
            symmetric: false,
            range: RangeSearch::MeanSquare,
            format: Format::Gptq(GptqVersion::V1),
            threads: 2,
        },
        calibration: Some(CalibrationDescription {
            sources: vec!["valid.txt".to_owned(), "more.txt".to_owned()],
            samples: 64,
            sequence_length: 512,
            tokens: 64 * 512,
            seed: 0,
        }),
        seconds: 12.5,
        peak_memory_bytes: Some(1_500_000_000),
        quality: Some(Quality {
            perplexity_before: 20.0,
            perplexity_after: 22.0,
            mean_kl_divergence: 0.05,
            top1_agreement: 0.9,
            rms_probability_difference: 0.06,
            eval_text: "test.txt".to_owned(),
            eval_window: 512,
            predicted_tokens: 511,
        }),
        quality_gate: Some(QualityGate { max_perplexity_increase: 0.05 }.judge(20.0, 22.0)),
        report: report(30),
    }
}

#[test]
fn error_and_its_inputs_are_those_of_the_definition() {
    // W = [[1, 2], [3, -1]], Wq is off by [[0.5, 0], [0, -0.25]].
    let matrix = QuantizedMatrix::new(QuantizedParts {
        out_features: 2,
        in_features: 2,
        bits: 4,
        group_size: 2,
        codes: vec![14, 16 - 1, 14, 3],
        scales: vec![0.25, 0.25],
        offsets: GroupOffsets::ZeroPoints(vec![8, 8]),
        input_permutation: None,
    })
    .unwrap();
    let weights: Vec<f32> =
        matrix.dequantize().iter().zip([0.5, 0.0, 0.0, -0.25]).map(|(value, off)| value - off).collect();
    let threads = Threads::new(1).unwrap();
    let activations = [2.0, 1.0, 0.0, 3.0];
    let mut sum = HessianSum::new(2);
    threads.run(|par| sum.add(&activations, par));
    let measured = measure("layer", &matrix, &weights, Some(&sum.finish()), &threads);
    // Outputs of D over the two tokens [2, 1] and [0, 3]: [1, 0] and [-0.25, -0.75].
    let outputs = |row: &[f32]| -> f64 {
        let output = |x: &[f32]| f64::from(row[0] * x[0] + row[1] * x[1]);
        activations.chunks(2).map(|x| output(x).powi(2)).sum()
    };
    let (error, whole) = (1.0 + 0.0625 + 0.5625, weights.chunks(2).map(outputs).sum::<f64>());
    assert!((measured.relative_error - error / whole).abs() < 1e-6);
    let errors = &measured.largest_error_inputs;
    assert_eq!(errors.iter().map(|input| input.input).collect::<Vec<_>>(), [0, 1]);
    assert!((errors[0].share - 1.0 / error).abs() < 1e-6);
    let active = &measured.largest_activation_inputs;
    assert_eq!((active[0].input, active[1].input), (1, 0));
    assert!((active[0].share - 10.0 / 14.0).abs() < 1e-6);

    let blind = measure("layer", &matrix, &weights, None, &threads);
    let squares: f64 = weights.iter().map(|&weight| f64::from(weight).powi(2)).sum();
    assert!((blind.relative_error - (0.25 + 0.0625) / squares).abs() < 1e-6);
    assert!(blind.largest_activation_inputs.is_empty());
}

#[test]
fn the_costliest_matrices_and_layers_come_first() {
    let report = report(4);
    assert_eq!(report.kinds(), ["q_proj", "up_proj", "down_proj"]);
    let names: Vec<_> = report.costliest_matrices(2).into_iter().map(MatrixReport::layer).collect();
    assert_eq!(names, [Some(3), Some(2)]);
    let layers = report.costliest_layers(9);
    assert_eq!(layers.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(), [3, 2, 1, 0]);
    assert!((layers[3].1 - 0.111 / 3.0).abs() < 1e-9);
}

#[test]
fn larger_errors_lie_higher_and_are_darker() {
    let report = report(4);
    let chart = error_chart(&report).unwrap();
    assert_eq!(chart.lines.len(), 3);
    for line in &chart.lines {
        assert_eq!(line.points.len(), 4);
        assert!(line.points.windows(2).all(|pair| pair[0].x < pair[1].x && pair[0].y > pair[1].y));
    }
    assert_eq!(chart.errors.first().unwrap().text, "0.100 %");
    let heat = heat_map(&report).unwrap();
    assert_eq!((heat.cells.len(), heat.scale.len()), (12, 5));
    assert!((heat.cells[0].opacity - 0.06).abs() < 1e-9 && (heat.cells[11].opacity - 1.0).abs() < 1e-9);
    assert!(heat.cells[0].x < heat.cells[3].x && heat.cells[0].y < heat.cells[1].y);
}

#[test]
fn a_model_without_errors_or_layers_has_no_chart_but_a_page() {
    let mut run = run_report();
    for matrix in &mut run.report.layers {
        matrix.relative_error = 0.0;
    }
    assert!(error_chart(&run.report).is_none() && heat_map(&run.report).is_none());
    assert!(html::render(&run).unwrap().contains("No matrix has an error to draw"));
    run.report.layers.clear();
    assert!(html::render(&run).is_ok());
    // One matrix, one error.
    let mut one = report(1);
    one.layers.truncate(1);
    assert_eq!(error_chart(&one).unwrap().lines[0].points.len(), 1);
}

#[test]
fn the_page_escapes_texts_and_fetches_nothing() {
    let page = html::render(&run_report()).unwrap();
    assert!(page.contains("models&#x2f;&lt;b&gt;x"), "the model's name is escaped");
    for forbidden in ["<b>x", "http:", "https:", "<script", "<link", "url("] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for part in
        ["Quality gate failed", "7: 25.0 %", "<svg", "down_proj", "20.0000", "calibration sequence length"]
    {
        assert!(page.contains(part), "no {part}");
    }
}

#[test]
fn the_document_has_the_keys_that_scripts_rely_on() {
    let directory = tempfile::tempdir().unwrap();
    run_report().write(directory.path(), directory.path()).unwrap();
    let text = std::fs::read(directory.path().join(REPORT_FILE)).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for key in ["bits_per_weight", "seconds", "perplexity_before", "perplexity_after", "mean_kl_divergence"] {
        assert!(json[key].is_f64(), "{key}");
    }
    assert_eq!(json["peak_memory_bytes"], 1_500_000_000);
    assert_eq!(json["quality_gate"]["status"], "failed");
    for key in ["name", "bits", "group_size", "relative_error"] {
        assert!(!json["layers"][0][key].is_null(), "{key}");
    }
    assert_eq!(json["settings"]["group_size"], 128);
    assert!(directory.path().join("nibble_report.html").is_file());
    let matrices: Vec<MatrixReport> = serde_json::from_value(json["layers"].clone()).unwrap();
    assert!(matrices == run_report().report.layers, "what is written is read back");
}

#[test]
fn numbers_and_settings_are_written_for_people() {
    let texts = [(0.1234567, "12.3 %"), (0.0000123, "0.00123 %"), (0.0, "0 %"), (1.5, "150 %")];
    for (fraction, text) in texts {
        assert_eq!(percent(fraction), text);
    }
    let rows = fields(&run_report().settings).unwrap();
    let value = |name: &str| rows.iter().find(|row| row.0 == name).map(|row| row.1.as_str());
    assert_eq!(value("damping"), Some("0.01"));
    assert_eq!(value("symmetric"), Some("no"));
    let rows = fields(&run_report().calibration).unwrap();
    assert_eq!(rows[0], ("sources".to_owned(), "valid.txt, more.txt".to_owned()));
}

#[test]
fn units_that_bits_were_spent_on_are_listed_the_most_sensitive_first() {
    let mut run = run_report();
    assert!(!html::render(&run).unwrap().contains("Where bits were spent"));
    let unit = |name: &str, kl_divergence: f64, bits: u32| UnitSensitivity {
        linear_layers: vec![name.to_owned()],
        kl_divergence,
        bits,
        group_size: 128,
        raised: bits > 4,
    };
    run.report.sensitivities = vec![unit("quiet", 1e-4, 4), unit("loud", 2e-3, 8)];
    let page = html::render(&run).unwrap();
    let place = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text} in the page"));
    assert!(place("<td>loud</td>") < place("<td>quiet</td>"));
    assert!(page.contains("2.00e-3") && page.contains("width=\"160.0\"") && page.contains("width=\"8.0\""));
}
