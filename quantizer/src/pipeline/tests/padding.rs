//! Models whose intermediate size is padded.

use std::num::NonZeroUsize;

use super::*;

const WIDTH: usize = 176;

fn for_ranks(ranks: usize, settings: Settings) -> Settings {
    Settings { pad_for_tensor_parallel: NonZeroUsize::new(ranks), ..settings }
}

fn tokens() -> Vec<u32> {
    (0..40).map(|index| index * 7 % VOCABULARY as u32).collect()
}

/// `|a - b|^2 / |b|^2`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
    square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())
}

/// The weights that stand for padding in the layers of `directory`, whose intermediate size was [`WIDTH`].
fn padding_of(directory: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(directory).unwrap();
    let (config, mut padding) = (checkpoint.config(), Vec::new());
    for layer in 0..config.layers {
        for role in [LinearRole::Gate, LinearRole::Up, LinearRole::Down] {
            let spec = role.spec(config, layer);
            let weights = read(&checkpoint, &spec).dequantize();
            for (output, row) in weights.chunks_exact(spec.in_features).enumerate() {
                let first = if role == LinearRole::Down { WIDTH } else { 0 };
                if role == LinearRole::Down || output >= WIDTH {
                    padding.extend_from_slice(&row[first..]);
                }
            }
            if spec.bias && role != LinearRole::Down {
                let bias = checkpoint.vector(&spec.bias_name(), spec.out_features).unwrap();
                padding.extend_from_slice(&bias[WIDTH..]);
            }
        }
    }
    padding
}

#[test]
fn padding_splits_into_whole_groups_for_every_rank() {
    let parent = tempfile::tempdir().unwrap();
    let model = write_model_of_width(parent.path(), CLASSES[0], WIDTH, |_, _| {});
    let checkpoint = Checkpoint::open(&model).unwrap();
    let size = |ranks: usize, group_size: GroupSize| {
        let settings = for_ranks(ranks, Settings { group_size, ..settings(Method::RoundToNearest) });
        settings.padded(checkpoint.config()).map(|config| config.intermediate_size)
    };
    for (ranks, group_size, expected) in [
        (1, GroupSize::Inputs(128), 256),
        (2, GroupSize::Inputs(128), 256),
        (3, GroupSize::Inputs(128), 384),
        (1, GroupSize::Inputs(32), 256),
        (4, GroupSize::Inputs(32), 512),
        (1, GroupSize::Inputs(48), 384),
        (5, GroupSize::PerChannel, 640),
    ] {
        assert_eq!(size(ranks, group_size).unwrap(), expected, "{ranks} ranks, {group_size:?}");
    }
    for ranks in [1000, usize::MAX] {
        let refused = size(ranks, GroupSize::Inputs(128)).unwrap_err().to_string();
        assert!(refused.contains("--pad-for-tensor-parallel") && refused.contains("176"), "{refused}");
    }
}

#[test]
fn a_model_that_groups_do_not_divide_is_refused_with_the_option_that_helps() {
    let parent = tempfile::tempdir().unwrap();
    let model = write_model_of_width(parent.path(), CLASSES[3], WIDTH, |_, _| {});
    let checkpoint = Checkpoint::open(&model).unwrap();
    let wide = Settings { group_size: GroupSize::Inputs(128), ..settings(Method::RoundToNearest) };
    let refused = wide.check(checkpoint.config()).unwrap_err().to_string();
    let advice = "--pad-for-tensor-parallel 1, which pads the intermediate size to 256";
    assert!(refused.contains("down_proj") && refused.contains(advice), "{refused}");
    let in_vain = Settings { group_size: GroupSize::Inputs(96), ..wide.clone() };
    let refused = in_vain.check(checkpoint.config()).unwrap_err().to_string();
    assert!(refused.contains("q_proj") && !refused.contains("--pad-for"), "{refused}");

    let out = parent.path().join("out");
    run(&checkpoint, &out, &for_ranks(1, wide), None).unwrap();
    assert!(distance(&logits(&out, &tokens()), &logits(&model, &tokens())) < 0.2);
}

#[test]
fn padding_is_zero_in_every_format_and_changes_no_rounded_logit() {
    // A model with biases everywhere and one without.
    for class in [CLASSES[0], CLASSES[3]] {
        let parent = tempfile::tempdir().unwrap();
        let model = write_model_of_width(parent.path(), class, WIDTH, |_, _| {});
        let checkpoint = Checkpoint::open(&model).unwrap();
        for (format, bits) in [
            (Format::Gptq(GptqVersion::V1), 4),
            (Format::Gptq(GptqVersion::V2), 8),
            (Format::Awq, 4),
            (Format::CompressedTensors, 3),
        ] {
            for symmetric in [false, true] {
                for range in [RangeSearch::MinMax, RangeSearch::MeanSquare] {
                    let group_size = GroupSize::Inputs(16);
                    let rtn = settings(Method::RoundToNearest);
                    let plain = Settings { group_size, format, bits, symmetric, range, ..rtn };
                    let name = format!("{format:?} {symmetric} {range:?}");
                    let (exact, padded) = (parent.path().join(&name), parent.path().join(name + " padded"));
                    run(&checkpoint, &exact, &plain, None).unwrap();
                    let report = run(&checkpoint, &padded, &for_ranks(3, plain), None).unwrap();
                    assert_eq!(Checkpoint::open(&padded).unwrap().config().intermediate_size, 384);
                    crate::verify(|activations| Cpu::new(2).with_activations(activations), &padded, &report)
                        .unwrap();
                    let zeros = padding_of(&padded);
                    assert!(!zeros.is_empty() && zeros.iter().all(|&weight| weight == 0.0), "{padded:?}");
                    let far = distance(&logits(&padded, &tokens()), &logits(&exact, &tokens()));
                    assert!(far < 1e-10, "{padded:?}: {far}");
                }
            }
        }
    }
}

#[test]
fn calibrated_methods_leave_padding_zero_and_do_as_well_as_without() {
    let gptq = |activation_order| Method::Gptq(GptqSettings { activation_order });
    let awq_gptq = Method::AwqGptq(GptqSettings { activation_order: true });
    for class in [CLASSES[0], CLASSES[1]] {
        let parent = tempfile::tempdir().unwrap();
        let model = write_model_of_width(parent.path(), class, WIDTH, |_, _| {});
        let checkpoint = Checkpoint::open(&model).unwrap();
        let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
        let original = logits(&model, &tokens());
        for (index, method) in [gptq(true), gptq(false), Method::Awq, awq_gptq].into_iter().enumerate() {
            for symmetric in [false, true] {
                let plain = Settings { group_size: GroupSize::Inputs(16), symmetric, ..settings(method) };
                let quantize = |name: &str, settings: &Settings| {
                    let out = parent.path().join(format!("{name} {index} {symmetric}"));
                    let report = run(&checkpoint, &out, settings, Some(&calibration)).unwrap();
                    (report.mean_relative_error(), out)
                };
                let (exact, _) = quantize("exact", &plain);
                let (padded, out) = quantize("padded", &for_ranks(4, plain));
                assert!(padding_of(&out).iter().all(|&weight| weight == 0.0), "{class} {method:?}");
                // Damping, a fraction of the mean over all inputs, is a little less.
                assert!(
                    (padded / exact - 1.0).abs() < 0.05,
                    "{class} {method:?} {symmetric}: {padded} {exact}"
                );
                assert!(distance(&logits(&out, &tokens()), &original) < 0.01, "{class} {method:?}");
            }
        }
    }
}

#[test]
fn padding_takes_none_of_the_bits_that_are_spent() {
    let parent = tempfile::tempdir().unwrap();
    let model = write_model_of_width(parent.path(), CLASSES[0], WIDTH, |_, _| {});
    let checkpoint = Checkpoint::open(&model).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let wide = Settings { group_size: GroupSize::Inputs(128), ..settings(GPTQ) };
    let keep = Override {
        modules: ModuleExpression::new(r"model\.layers\.0\.mlp\.(gate|up|down)_proj").unwrap(),
        change: Change::Keep,
    };
    let spent = Settings { target_bits: Some(5.0), overrides: vec![keep], ..for_ranks(2, wide) };
    let out = parent.path().join("out");
    let report = run(&checkpoint, &out, &spent, Some(&calibration)).unwrap();
    assert!(report.bits_per_weight > 4.8 && report.bits_per_weight <= 5.0, "{}", report.bits_per_weight);
    let written = Checkpoint::open(&out).unwrap();
    let kept = written.dense("model.layers.0.mlp.down_proj.weight", HIDDEN, 256).unwrap().to_f32();
    let original = checkpoint.dense("model.layers.0.mlp.down_proj.weight", HIDDEN, WIDTH).unwrap().to_f32();
    for (kept, original) in kept.chunks_exact(256).zip(original.chunks_exact(WIDTH)) {
        assert_eq!(kept[..WIDTH], *original);
        assert!(kept[WIDTH..].iter().all(|&weight| weight == 0.0));
    }
    assert!(distance(&logits(&out, &tokens()), &logits(&model, &tokens())) < 0.1);
}
