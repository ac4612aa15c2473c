//! GGUF files opened as they are: the same model as the directory that an import makes of them, with its codes kept.

mod common;

use std::path::{Path, PathBuf};

use common::{Gguf, Tensor, tiny_model};
use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::Cpu;
use nibble_kernels::tensor::FloatType;
use nibble_model::chat_template::ChatInputs;
use nibble_model::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES, LinearWeight};
use nibble_model::forward::{Batch, LinearRole, Model, embed, streamed_logits};
use nibble_model::gguf::BlockType;
use nibble_model::import::{ImportOptions, import};
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

const HIDDEN: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 2;
const VOCABULARY: usize = 6;
const TOKENS: [u32; 9] = [1, 2, 3, 4, 5, 3, 1, 0, 2];

/// The linear layers of the file, with their outputs.
const LINEAR: [(&str, usize); 7] = [
    ("attn_q", HIDDEN),
    ("attn_k", HIDDEN / 2),
    ("attn_v", HIDDEN / 2),
    ("attn_output", HIDDEN),
    ("ffn_gate", HIDDEN),
    ("ffn_up", HIDDEN),
    ("ffn_down", HIDDEN),
];

/// Where a block has F16 numbers, in bytes from its start, each about as large as makes weights of the same size.
fn halves(block: BlockType) -> &'static [(usize, f32)] {
    match block {
        BlockType::F32 | BlockType::F16 | BlockType::BF16 => &[],
        BlockType::Q4_0 => &[(0, 0.01)],
        BlockType::Q4_1 => &[(0, 0.01), (2, -0.07)],
        BlockType::Q5_0 => &[(0, 0.005)],
        BlockType::Q5_1 => &[(0, 0.005), (2, -0.08)],
        BlockType::Q8_0 => &[(0, 0.0006)],
        BlockType::Q2_K => &[(80, 0.004), (82, 0.005)],
        BlockType::Q3_K => &[(108, 0.0007)],
        BlockType::Q4_K => &[(0, 0.0003), (2, 0.002)],
        BlockType::Q5_K => &[(0, 0.00015), (2, 0.002)],
        BlockType::Q6_K => &[(208, 0.00003)],
    }
}

/// A tensor of random blocks: every code and every small scale occurs.
fn tensor(name: &str, block: BlockType, rows: usize, width: usize, seed: u64) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let blocks = rows * width / block.elements();
    let mut data = Vec::with_capacity(blocks * block.bytes());
    for _ in 0..blocks {
        let mut bytes: Vec<u8> = (0..block.bytes()).map(|_| next() as u8).collect();
        let value = (next() % 2001) as f32 / 10_000.0 - 0.1;
        match block {
            BlockType::F32 => bytes = value.to_le_bytes().to_vec(),
            BlockType::F16 => bytes = half::f16::from_f32(value).to_le_bytes().to_vec(),
            BlockType::BF16 => bytes = half::bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => {}
        }
        for &(at, size) in halves(block) {
            let number = half::f16::from_f32(size * (1.0 + value));
            bytes[at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
        data.extend(bytes);
    }
    Tensor { name: name.to_owned(), shape: vec![rows, width], kind: block.number(), data }
}

/// A model whose linear layers have every type in turn, and whose embedding and tied output head are of type `table`.
fn every_type(table: BlockType) -> Gguf {
    let mut gguf = tiny_model::without_weights(HIDDEN, HEADS, KV_HEADS, LAYERS);
    gguf.tensors.push(tensor("token_embd.weight", table, VOCABULARY, HIDDEN, 99));
    gguf.floats("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    let mut types = BlockType::ALL.into_iter().cycle();
    for layer in 0..LAYERS {
        for norm in ["attn_norm", "ffn_norm"] {
            gguf.floats(&format!("blk.{layer}.{norm}.weight"), &[HIDDEN], &[1.0; HIDDEN]);
        }
        for (index, (name, outputs)) in LINEAR.into_iter().enumerate() {
            let block = types.next().unwrap();
            let name = format!("blk.{layer}.{name}.weight");
            gguf.tensors.push(tensor(&name, block, outputs, HIDDEN, (7 * layer + index) as u64));
        }
    }
    gguf
}

/// Writes `gguf` and opens it.
fn open(gguf: &Gguf) -> (TempDir, PathBuf, Result<Checkpoint, String>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    gguf.write(&path);
    let checkpoint = Checkpoint::open(&path).map_err(|error| error.to_string());
    (directory, path, checkpoint)
}

/// What an import makes of the file at `path`, in F32: every value exactly.
fn imported(path: &Path) -> Checkpoint {
    let out = path.with_file_name("imported");
    let options = ImportOptions { float_type: FloatType::F32, max_shard_bytes: DEFAULT_SHARD_BYTES };
    import(path, &out, options, &mut |_| {}).unwrap();
    Checkpoint::open(&out).unwrap()
}

#[test]
fn every_weight_has_the_bits_that_an_import_gives_it_and_quantized_ones_keep_their_codes() {
    let (_directory, path, checkpoint) = open(&every_type(BlockType::Q6_K));
    let (checkpoint, imported) = (checkpoint.unwrap(), imported(&path));
    let mut quantized = 0;
    let tied = [("model.embed_tokens.weight".to_owned(), VOCABULARY)];
    let layers =
        (0..LAYERS).flat_map(|layer| LinearRole::ALL.map(|role| role.spec(checkpoint.config(), layer)));
    for (name, outputs) in layers.map(|spec| (spec.weight_name(), spec.out_features)).chain(tied) {
        let expected = imported.dense(&name, outputs, HIDDEN).unwrap().values().to_f32();
        let found = match checkpoint.weight(&name, outputs, HIDDEN).unwrap() {
            LinearWeight::Dense(matrix) => matrix.values().to_f32(),
            LinearWeight::Quantized(matrix) => {
                quantized += 1;
                assert!(matrix.bits() <= 8 && matrix.group_size() <= 32);
                matrix.dequantize()
            }
        };
        assert_eq!(found, expected, "{name}");
        assert_eq!(checkpoint.dense(&name, outputs, HIDDEN).unwrap().values().to_f32(), expected, "{name}");
    }
    // All linear layers but F32, F16 and BF16, F32 a second time, and the embedding.
    assert_eq!(quantized, LAYERS * LINEAR.len() - 4 + 1);
    let norm = "model.layers.1.input_layernorm.weight";
    assert_eq!(checkpoint.vector(norm, HIDDEN).unwrap(), imported.vector(norm, HIDDEN).unwrap());
    let vectors = embed(&checkpoint, &TOKENS).unwrap();
    assert_eq!(vectors, embed(&imported, &TOKENS).unwrap());
    assert!(embed(&checkpoint, &[VOCABULARY as u32]).is_err());
}

#[test]
fn config_tokenizer_and_chat_template_are_those_of_an_import() {
    let mut gguf = every_type(BlockType::Q8_0);
    gguf.set("tokenizer.chat_template", "{{ messages[0].content }}{{ eos_token }}".into());
    let (_directory, path, checkpoint) = open(&gguf);
    let (checkpoint, imported) = (checkpoint.unwrap(), imported(&path));
    let mut config = imported.config().clone();
    config.float_type = FloatType::F16;
    assert_eq!(*checkpoint.config(), config);
    assert!(checkpoint.is_gguf() && checkpoint.path() == path);
    assert_eq!(checkpoint.generation_config().unwrap(), imported.generation_config().unwrap());
    let text = "ab<tool> b<|end|>";
    let tokens = checkpoint.tokenizer().unwrap().encode(text, true).unwrap();
    assert_eq!(tokens, imported.tokenizer().unwrap().encode(text, true).unwrap());
    assert_eq!(tokens, [3, 5, 4, 2, 0]);
    let render = |checkpoint: &Checkpoint| {
        let messages = vec![json!({"role": "user", "content": "a"})];
        let template = checkpoint.chat_template().unwrap().expect("it has one");
        template.render(&ChatInputs { messages, ..ChatInputs::default() }).unwrap()
    };
    assert_eq!(render(&checkpoint), "a<|end|>");
    assert_eq!(render(&imported), "a<|end|>");
    gguf.remove("tokenizer.chat_template");
    assert!(open(&gguf).2.unwrap().chat_template().unwrap().is_none());
}

fn load(checkpoint: &Checkpoint, activations: Activations) -> Model<Cpu> {
    Model::load(Cpu::new(2).with_activations(activations), checkpoint, 32).unwrap()
}

fn logits(model: &mut Model<Cpu>) -> Vec<f32> {
    let mut cache = model.kv_cache(1).unwrap();
    model.forward(&Batch::single(&TOKENS, 0, vec![0]), &mut cache).unwrap().values
}

#[test]
fn logits_are_those_of_the_imported_model() {
    for table in [BlockType::Q6_K, BlockType::Q4_1, BlockType::F16] {
        let (_directory, path, checkpoint) = open(&every_type(table));
        let (checkpoint, imported) = (checkpoint.unwrap(), imported(&path));
        let found = logits(&mut load(&checkpoint, Activations::Float));
        let expected = logits(&mut load(&imported, Activations::Float));
        let largest = expected.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            // Sums of the same terms in another order of rounding.
            assert!((found - expected).abs() < 1e-5 * largest, "{}: {found} {expected}", table.name());
        }
        let streamed = streamed_logits(Cpu::new(2), &checkpoint, &TOKENS).unwrap();
        assert_eq!(streamed.values, found);
        let rounded = logits(&mut load(&checkpoint, Activations::Integer));
        let off = rounded.iter().zip(&found).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off > 0.0 && off < 0.1 * largest, "{}: {off} of {largest}", table.name());
    }
}

#[test]
fn a_sequence_has_the_same_logits_alone_in_chunks_and_in_a_batch() {
    let (_directory, _, checkpoint) = open(&every_type(BlockType::Q8_0));
    let checkpoint = checkpoint.unwrap();
    for activations in [Activations::Float, Activations::Integer] {
        let mut model = load(&checkpoint, activations);
        let alone = logits(&mut model);
        let mut cache = model.kv_cache(3).unwrap();
        let mut in_chunks = Vec::new();
        for (index, chunk) in TOKENS.chunks(4).enumerate() {
            in_chunks
                .extend(model.forward(&Batch::single(chunk, 4 * index, vec![2]), &mut cache).unwrap().values);
        }
        assert_eq!(in_chunks, alone, "{activations:?}");
        let mut batch = Batch::single(&TOKENS[..5], 0, vec![0]);
        let mut second = Batch::single(&TOKENS, 0, vec![1]);
        second.sequences[0].first_row = 5;
        batch.token_ids.append(&mut second.token_ids);
        batch.positions.append(&mut second.positions);
        batch.sequences.append(&mut second.sequences);
        batch.logit_rows = (5..14).collect();
        assert_eq!(model.forward(&batch, &mut cache).unwrap().values, alone, "{activations:?}");
    }
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let damaged = |block: BlockType, change: &dyn Fn(&mut Tensor)| {
        let mut gguf = every_type(block);
        change(gguf.tensor("blk.0.attn_output.weight"));
        match open(&gguf).2 {
            Err(error) => error,
            Ok(checkpoint) => match Model::load(Cpu::new(1), &checkpoint, 32) {
                Err(error) => error.to_string(),
                Ok(_) => panic!("it was loaded"),
            },
        }
    };
    // F16 infinity as the scale of the first block: the layer's type is Q4_0.
    let error = damaged(BlockType::Q8_0, &|tensor| tensor.data[1] = 0x7c);
    assert!(error.contains("blk.0.attn_output.weight") && error.contains("finite"), "{error}");
    let error = damaged(BlockType::Q8_0, &|tensor| tensor.kind = 20);
    assert!(error.contains("blk.0.attn_output.weight") && error.contains("IQ4_NL"), "{error}");
    let error = damaged(BlockType::Q8_0, &|tensor| tensor.name = "blk.0.other.weight".to_owned());
    assert!(error.contains("blk.0.attn_output.weight") && error.contains("missing"), "{error}");
    let mut gguf = every_type(BlockType::Q8_0);
    gguf.set("split.count", common::Value::U32(2));
    let error = open(&gguf).2.err().expect("one part of two is refused");
    assert!(error.contains("split.count") && error.contains("--merge"), "{error}");
    let checkpoint = open(&every_type(BlockType::Q8_0)).2.unwrap();
    let error = checkpoint.raw("model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("nibble import"), "{error}");
    assert_eq!(checkpoint.tensors().count(), 0);
    assert!(checkpoint.weight_bytes() > 0 && checkpoint.has("model.norm.weight"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_file_with_damaged_bytes_is_refused_or_run_without_a_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        header in any::<bool>(),
    ) {
        let mut bytes = every_type(BlockType::Q4_0).bytes();
        // Most of the file is codes; the header is what decides.
        let length = if header { 3000 } else { bytes.len() };
        for (index, byte) in damage {
            bytes[index.index(length)] = byte;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            drop((checkpoint.tokenizer(), checkpoint.chat_template()));
            // A context of any length is allowed; what is loaded here is 32 positions.
            drop(Model::load(Cpu::new(1), &checkpoint, 32));
        }
    }
}
