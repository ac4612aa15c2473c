//! GPTQ checkpoints as other programs write them, quirks and contradictions included.

use std::path::Path;

use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, LinearWeight};
use safetensors::Dtype;
use serde_json::json;

fn config(bits: u32, group_size: i64, symmetric: bool, format: &str) -> Vec<u8> {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 64, "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric,
            "desc_act": false, "checkpoint_format": format,
        },
    })
    .to_string()
    .into_bytes()
}

fn read(directory: &Path, out_features: usize, in_features: usize) -> Result<QuantizedMatrix, String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    match checkpoint.linear("x", out_features, in_features).map_err(|error| error.to_string())? {
        LinearWeight::Quantized(matrix) => Ok(matrix),
        LinearWeight::Dense(_) => Err("dense".to_owned()),
    }
}

/// A layer of 16 inputs and 8 outputs in groups of 8 with `zero` in every nibble of `qzeros`: code
/// `(input + output) % 16`, scale `2^group`.
fn write_by_hand(directory: &Path, zero: u32, group_of_input: &[u32], config: &[u8]) {
    let word =
        |row: u32, output: u32| (0..8).fold(0, |word, i| word | ((8 * row + i + output) % 16) << (4 * i));
    let words: Vec<u8> =
        (0..2).flat_map(|row| (0..8).flat_map(move |output| word(row, output).to_le_bytes())).collect();
    let zeros: Vec<u8> = [zero * 0x1111_1111; 2].iter().flat_map(|word| word.to_le_bytes()).collect();
    let scales: Vec<u8> =
        [1.0f32, 2.0].iter().flat_map(|&scale| half::f16::from_f32(scale).to_le_bytes().repeat(8)).collect();
    let groups: Vec<u8> = group_of_input.iter().flat_map(|group| group.to_le_bytes()).collect();
    let mut writer = CheckpointWriter::create(directory, u64::MAX).unwrap();
    writer.tensor("x.qweight", Dtype::I32, &[2, 8], &words).unwrap();
    writer.tensor("x.qzeros", Dtype::I32, &[2, 1], &zeros).unwrap();
    writer.tensor("x.scales", Dtype::F16, &[2, 8], &scales).unwrap();
    writer.tensor("x.g_idx", Dtype::I32, &[16], &groups).unwrap();
    writer.file("config.json", config).unwrap();
    writer.finish().unwrap();
}

fn expected(group_of_input: &[u32], zero: f32) -> Vec<f32> {
    let weight = |output: usize, input: usize| {
        (((input + output) % 16) as f32 - zero) * (1 << group_of_input[input]) as f32
    };
    (0..8).flat_map(|output| (0..16).map(move |input| (output, input))).map(|(o, i)| weight(o, i)).collect()
}

#[test]
fn act_order_groups_are_read_through_g_idx() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("out");
    let groups: Vec<u32> = (0..16).map(|input| input % 2).collect();
    write_by_hand(&directory, 4, &groups, &config(4, 8, false, "gptq"));
    assert_eq!(read(&directory, 8, 16).unwrap().dequantize(), expected(&groups, 5.0));
}

#[test]
fn symmetric_zero_points_are_read_by_the_data_where_the_metadata_is_wrong() {
    let groups: Vec<u32> = (0..16).map(|input| input / 8).collect();
    for (stored, format) in [(7, "gptq"), (8, "gptq"), (7, "gptq_v2"), (8, "gptq_v2")] {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("out");
        write_by_hand(&directory, stored, &groups, &config(4, 8, true, format));
        let found = read(&directory, 8, 16).unwrap();
        assert_eq!(found.dequantize(), expected(&groups, 8.0), "{stored} {format}");
    }
}

#[test]
fn contradictions_are_refused_with_the_tensor() {
    let in_order: Vec<u32> = (0..16).map(|input| input / 8).collect();
    let unequal: Vec<u32> = (0..16).map(|input| input / 15).collect();
    for (zero, groups, config, named) in [
        (5, &in_order, config(4, 8, true, "gptq"), "x.qzeros"),
        (5, &unequal, config(4, 8, false, "gptq"), "x.g_idx"),
        (5, &in_order, config(4, 4, false, "gptq"), "x.qzeros"),
        (5, &in_order, config(8, 8, false, "gptq"), "x.qweight"),
    ] {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("out");
        write_by_hand(&directory, zero, groups, &config);
        let message = read(&directory, 8, 16).unwrap_err();
        assert!(message.contains(named), "{message}");
    }
}
