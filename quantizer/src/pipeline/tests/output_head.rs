//! Models whose output head is quantized.

use super::*;

const HEAD: &str = "lm_head";

fn change(source: &str, change: Change) -> Override {
    Override { modules: ModuleExpression::new(source).unwrap(), change }
}

fn bits(bits: u32) -> Change {
    Change::Quantize { bits: Some(bits), group_size: None }
}

fn with_head(settings: Settings) -> Settings {
    Settings { quantize_lm_head: true, ..settings }
}

/// `|a - b|^2 / |b|^2` of the logits of two models, over all tokens of `calibration`.
fn distance(model: &Path, original: &Path, calibration: &Calibration) -> f64 {
    let (mut difference, mut whole) = (0.0, 0.0);
    for tokens in calibration.sequences() {
        for (a, b) in logits(model, tokens).into_iter().zip(logits(original, tokens)) {
            difference += f64::from(a - b).powi(2);
            whole += f64::from(b).powi(2);
        }
    }
    difference / whole
}

#[test]
fn a_quantized_head_has_the_error_that_is_reported_in_every_format_and_method() {
    let parent = tempfile::tempdir().unwrap();
    let model = write_model(parent.path(), CLASSES[0], |_, _| {});
    let checkpoint = Checkpoint::open(&model).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let spec = LinearSpec::output_head(checkpoint.config());
    for (format, symmetric) in [
        (Format::Gptq(GptqVersion::V1), false),
        (Format::Gptq(GptqVersion::V2), true),
        (Format::Awq, false),
        (Format::CompressedTensors, true),
    ] {
        let error = |method: Method| {
            // The head alone: its inputs are those of the original.
            let settings = with_head(Settings { format, symmetric, ..settings(method) });
            let settings = Settings { overrides: vec![change(r"model\.", Change::Keep)], ..settings };
            let out = parent.path().join(format!("{format:?} {}", method.name()));
            let report = run(&checkpoint, &out, &settings, Some(&calibration)).unwrap();
            let [head] = report.layers.as_slice() else { panic!("{} matrices", report.layers.len()) };
            let written = Checkpoint::open(&out).unwrap();
            assert_eq!((head.name.as_str(), head.checksum), (HEAD, Checksum::of(&read(&written, &spec))));
            assert!(!written.has("lm_head.weight") && head.layer().is_none());
            let measured = distance(&out, &model, &calibration);
            assert!((head.relative_error / measured - 1.0).abs() < 1e-3, "{head:?} {measured}");
            let verification =
                crate::verify(|activations| Cpu::new(2).with_activations(activations), &out, &report)
                    .unwrap();
            assert_eq!(verification.largest_logit_difference, Some(0.0), "written as it was in memory");
            let test = verification.self_test;
            let mut loaded = Model::load(Cpu::new(1), &written, 64).unwrap();
            assert_eq!(test.check_model(&mut loaded, &out).unwrap(), 0.0, "loaded as it is streamed");
            measured
        };
        let (rtn, gptq, awq) = (error(Method::RoundToNearest), error(GPTQ), error(Method::Awq));
        assert!(gptq < 0.8 * rtn && awq < 1.1 * rtn, "{format:?}: {rtn} {gptq} {awq}");
    }
}

#[test]
fn the_head_makes_up_for_what_the_layers_got_wrong() {
    let parent = tempfile::tempdir().unwrap();
    let model = write_model(parent.path(), CLASSES[3], |_, _| {});
    let checkpoint = Checkpoint::open(&model).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let coarse = Settings { bits: 3, group_size: GroupSize::Inputs(128), ..with_head(settings(GPTQ)) };
    let far = |name: &str, change_of_head: Change| {
        let settings = Settings { overrides: vec![change(HEAD, change_of_head)], ..coarse.clone() };
        let out = parent.path().join(name);
        let report = run(&checkpoint, &out, &settings, Some(&calibration)).unwrap();
        let has_weight = Checkpoint::open(&out).unwrap().has("lm_head.weight");
        assert_eq!((report.layers.len(), has_weight), if name == "kept" { (14, true) } else { (15, false) });
        distance(&out, &model, &calibration)
    };
    let (kept, quantized) = (far("kept", Change::Keep), far("quantized", bits(8)));
    assert!(quantized < 0.95 * kept, "{quantized} {kept}");
}

#[test]
fn bits_that_are_spent_leave_room_for_those_of_the_head() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[1], |_, _| {})).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let settings = Settings {
        group_size: GroupSize::Inputs(128),
        target_bits: Some(5.0),
        overrides: vec![change(HEAD, bits(8))],
        ..with_head(settings(GPTQ))
    };
    let out = parent.path().join("out");
    let report = run(&checkpoint, &out, &settings, Some(&calibration)).unwrap();
    assert!(report.bits_per_weight > 4.8 && report.bits_per_weight <= 5.0, "{}", report.bits_per_weight);
    assert_eq!((report.layers[14].name.as_str(), report.layers[14].bits), (HEAD, 8));
}

#[test]
fn a_head_that_cannot_be_quantized_is_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[0], |_, _| {})).unwrap();
    let config = checkpoint.config();
    let rtn = settings(Method::RoundToNearest);
    let refused = |settings: Settings, config: &ModelConfig| settings.check(config).unwrap_err().to_string();
    let tied = ModelConfig { tie_word_embeddings: true, ..config.clone() };
    let tied = refused(with_head(rtn.clone()), &tied);
    assert!(tied.contains("--quantize-lm-head") && tied.contains("tie_word_embeddings"), "{tied}");
    let odd = refused(with_head(rtn.clone()), &ModelConfig { vocabulary_size: 90, ..config.clone() });
    assert!(odd.contains("lm_head is [90, 128]") && odd.contains("divisible by 8"), "{odd}");
    let alone = refused(Settings { overrides: vec![change(HEAD, bits(8))], ..rtn }, config);
    assert!(alone.contains("--quantize-lm-head"), "{alone}");
}
