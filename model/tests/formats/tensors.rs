//! Layers that other programs packed, and what is written read back.

use std::path::Path;

use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter};
use nibble_model::formats::{Format, GptqVersion, GroupSize, ModuleSettings, QuantizationConfig};
use nibble_model::inspection::inspect;
use proptest::prelude::*;

use crate::support::{model_config, plan, read, settings};

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
            offsets: GroupOffsets::ZeroPoints(zero_points),
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
