//! Which settings `quantization_config` gives a module, and which ones are refused.

use std::collections::BTreeMap;

use nibble_model::formats::{
    ActivationOrder, Format, GptqVersion, GroupSize, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use serde_json::{Value, json};

use crate::support::{FORMATS, parse, plan, settings};

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
    let golden: Value = serde_json::from_str(include_str!("../golden/quantization_schemes.json")).unwrap();
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
