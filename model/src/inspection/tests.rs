use safetensors::Dtype;

use super::*;
use crate::checkpoint::CheckpointWriter;

/// A directory of `layers` layers with one norm and one GPTQ layer of `[16, 32]` in groups of 16 each; that of
/// layer 5 is not quantized.
fn write(directory: &Path, layers: usize) {
    let mut writer = CheckpointWriter::create(directory, u64::MAX).unwrap();
    writer.tensor("model.norm.weight", Dtype::F16, &[16], &[0; 32]).unwrap();
    for layer in 0..layers {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        writer.tensor(&name("input_layernorm.weight"), Dtype::F16, &[16], &[0; 32]).unwrap();
        if layer == 5 {
            writer.tensor(&name("mlp.up_proj.weight"), Dtype::F16, &[16, 32], &[0; 1024]).unwrap();
            continue;
        }
        writer.tensor(&name("mlp.up_proj.qweight"), Dtype::I32, &[4, 16], &[0; 256]).unwrap();
        writer.tensor(&name("mlp.up_proj.qzeros"), Dtype::I32, &[2, 2], &[0; 16]).unwrap();
        writer.tensor(&name("mlp.up_proj.scales"), Dtype::F16, &[2, 16], &[0; 64]).unwrap();
        writer.tensor(&name("mlp.up_proj.g_idx"), Dtype::I32, &[32], &[0; 128]).unwrap();
    }
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": 64,
        "quantization_config": { "quant_method": "gptq", "bits": 4, "group_size": 16 },
    });
    writer.file("config.json", config.to_string().as_bytes()).unwrap();
    writer.file("tokenizer_config.json", br#"{"chat_template": "x"}"#).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_gptq_layer_is_one_weight_and_layers_that_are_alike_are_one_kind() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    write(&directory, 12);
    let found = inspect(&directory).unwrap();
    let weight = found.weights.iter().find(|weight| weight.name == "model.layers.3.mlp.up_proj").unwrap();
    assert_eq!((weight.dtype.as_str(), weight.shape.as_slice()), ("INT4", &[16, 32][..]));
    assert_eq!((weight.bytes, weight.group_size), (256 + 16 + 64 + 128, Some(16)));
    assert!((weight.bits_per_weight - 7.25).abs() < 1e-9);
    assert_eq!(weight.short_name(), "mlp.up_proj");
    let kinds: Vec<_> = found.layers.iter().map(|kind| (kind.layers.as_slice(), kind.bytes)).collect();
    let quantized: Vec<usize> = (0..12).filter(|&layer| layer != 5).collect();
    assert_eq!(kinds, [(quantized.as_slice(), 464 + 32), (&[5][..], 1024 + 32)]);
    assert_eq!(found.parameters, 16 + 12 * (16 + 512));
    assert_eq!(found.bytes, 32 + 11 * 496 + 1056);
    assert_eq!(found.weights_of(None).count(), 1);
    assert!(found.chat_template && !found.tokenizer);
    assert_eq!(found.quantization.unwrap()["group_size"], 16);
}
