//! Every format of quantized weights: what other programs packed, what is written and read back, what is refused.

use std::collections::BTreeMap;
use std::path::Path;

use nibble_kernels::tensor::{QuantizedMatrix, QuantizedParts};
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, LinearWeight};
use nibble_model::config::ModelConfig;
use nibble_model::formats::{
    ActivationOrder, Format, GptqVersion, GroupSize, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use nibble_model::inspection::inspect;
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

fn model_config(quantization: Value) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "quantization_config": quantization,
    })
}

fn parse(quantization: Value) -> Result<QuantizationConfig, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, model_config(quantization).to_string()).unwrap();
    let config = ModelConfig::from_file(&path).map_err(|error| error.to_string())?;
    Ok(config.quantization.expect("a quantized checkpoint"))
}

fn read(directory: &Path, out_features: usize, in_features: usize) -> Result<QuantizedMatrix, String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    match checkpoint.linear("x", out_features, in_features).map_err(|error| error.to_string())? {
        LinearWeight::Quantized(matrix) => Ok(matrix),
        LinearWeight::Dense(_) => Err("dense".to_owned()),
    }
}

#[test]
fn layers_packed_by_other_programs_have_the_weights_that_were_packed() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quantized_layers");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(golden).unwrap() {
        let directory = entry.unwrap().path();
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let &[out, inputs] = checkpoint.raw("expected.weight").unwrap().shape else { panic!("{name}") };
        let expected = checkpoint.dense("expected.weight", out, inputs).unwrap().to_f32();
        let matrix = read(&directory, out, inputs).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(matrix.dequantize(), &expected[..], "{name}");
        let bits = name.split('-').find_map(|word| word.parse().ok()).unwrap_or(4);
        assert_eq!(matrix.bits(), bits, "{name}");
        let shown = inspect(&directory).unwrap();
        let weight = shown.weights.iter().find(|weight| weight.name == "x").unwrap();
        assert_eq!((&weight.dtype, weight.group_size), (&format!("INT{bits}"), Some(matrix.group_size())));
        // GPTQ and AWQ do not store the inputs that do not fill a word; none of these has any.
        assert_eq!(weight.shape, [out, inputs], "{name}");
        assert_eq!(shown.weights.len(), 2, "{name}: every tensor of the layer is part of it");
        found.push(name);
    }
    assert_eq!(found.len(), 17, "{found:?}");
}

fn plan(settings: ModuleSettings, exceptions: &[(&str, Option<ModuleSettings>)]) -> QuantizationPlan {
    QuantizationPlan {
        settings,
        exceptions: exceptions.iter().map(|&(name, settings)| (name.to_owned(), settings)).collect(),
        quantize_lm_head: false,
        damp_percent: None,
        quantizer: "nibble:test".to_owned(),
    }
}

fn settings(bits: u32, group_size: GroupSize, symmetric: bool) -> ModuleSettings {
    ModuleSettings { bits, group_size, symmetric, activation_order: ActivationOrder::None }
}

/// A format, and the settings and size of a matrix that it can store.
fn cases() -> impl Strategy<Value = (Format, ModuleSettings, usize, usize)> {
    let gptq = (prop_oneof![Just(GptqVersion::V1), Just(GptqVersion::V2)], 0usize..4, 1usize..3, 1usize..4)
        .prop_flat_map(|(version, bits, out, inputs)| {
            let bits = [2, 3, 4, 8][bits];
            let step = if bits == 3 { 32 } else { 32 / bits as usize };
            let (out, inputs) = (out * step, inputs * step);
            // The last group may be partial.
            (1..=inputs).prop_map(move |size| (Format::Gptq(version), bits, size, out, inputs))
        });
    let awq = (1usize..5, 1usize..10, 1usize..5)
        .prop_map(|(out, size, groups)| (Format::Awq, 4, size, out * 8, size * groups));
    let compressed = (2u32..=8, 1usize..20, 1usize..20, 1usize..5)
        .prop_map(|(bits, out, size, groups)| (Format::CompressedTensors, bits, size, out, size * groups));
    (prop_oneof![gptq, awq, compressed], any::<bool>()).prop_map(
        |((format, bits, size, out, inputs), symmetric)| {
            let group_size = if size == inputs { GroupSize::PerChannel } else { GroupSize::Inputs(size) };
            (format, settings(bits, group_size, symmetric), out, inputs)
        },
    )
}

/// A matrix that `format` can store.
fn matrix(
    format: Format,
    settings: ModuleSettings,
    out: usize,
    inputs: usize,
) -> impl Strategy<Value = QuantizedMatrix> {
    let (bits, group_size) = (settings.bits, settings.group_size.inputs(inputs));
    let groups = inputs.div_ceil(group_size);
    let highest = ((1u32 << bits) - 1) as u8;
    let zero = match (settings.symmetric, format) {
        (true, _) => (highest / 2 + 1)..=(highest / 2 + 1),
        (false, Format::Gptq(GptqVersion::V1)) => 1..=highest,
        (false, _) => 0..=highest,
    };
    let codes = prop::collection::vec(0..=highest, out * inputs);
    let zero_points = prop::collection::vec(zero, out * groups);
    let scales = prop::collection::vec(1u16..0x7c00, out * groups);
    (codes, zero_points, scales).prop_map(move |(codes, zero_points, scales)| {
        let parts = QuantizedParts {
            out_features: out,
            in_features: inputs,
            bits,
            group_size,
            codes,
            scales: scales.into_iter().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
            zero_points,
            input_permutation: None,
        };
        QuantizedMatrix::new(parts).expect("valid parts")
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        (format, settings, matrix) in cases().prop_flat_map(|(format, settings, out, inputs)| {
            (Just(format), Just(settings), matrix(format, settings, out, inputs))
        })
    ) {
        let (out, inputs) = (matrix.out_features(), matrix.in_features());
        prop_assert_eq!(format.check(settings, out, inputs), Ok(()));
        let config = QuantizationConfig::plan(format, &plan(settings, &[])).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("out");
        let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
        config.write_linear(&mut writer, "x", &matrix).unwrap();
        writer.file("config.json", model_config(config.to_json()).to_string().as_bytes()).unwrap();
        writer.finish().unwrap();
        prop_assert_eq!(read(&directory, out, inputs).unwrap(), matrix);
    }
}

const FORMATS: [Format; 4] =
    [Format::Gptq(GptqVersion::V1), Format::Gptq(GptqVersion::V2), Format::Awq, Format::CompressedTensors];

#[test]
fn written_metadata_say_what_the_plan_says_of_every_module() {
    let default = settings(4, GroupSize::Inputs(64), false);
    let finer = settings(4, GroupSize::Inputs(32), false);
    let wider = ModuleSettings {
        activation_order: ActivationOrder::Static,
        ..settings(8, GroupSize::PerChannel, true)
    };
    let layer = |number: usize, part: &str| format!("model.layers.{number}.{part}");
    let names: Vec<String> = (0..12)
        .flat_map(|number| {
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
                .map(|part| layer(number, part))
        })
        .chain(["lm_head".to_owned()])
        .collect();
    let mut exceptions = BTreeMap::new();
    exceptions.insert(layer(1, "mlp.down_proj"), Some(wider));
    exceptions.insert(layer(11, "mlp.down_proj"), Some(finer));
    exceptions.insert(layer(2, "self_attn.o_proj"), None);
    for part in ["q_proj", "k_proj", "v_proj"] {
        exceptions.insert(layer(3, &format!("self_attn.{part}")), Some(wider));
    }
    // Only one of three that are fused.
    exceptions.insert(layer(4, "self_attn.q_proj"), Some(finer));
    let plan = QuantizationPlan { exceptions, ..plan(default, &[]) };
    for format in FORMATS {
        if format == Format::Awq {
            let message = QuantizationConfig::plan(format, &plan).unwrap_err().to_string();
            assert!(message.contains("the same settings in every module"), "{message}");
            continue;
        }
        let config = QuantizationConfig::plan(format, &plan).unwrap();
        let reread = parse(config.to_json()).unwrap();
        assert_eq!(reread, QuantizationConfig::plan(format, &plan).unwrap());
        for name in names.iter().filter(|name| *name != "lm_head") {
            let expected = plan.exceptions.get(name).copied().unwrap_or(Some(default));
            assert_eq!(reread.settings_of(name), expected, "{format:?} {name}");
        }
    }
    let gptq = QuantizationConfig::plan(Format::Gptq(GptqVersion::V1), &plan).unwrap();
    // Readers that know only the fused form find its settings too, and not where its parts differ.
    assert_eq!(gptq.settings_of("model.layers.3.self_attn.qkv_proj"), Some(wider));
    assert_eq!(gptq.settings_of("model.layers.4.self_attn.qkv_proj"), Some(default));
    let compressed = QuantizationConfig::plan(Format::CompressedTensors, &plan).unwrap();
    assert_eq!(compressed.settings_of("lm_head"), None);
    assert_eq!(compressed.to_json()["config_groups"]["group_1"]["weights"]["actorder"], "static");
}

#[test]
fn the_scheme_of_a_module_is_the_one_that_compressed_tensors_chooses() {
    let golden: Value = serde_json::from_str(include_str!("golden/quantization_schemes.json")).unwrap();
    let group = |(number, (name, targets)): (usize, (&String, &Value))| {
        let weights = json!({ "num_bits": 4, "strategy": "group", "group_size": 8 << number });
        (name.clone(), json!({ "targets": targets, "weights": weights }))
    };
    let groups: serde_json::Map<String, Value> =
        golden["groups"].as_object().unwrap().iter().enumerate().map(group).collect();
    let config = parse(json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
        "ignore": golden["ignore"],
    }))
    .unwrap();
    let chosen = golden["chosen"].as_object().unwrap();
    assert_eq!(chosen.len(), 49);
    for (module, group) in chosen {
        let expected = group.as_str().map(|group| {
            let number: usize = group.strip_prefix("group_").unwrap().parse().unwrap();
            GroupSize::Inputs(8 << number)
        });
        let found = config.settings_of(module).map(|settings| settings.group_size);
        assert_eq!(found, expected, "{module}");
    }
}

#[test]
fn rules_of_gptq_are_taken_in_their_order() {
    let config = parse(json!({
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true,
        "dynamic": {
            "-:.*\\.1\\.mlp": {}, "+:.*down_proj": { "bits": 8, "group_size": 32 }, ".*\\.2\\.": { "sym": false },
        },
    }))
    .unwrap();
    let found = |module: &str| config.settings_of(module);
    let default = settings(4, GroupSize::Inputs(128), true);
    assert_eq!(found("model.layers.1.mlp.down_proj"), None);
    assert_eq!(found("model.layers.2.mlp.down_proj"), Some(settings(8, GroupSize::Inputs(32), true)));
    assert_eq!(found("model.layers.2.mlp.up_proj"), Some(ModuleSettings { symmetric: false, ..default }));
    assert_eq!(found("model.layers.12.mlp.up_proj"), Some(default));
}

#[test]
fn awq_metadata_are_read_under_both_sets_of_names() {
    for names in [["bits", "group_size"], ["w_bit", "q_group_size"]] {
        let config = parse(json!({
            "quant_method": "awq", names[0]: 4, names[1]: 64, "zero_point": true, "version": "GEMM",
            "modules_to_not_convert": ["visual", "o_proj"],
        }))
        .unwrap();
        let found = config.settings_of("model.layers.0.mlp.up_proj");
        assert_eq!(found, Some(settings(4, GroupSize::Inputs(64), false)));
        assert_eq!(config.settings_of("model.layers.0.self_attn.o_proj"), None);
    }
}

#[test]
fn metadata_that_are_not_supported_are_refused_by_name() {
    let awq = |name: &str, value: Value| {
        let mut config = json!({ "quant_method": "awq", "bits": 4, "group_size": 64 });
        config[name] = value;
        config
    };
    let compressed = |path: &[&str], value: Value| {
        let mut config = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": { "group_0": {
                "targets": ["Linear"], "weights": { "num_bits": 4, "strategy": "group", "group_size": 64 },
            } },
        });
        let field = path.iter().fold(&mut config, |object, name| &mut object[*name]);
        *field = value;
        config
    };
    let group =
        |path: &[&str], value: Value| compressed(&[&["config_groups", "group_0"], path].concat(), value);
    let cases = [
        (awq("bits", json!(8)), "bits"),
        (awq("version", json!("gemv_fast")), "gemv_fast"),
        (awq("zero_point", json!(false)), "zero_point"),
        (compressed(&["format"], json!("marlin-24")), "marlin-24"),
        (compressed(&["kv_cache_scheme"], json!({ "num_bits": 8 })), "kv_cache_scheme"),
        (compressed(&["transform_config"], json!({ "config_groups": {} })), "transform_config"),
        (compressed(&["sparsity_config"], json!({ "format": "sparse-bitmask" })), "sparse-bitmask"),
        (group(&["input_activations"], json!({ "num_bits": 8 })), "group_0.input_activations"),
        (group(&["output_activations"], json!({ "num_bits": 8 })), "group_0.output_activations"),
        (group(&["format"], json!("float-quantized")), "float-quantized"),
        (group(&["weights", "strategy"], json!("tensor")), "tensor"),
        (group(&["weights"], json!({ "num_bits": 4 })), "tensor"),
        (group(&["weights", "num_bits"], json!(16)), "num_bits"),
        (group(&["weights", "type"], json!("float")), "float"),
        (group(&["weights", "dynamic"], json!(true)), "dynamic"),
        (group(&["targets"], json!(["re:("])), "regular expression"),
        (group(&["weights", "group_size"], json!(0)), "group_size"),
        (compressed(&["config_groups"], Value::Null), "config_groups"),
    ];
    for (config, named) in cases {
        let message = parse(config).unwrap_err();
        assert!(message.contains(named) && message.contains("config.json"), "{named}: {message}");
    }
}

/// A checkpoint of the layer "x" of 16 outputs and 32 inputs in groups of 16, and other tensors.
fn write(directory: &Path, format: Format, extra: &[(&str, Dtype, usize)]) -> QuantizationConfig {
    let config =
        QuantizationConfig::plan(format, &plan(settings(4, GroupSize::Inputs(16), false), &[])).unwrap();
    let matrix = QuantizedMatrix::new(QuantizedParts {
        out_features: 16,
        in_features: 32,
        bits: 4,
        group_size: 16,
        codes: vec![3; 16 * 32],
        scales: vec![0.5; 32],
        zero_points: vec![7; 32],
        input_permutation: None,
    });
    let mut writer = CheckpointWriter::create(directory, u64::MAX).unwrap();
    config.write_linear(&mut writer, "x", &matrix.unwrap()).unwrap();
    for &(name, dtype, elements) in extra {
        let bytes = vec![0; elements * dtype.bitsize() / 8];
        writer.tensor(name, dtype, &[elements], &bytes).unwrap();
    }
    writer.file("config.json", model_config(config.to_json()).to_string().as_bytes()).unwrap();
    writer.finish().unwrap();
    config
}

/// Writes [`write`]'s checkpoint with another `quantization_config`, and gives the error of reading it.
fn error_with(format: Format, change: impl FnOnce(&mut Value)) -> String {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("out");
    let mut config = write(&directory, format, &[]).to_json();
    change(&mut config);
    std::fs::write(directory.join("config.json"), model_config(config).to_string()).unwrap();
    read(&directory, 16, 32).unwrap_err()
}

#[test]
fn a_layer_that_is_there_twice_or_in_part_is_refused() {
    for format in FORMATS {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("twice");
        let config = write(&directory, format, &[("x.weight", Dtype::F16, 512)]);
        let message = read(&directory, 16, 32).unwrap_err();
        assert!(message.contains("not both") && message.contains("x.weight"), "{message}");

        for (number, part) in config.parts().iter().enumerate() {
            // One that is optional where nothing asks for it.
            if part.contains("g_idx") {
                continue;
            }
            let directory = parent.path().join(format!("only-{number}"));
            let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
            writer.tensor(&format!("x.{part}"), Dtype::U8, &[1], &[0]).unwrap();
            let text = model_config(config.to_json()).to_string();
            writer.file("config.json", text.as_bytes()).unwrap();
            writer.finish().unwrap();
            let message = read(&directory, 16, 32).unwrap_err();
            assert!(message.contains("tensor \"x.") && message.contains("expected"), "{part}: {message}");
        }

        let directory = parent.path().join("nothing");
        let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
        writer.tensor("y", Dtype::U8, &[1], &[0]).unwrap();
        writer.file("config.json", model_config(config.to_json()).to_string().as_bytes()).unwrap();
        writer.finish().unwrap();
        let message = read(&directory, 16, 32).unwrap_err();
        assert!(message.contains("missing") && message.contains("\"x."), "{message}");
    }
}

#[test]
fn the_output_head_is_quantized_only_where_the_metadata_say_so() {
    let settings = settings(4, GroupSize::Inputs(16), false);
    let matrix = QuantizedMatrix::new(QuantizedParts {
        out_features: 16,
        in_features: 32,
        bits: 4,
        group_size: 16,
        codes: (0..512).map(|index| (index % 15) as u8).collect(),
        scales: vec![0.5; 32],
        zero_points: vec![7; 32],
        input_permutation: None,
    })
    .unwrap();
    for format in FORMATS {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("out");
        let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
        let without = QuantizationConfig::plan(format, &plan(settings, &[])).unwrap();
        let message = without.write_linear(&mut writer, "lm_head", &matrix).unwrap_err().to_string();
        assert!(message.contains("expected dense"), "{message}");
        let with = QuantizationPlan { quantize_lm_head: true, ..plan(settings, &[]) };
        let with = QuantizationConfig::plan(format, &with).unwrap();
        with.write_linear(&mut writer, "lm_head", &matrix).unwrap();
        for (config, name) in [(&with, "config.json"), (&without, "without.json")] {
            writer.file(name, model_config(config.to_json()).to_string().as_bytes()).unwrap();
        }
        writer.finish().unwrap();
        let read = || match Checkpoint::open(&directory).unwrap().linear("lm_head", 16, 32) {
            Ok(LinearWeight::Quantized(matrix)) => Ok(matrix),
            Ok(LinearWeight::Dense(_)) => panic!("{format:?}: dense"),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(read().unwrap(), matrix);
        std::fs::rename(directory.join("without.json"), directory.join("config.json")).unwrap();
        let message = read().unwrap_err();
        assert!(message.contains("leaves it unquantized"), "{format:?}: {message}");
    }
}

#[test]
fn tensors_that_contradict_the_metadata_are_refused() {
    let gptq = Format::Gptq(GptqVersion::V1);
    let weights = |config: &mut Value, name: &str, value: Value| {
        config["config_groups"]["group_0"]["weights"][name] = value;
    };
    let compressed = Format::CompressedTensors;
    let cases = [
        (error_with(gptq, |config| config["dynamic"] = json!({ "-:x": {} })), "unquantized"),
        (error_with(gptq, |config| config["bits"] = json!(8)), "x.qweight"),
        (error_with(gptq, |config| config["group_size"] = json!(8)), "x.qzeros"),
        (error_with(Format::Awq, |config| config["modules_to_not_convert"] = json!(["x"])), "unquantized"),
        (error_with(Format::Awq, |config| config["group_size"] = json!(8)), "x.qzeros"),
        (error_with(compressed, |config| config["ignore"] = json!(["x"])), "unquantized"),
        (error_with(compressed, |config| weights(config, "num_bits", json!(8))), "x.weight_packed"),
        (error_with(compressed, |config| weights(config, "symmetric", json!(true))), "x.weight_zero_point"),
        (error_with(compressed, |config| weights(config, "group_size", json!(8))), "x.weight_scale"),
        (error_with(compressed, |config| weights(config, "actorder", json!("group"))), "x.weight_g_idx"),
    ];
    for (message, named) in cases {
        assert!(message.contains(named), "{named}: {message}");
    }
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("out");
    write(&directory, compressed, &[]);
    let message = read(&directory, 32, 16).unwrap_err();
    assert!(message.contains("x.weight_shape") && message.contains("[16, 32]"), "{message}");
}

#[test]
fn what_a_format_cannot_express_is_not_written() {
    let parts = QuantizedParts {
        out_features: 8,
        in_features: 16,
        bits: 4,
        group_size: 16,
        codes: vec![0; 128],
        scales: vec![0.5; 8],
        zero_points: vec![8; 8],
        input_permutation: None,
    };
    type Change = fn(&mut QuantizedParts);
    let cases: [(Change, ModuleSettings, &[Format], &str); 6] = [
        (|_| (), settings(8, GroupSize::PerChannel, false), &FORMATS, "of 4 bits"),
        (|_| (), settings(4, GroupSize::Inputs(8), false), &FORMATS, "groups of 16"),
        (|p| p.zero_points[3] = 7, settings(4, GroupSize::PerChannel, true), &FORMATS[..2], "asymmetric"),
        (|p| p.zero_points[3] = 16, settings(4, GroupSize::PerChannel, false), &FORMATS, "zero point of 16"),
        (
            |p| p.zero_points[3] = 0,
            settings(4, GroupSize::PerChannel, false),
            &FORMATS[..1],
            "zero point of 0",
        ),
        (|p| p.scales[3] = 0.1, settings(4, GroupSize::PerChannel, false), &FORMATS, "scale of 0.1"),
    ];
    for (change, settings, formats, named) in cases {
        let mut parts = parts.clone();
        change(&mut parts);
        let matrix = QuantizedMatrix::new(parts).unwrap();
        for &format in formats {
            // AWQ metadata cannot even say 8 bits.
            if format == Format::Awq && settings.bits != 4 {
                continue;
            }
            let config = QuantizationConfig::plan(format, &plan(settings, &[])).unwrap();
            let parent = tempfile::tempdir().unwrap();
            let mut writer = CheckpointWriter::create(&parent.path().join("out"), u64::MAX).unwrap();
            let message = config.write_linear(&mut writer, "x", &matrix).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("\"x\""), "{format:?}: {message}");
        }
    }
    for (format, bits, group_size, out, inputs) in [
        (Format::Gptq(GptqVersion::V1), 3, 16, 16, 32),
        (Format::Gptq(GptqVersion::V1), 5, 16, 32, 32),
        (Format::Awq, 8, 16, 16, 32),
        (Format::Awq, 4, 16, 12, 32),
        (Format::Awq, 4, 24, 16, 32),
        (Format::CompressedTensors, 4, 24, 16, 32),
    ] {
        let settings = settings(bits, GroupSize::Inputs(group_size), false);
        assert!(
            format.check(settings, out, inputs).is_err(),
            "{format:?} {bits} {group_size} {out} {inputs}"
        );
    }
}
