//! Tensors that are missing, there twice or not what the metadata say; matrices that a format cannot express.

use std::path::Path;

use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, LinearWeight};
use nibble_model::formats::{
    Format, GptqVersion, GroupSize, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{FORMATS, model_config, plan, read, settings};

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
        offsets: GroupOffsets::ZeroPoints(vec![7; 32]),
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
        offsets: GroupOffsets::ZeroPoints(vec![7; 32]),
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
        offsets: GroupOffsets::ZeroPoints(vec![8; 8]),
        input_permutation: None,
    };
    fn zero(parts: &mut QuantizedParts, zero: u8) {
        parts.offsets = GroupOffsets::ZeroPoints(vec![8, 8, 8, zero, 8, 8, 8, 8]);
    }
    type Change = fn(&mut QuantizedParts);
    let cases: [(Change, ModuleSettings, &[Format], &str); 7] = [
        (|_| (), settings(8, GroupSize::PerChannel, false), &FORMATS, "of 4 bits"),
        (|_| (), settings(4, GroupSize::Inputs(8), false), &FORMATS, "groups of 16"),
        (|p| zero(p, 7), settings(4, GroupSize::PerChannel, true), &FORMATS[..2], "asymmetric"),
        (|p| zero(p, 16), settings(4, GroupSize::PerChannel, false), &FORMATS, "zero point of 16"),
        (|p| zero(p, 0), settings(4, GroupSize::PerChannel, false), &FORMATS[..1], "zero point of 0"),
        (
            |p| p.offsets = GroupOffsets::Minimums(vec![-1.0; 8]),
            settings(4, GroupSize::PerChannel, false),
            &FORMATS,
            "with minimums",
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
