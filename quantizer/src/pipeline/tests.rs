//! Whole small models of every architecture through the quantizer.

mod output_head;
mod padding;
mod written;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nibble_kernels::device::cpu::Cpu;
use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::formats::{Format, GptqVersion, GroupSize, ModuleExpression};
use nibble_model::forward::{Batch, Model};
use nibble_model::self_test::Checksum;
use safetensors::Dtype;

use super::*;
use crate::calibration::CalibrationOptions;
use crate::plan::{Change, Override, specs, stored_bits};
use crate::report::UnitSensitivity;
use crate::settings::{GptqSettings, Method, RangeSearch};

const VOCABULARY: usize = 96;
const HIDDEN: usize = 128;
const INTERMEDIATE: usize = 256;
const CLASSES: [&str; 4] = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];

/// Reproducible values in -0.25..0.25.
fn random(count: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.25
    };
    (0..count).map(|_| next()).collect()
}

/// A random model of two layers in `parent/model`, with a tokenizer and files that belong to it.
fn write_model(parent: &Path, class: &str, edit: impl Fn(&str, &mut [f32])) -> PathBuf {
    write_model_of_width(parent, class, INTERMEDIATE, edit)
}

/// The same with another intermediate size.
fn write_model_of_width(
    parent: &Path,
    class: &str,
    intermediate_size: usize,
    edit: impl Fn(&str, &mut [f32]),
) -> PathBuf {
    let directory = parent.join("model");
    let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
    let config = serde_json::json!({
        "architectures": [class], "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": intermediate_size, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 256, "tie_word_embeddings": class == "Qwen2ForCausalLM",
        "hidden_act": "silu", "torch_dtype": "float32", "mlp_bias": class == "LlamaForCausalLM",
    });
    let parsed = {
        let path = parent.join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        ModelConfig::from_file(&path).unwrap()
    };
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    if !parsed.tie_word_embeddings {
        shapes.push(("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]));
    }
    for layer in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![HIDDEN]));
        }
        if parsed.query_key_norm {
            for norm in ["q_norm", "k_norm"] {
                shapes.push((format!("model.layers.{layer}.self_attn.{norm}.weight"), vec![32]));
            }
        }
        for role in LinearRole::ALL {
            let spec = role.spec(&parsed, layer);
            shapes.push((format!("{}.weight", spec.name), vec![spec.out_features, spec.in_features]));
            if spec.bias {
                shapes.push((format!("{}.bias", spec.name), vec![spec.out_features]));
            }
        }
    }
    for (seed, (name, shape)) in shapes.into_iter().enumerate() {
        let mut values = random(shape.iter().product(), seed + 1);
        edit(&name, &mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.tensor(&name, Dtype::F32, &shape, &bytes).unwrap();
    }
    writer.file("config.json", config.to_string().as_bytes()).unwrap();
    writer.file("chat_template.jinja", b"{{ messages }}").unwrap();
    let vocabulary: BTreeMap<String, usize> = (0..VOCABULARY).map(|id| (format!("w{id}"), id)).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    writer.file("tokenizer.json", tokenizer.to_string().as_bytes()).unwrap();
    writer.finish().unwrap();
    directory
}

/// A text of `words` words of the vocabulary in `parent`.
fn write_text(parent: &Path, words: usize) -> PathBuf {
    let path = parent.join("text");
    let word = |value: &f32| format!("w{}", ((value + 0.25) * 2.0 * VOCABULARY as f32) as usize % VOCABULARY);
    std::fs::write(&path, random(words, 99).iter().map(word).collect::<Vec<_>>().join(" ")).unwrap();
    path
}

fn calibration(checkpoint: &Checkpoint, text: &Path) -> Result<Calibration, QuantizeError> {
    let options = CalibrationOptions { samples: 12, sequence_length: 50, seed: 3 };
    Calibration::from_files(&[text.to_owned()], None, checkpoint, options)
}

fn settings(method: Method) -> Settings {
    Settings {
        method,
        correction: method != Method::RoundToNearest,
        damping: 0.01,
        overrides: Vec::new(),
        target_bits: None,
        quantize_lm_head: false,
        pad_for_tensor_parallel: None,
        bits: 4,
        group_size: GroupSize::Inputs(32),
        symmetric: false,
        range: RangeSearch::MeanSquare,
        format: Format::Gptq(GptqVersion::V1),
        threads: 2,
    }
}

const GPTQ: Method = Method::Gptq(GptqSettings { activation_order: true });

const OPTIONS: RunOptions =
    RunOptions { resume: false, journal_interval: Duration::ZERO, memory_limit: u64::MAX };

fn run(
    checkpoint: &Checkpoint,
    out: &Path,
    settings: &Settings,
    calibration: Option<&Calibration>,
) -> Result<Report, QuantizeError> {
    quantize(Cpu::new(settings.threads), checkpoint, out, settings, calibration, OPTIONS, &mut |_| {})
}

fn read(checkpoint: &Checkpoint, spec: &LinearSpec) -> QuantizedMatrix {
    match checkpoint.linear(&spec.name, spec.out_features, spec.in_features).unwrap() {
        LinearWeight::Quantized(matrix) => matrix,
        LinearWeight::Dense(_) => panic!("{} is dense", spec.name),
    }
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(path).unwrap()))
        .collect()
}

fn logits(directory: &Path, tokens: &[u32]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(directory).unwrap();
    let mut model = Model::load(Cpu::new(2), &checkpoint, 64).unwrap();
    let mut cache = model.kv_cache(8).unwrap();
    model.forward(&Batch::single(tokens, 0, (0..8).collect()), &mut cache).unwrap().values
}

#[test]
fn every_architecture_is_quantized_twice_to_the_same_bytes_and_runs() {
    for class in CLASSES {
        let parent = tempfile::tempdir().unwrap();
        let model = write_model(parent.path(), class, |_, _| {});
        let checkpoint = Checkpoint::open(&model).unwrap();
        let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
        let quantize = |name: &str, method: Method, threads: usize| {
            let out = parent.path().join(name);
            let settings = Settings { threads, ..settings(method) };
            let report = run(&checkpoint, &out, &settings, Some(&calibration)).unwrap();
            (out, report)
        };
        let (first, report) = quantize("first", GPTQ, 1);
        let (second, _) = quantize("second", GPTQ, 3);
        assert!(files(&first) == files(&second), "{class}");
        let (rounded, rounded_report) = quantize("rounded", Method::RoundToNearest, 2);
        assert_eq!(report.layers.len(), 14);
        assert!((report.bits_per_weight - (4.0 + 20.0 / 32.0)).abs() < 1e-9);
        assert!(report.mean_relative_error() < 0.8 * rounded_report.mean_relative_error(), "{class}");

        let written = files(&first);
        assert_eq!(written["chat_template.jinja"], files(&model)["chat_template.jinja"]);
        assert_eq!(written["tokenizer.json"], files(&model)["tokenizer.json"]);
        assert!(written.contains_key("quantize_config.json"));
        let tokens: Vec<u32> = (0..40).map(|index| index * 7 % VOCABULARY as u32).collect();
        let original = logits(&model, &tokens);
        let distance = |directory: &Path| -> f32 {
            logits(directory, &tokens).iter().zip(&original).map(|(a, b)| (a - b).powi(2)).sum()
        };
        let size: f32 = original.iter().map(|logit| logit * logit).sum();
        let (gptq, rtn) = (distance(&first) / size, distance(&rounded) / size);
        assert!(gptq < 0.1 && gptq < rtn, "{class}: {gptq} {rtn}");
    }
}

#[test]
fn what_is_written_reads_back_as_the_matrix_that_was_measured() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[2], |_, _| {})).unwrap();
    let threads = Threads::new(2).unwrap();
    let groups =
        [GroupSize::Inputs(32), GroupSize::Inputs(64), GroupSize::Inputs(128), GroupSize::PerChannel];
    for (index, group_size) in groups.into_iter().enumerate() {
        for symmetric in [false, true] {
            for (bits, format) in [
                (4, Format::Gptq(GptqVersion::V1)),
                (3, Format::Gptq(GptqVersion::V2)),
                (8, Format::Gptq(GptqVersion::V1)),
                (4, Format::Awq),
                (3, Format::CompressedTensors),
                (4, Format::CompressedTensors),
            ] {
                let settings =
                    Settings { group_size, symmetric, bits, format, ..settings(Method::RoundToNearest) };
                let out = parent.path().join(format!("{index}-{symmetric}-{bits}-{format:?}"));
                let report = run(&checkpoint, &out, &settings, None).unwrap();
                let written = Checkpoint::open(&out).unwrap();
                for role in LinearRole::ALL {
                    let spec = role.spec(checkpoint.config(), 1);
                    let module = settings.plan(checkpoint.config()).settings_of(&spec.name).unwrap();
                    let weights = LayerTensors::new(&checkpoint, 1).weight(role).unwrap();
                    let (expected, measured) = quantize_matrix(
                        weights,
                        &spec,
                        module,
                        &settings,
                        &InputStatistics::Unknown,
                        &threads,
                    )
                    .unwrap();
                    assert_eq!(read(&written, &spec).checksum(), expected.checksum(), "{}", spec.name);
                    let reported = report.layers.iter().find(|matrix| matrix.name == spec.name).unwrap();
                    assert_eq!((reported, reported.bits), (&measured, bits));
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_quantized_is_refused_by_name_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[0], |_, _| {})).unwrap();
    let out = parent.path().join("out");
    let refused = |checkpoint: &Checkpoint, settings: &Settings| {
        let error = run(checkpoint, &out, settings, None).unwrap_err().to_string();
        let left = files(parent.path().join("model").as_path());
        assert!(!out.exists() && left.contains_key("model.safetensors"));
        let names: Vec<_> = std::fs::read_dir(parent.path()).unwrap().collect();
        let left_over = |name: &str| ["partial", "resume"].iter().any(|part| name.contains(part));
        assert!(!names.iter().any(|entry| left_over(&format!("{entry:?}"))), "{names:?}");
        error
    };
    let rtn = settings(Method::RoundToNearest);
    let wide = refused(&checkpoint, &Settings { group_size: GroupSize::Inputs(96), ..rtn.clone() });
    assert!(wide.contains("q_proj") && wide.contains("128, 64, 32"), "{wide}");
    let bits = refused(&checkpoint, &Settings { bits: 5, ..rtn.clone() });
    assert!(bits.contains("--bits"), "{bits}");
    let uncalibrated = refused(&checkpoint, &settings(GPTQ));
    assert!(uncalibrated.contains("--calibration"), "{uncalibrated}");
    let undamped = refused(&checkpoint, &Settings { damping: 0.0, ..settings(GPTQ) });
    assert!(undamped.contains("--damp"), "{undamped}");

    run(&checkpoint, &out, &rtn, None).unwrap();
    let before = files(&out);
    let existing = run(&checkpoint, &out, &rtn, None).unwrap_err().to_string();
    assert!(existing.contains("there already"), "{existing}");
    assert!(files(&out) == before);
    let again = run(&Checkpoint::open(&out).unwrap(), &parent.path().join("again"), &rtn, None);
    assert!(again.unwrap_err().to_string().contains("quantized already"));
}

#[test]
fn weights_that_are_not_numbers_are_refused_with_their_place() {
    let parent = tempfile::tempdir().unwrap();
    let damage = |name: &str, values: &mut [f32]| {
        if name == "model.layers.1.mlp.up_proj.weight" {
            values[HIDDEN + 5] = f32::NAN;
        }
    };
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[0], damage)).unwrap();
    let out = parent.path().join("out");
    let error = run(&checkpoint, &out, &settings(Method::RoundToNearest), None).unwrap_err().to_string();
    assert!(error.contains("layers.1.mlp.up_proj") && error.contains("output 1, input 5"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_run_that_fails_before_its_first_layer_leaves_no_journal() {
    let parent = tempfile::tempdir().unwrap();
    let damage = |name: &str, values: &mut [f32]| {
        if name == "model.layers.0.mlp.up_proj.weight" {
            values[5] = f32::NAN;
        }
    };
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[0], damage)).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let out = parent.path().join("out");
    for target_bits in [None, Some(6.0)] {
        let settings = Settings { target_bits, ..settings(GPTQ) };
        run(&checkpoint, &out, &settings, Some(&calibration)).unwrap_err();
        assert!(!out.exists() && !parent.path().join("out.resume").exists(), "{target_bits:?}");
    }
}

#[test]
fn calibration_files_that_cannot_be_used_are_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&write_model(parent.path(), CLASSES[0], |_, _| {})).unwrap();
    let text = write_text(parent.path(), 900);
    let sequences = calibration(&checkpoint, &text).unwrap();
    assert_eq!((sequences.sequences().len(), sequences.sequence_length()), (12, 50));
    for (contents, problem) in
        [(&b"w1 \xff w2"[..], "byte 3 is not UTF-8"), (b"w1 w2", "2 tokens"), (b"", "0 tokens")]
    {
        std::fs::write(&text, contents).unwrap();
        let error = calibration(&checkpoint, &text).unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains("text"), "{error}");
    }
    let missing = calibration(&checkpoint, Path::new("no such file")).unwrap_err().to_string();
    assert!(missing.contains("no such file"), "{missing}");
}

#[test]
fn scales_of_inputs_change_nothing_but_the_rounding() {
    let gptq = GptqSettings { activation_order: true };
    // Loud channels in every place that scales are folded into, so that there is something to find.
    let loud = |name: &str, values: &mut [f32]| {
        let every = |values: &mut [f32], factor: f32| values.iter_mut().for_each(|value| *value *= factor);
        if name.ends_with("layernorm.weight") {
            every(&mut values[5..7], 30.0);
        } else if name.ends_with("v_proj.weight") || name.ends_with("up_proj.weight") {
            every(&mut values[9 * HIDDEN..11 * HIDDEN], 30.0);
        } else if name.ends_with("v_proj.bias") || name.ends_with("up_proj.bias") {
            every(&mut values[9..11], 30.0);
        }
    };
    for class in CLASSES {
        let parent = tempfile::tempdir().unwrap();
        let model = write_model(parent.path(), class, loud);
        let checkpoint = Checkpoint::open(&model).unwrap();
        let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
        let tokens: Vec<u32> = (0..40).map(|index| index * 7 % VOCABULARY as u32).collect();
        let original = logits(&model, &tokens);
        let distance = |name: &str, settings: &Settings| {
            let out = parent.path().join(name);
            let report = run(&checkpoint, &out, settings, Some(&calibration)).unwrap();
            let written = Checkpoint::open(&out).unwrap();
            let norm = "model.layers.1.input_layernorm.weight";
            let moved = written.vector(norm, HIDDEN).unwrap() != checkpoint.vector(norm, HIDDEN).unwrap();
            assert_eq!(moved, settings.method.scales_inputs(), "{class} {name}");
            let logits = logits(&out, &tokens);
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
            let far = square(&mut logits.iter().zip(&original).map(|(a, b)| a - b));
            (far / square(&mut original.iter().copied()), report.mean_relative_error())
        };
        for (name, method) in [("awq", Method::Awq), ("awq-gptq", Method::AwqGptq(gptq))] {
            for correction in [false, true] {
                let eight_bits = Settings { bits: 8, correction, ..settings(method) };
                let (far, _) = distance(&format!("{name} {correction}"), &eight_bits);
                assert!(far < 3e-4, "{class} {name} {correction}: {far}");
            }
        }
        let plain = |method| Settings { correction: false, ..settings(method) };
        let (_, awq) = distance("awq", &plain(Method::Awq));
        let (_, rtn) = distance("rtn", &plain(Method::RoundToNearest));
        assert!(awq < 0.7 * rtn, "{class}: {awq} {rtn}");
    }
}

#[test]
fn bits_go_where_they_matter_and_overrides_are_kept() {
    let parent = tempfile::tempdir().unwrap();
    // What the second layer's attention adds is drowned out by what its feed-forward block adds.
    let loud = |name: &str, values: &mut [f32]| {
        let factor = match name {
            "model.layers.1.mlp.down_proj.weight" => 8.0,
            "model.layers.1.self_attn.o_proj.weight" => 0.01,
            _ => 1.0,
        };
        values.iter_mut().for_each(|value| *value *= factor);
    };
    let model = write_model(parent.path(), CLASSES[0], loud);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
    let change = |source: &str, change| Override { modules: ModuleExpression::new(source).unwrap(), change };
    let plain = Settings { group_size: GroupSize::Inputs(128), ..settings(GPTQ) };
    let overridden = Settings {
        overrides: vec![
            change(r"model\.layers\.0\.self_attn\.o_proj", Change::Keep),
            change(".*q_proj|.*k_proj|.*v_proj", Change::Quantize { bits: Some(8), group_size: None }),
        ],
        ..plain.clone()
    };
    for (name, format) in [("gptq", plain.format), ("compressed", Format::CompressedTensors)] {
        let spent = Settings { target_bits: Some(5.0), format, ..plain.clone() };
        let out = parent.path().join(format!("{name} spent"));
        let report = run(&checkpoint, &out, &spent, Some(&calibration)).unwrap();
        assert!(report.bits_per_weight > 4.8 && report.bits_per_weight <= 5.0, "{}", report.bits_per_weight);
        let written = Checkpoint::open(&out).unwrap();
        for spec in specs(checkpoint.config(), false) {
            let unit =
                report.sensitivities.iter().find(|unit| unit.linear_layers.contains(&spec.name)).unwrap();
            let matrix = read(&written, &spec);
            assert_eq!((matrix.bits(), matrix.group_size()), (unit.bits, unit.group_size), "{}", spec.name);
        }
        let unit = |end: &str| {
            let of_name = |name: &String| name.ends_with(end);
            report.sensitivities.iter().find(|unit| unit.linear_layers.iter().any(of_name)).unwrap()
        };
        let (down, quiet) = (unit("1.mlp.down_proj"), unit("1.self_attn.o_proj"));
        let found = &report.sensitivities;
        assert!(down.kl_divergence > 10.0 * quiet.kl_divergence, "{found:?}");
        let bits =
            |unit: &UnitSensitivity| stored_bits(unit.bits, GroupSize::Inputs(unit.group_size), INTERMEDIATE);
        assert!(down.raised && bits(down) > bits(quiet), "{found:?}");

        let out = parent.path().join(format!("{name} overridden"));
        let overridden = Settings { format, ..overridden.clone() };
        let report = run(&checkpoint, &out, &overridden, Some(&calibration)).unwrap();
        assert_eq!(report.layers.len(), 13);
        let written = Checkpoint::open(&out).unwrap();
        let kept = "model.layers.0.self_attn.o_proj.weight";
        assert_eq!(written.raw(kept).unwrap().data, checkpoint.raw(kept).unwrap().data);
        let bits = |role: LinearRole| read(&written, &role.spec(checkpoint.config(), 0)).bits();
        assert_eq!([LinearRole::Query, LinearRole::Value, LinearRole::Up].map(bits), [8, 8, 4]);
        let tokens: Vec<u32> = (0..40).collect();
        assert!(logits(&out, &tokens).iter().all(|logit| logit.is_finite()));
        let both = Settings { target_bits: Some(6.0), ..overridden };
        let report =
            run(&checkpoint, &parent.path().join(format!("{name} both")), &both, Some(&calibration)).unwrap();
        let raised: Vec<_> = report.sensitivities.iter().filter(|unit| unit.raised).collect();
        assert!(!raised.is_empty() && report.sensitivities.len() == 7);
        assert!(!raised.iter().any(|unit| unit.linear_layers.iter().any(|name| name.ends_with("q_proj"))));
    }
    let refused = |settings: Settings| {
        run(&checkpoint, &parent.path().join("refused"), &settings, Some(&calibration))
            .unwrap_err()
            .to_string()
    };
    let missing = refused(Settings { overrides: vec![change("layers", Change::Keep)], ..plain.clone() });
    assert!(missing.contains("--override") && missing.contains("layers"), "{missing}");
    let little = refused(Settings { target_bits: Some(4.0), ..plain.clone() });
    assert!(little.contains("--target-bits") && little.contains("4.156"), "{little}");
    let awq = refused(Settings { target_bits: Some(5.0), format: Format::Awq, ..plain });
    assert!(awq.contains("mixes group sizes"), "{awq}");
}
