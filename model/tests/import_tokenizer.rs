//! Imported tokenizers against other implementations: token ids of tricky texts, by golden/tokenizer_ids.py.

mod common;

use common::{Gguf, Value, tiny_model};
use nibble_kernels::tensor::FloatType;
use nibble_model::checkpoint::{Checkpoint, DEFAULT_SHARD_BYTES};
use nibble_model::import::{ImportOptions, import};
use nibble_model::tokenizer::Tokenizer;
use serde_json::Value as Json;

fn golden() -> Json {
    serde_json::from_str(include_str!("golden/tokenizer_ids.json")).unwrap()
}

fn list<T>(json: &Json, item: impl Fn(&Json) -> Option<T>) -> Vec<T> {
    json.as_array().unwrap().iter().map(|value| item(value).unwrap()).collect()
}

fn strings(json: &Json) -> Vec<String> {
    list(json, |value| value.as_str().map(str::to_owned))
}

fn ids(json: &Json) -> Vec<u32> {
    list(json, |value| value.as_u64().map(|id| id as u32))
}

/// A tiny model with the tokens and types of `vocabulary`.
fn model(vocabulary: &Json) -> Gguf {
    let tokens = strings(&vocabulary["tokens"]);
    let mut gguf = tiny_model::model("llama");
    let embedding = gguf.tensor("token_embd.weight");
    embedding.shape[0] = tokens.len();
    embedding.data = vec![0; tokens.len() * tiny_model::HIDDEN * 4];
    gguf.set("tokenizer.ggml.tokens", Value::Strings(tokens));
    let types = list(&vocabulary["types"], |value| value.as_i64().map(|number| number as i32));
    gguf.set("tokenizer.ggml.token_type", Value::I32s(types));
    gguf
}

/// The tokenizer that `gguf` imports to.
fn tokenizer(gguf: &Gguf) -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    let (source, out) = (directory.path().join("model.gguf"), directory.path().join("out"));
    gguf.write(&source);
    let options = ImportOptions { float_type: FloatType::F16, max_shard_bytes: DEFAULT_SHARD_BYTES };
    import(&source, &out, options, &mut |_| {}).unwrap();
    Tokenizer::open(&out, Checkpoint::open(&out).unwrap().config()).unwrap()
}

#[test]
fn byte_level_tokenizers_give_the_ids_of_plain_python() {
    let golden = golden();
    let vocabulary = &golden["byte_level"];
    let mut gguf = model(vocabulary);
    gguf.set("tokenizer.ggml.merges", Value::Strings(strings(&vocabulary["merges"])));
    for (pre, expected) in vocabulary["ids"].as_object().unwrap() {
        gguf.set("tokenizer.ggml.pre", pre.as_str().into());
        let tokenizer = tokenizer(&gguf);
        for (text, expected) in strings(&golden["texts"]).iter().zip(expected.as_array().unwrap()) {
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(expected), "{pre}: {text:?}");
            // Qwen2 writes é as one character.
            if pre != "qwen2" {
                assert_eq!(tokenizer.decode(&found, false).unwrap(), *text, "{pre}");
            }
        }
    }
}

#[test]
fn sentencepiece_tokenizers_give_the_ids_of_sentencepiece() {
    let golden = golden();
    for vocabulary in golden["sentencepiece"].as_array().unwrap() {
        let add_space = vocabulary["add_space_prefix"].as_bool().unwrap();
        let mut gguf = model(vocabulary);
        gguf.set("tokenizer.ggml.model", "llama".into());
        gguf.set("tokenizer.ggml.add_space_prefix", Value::Bool(add_space));
        gguf.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
        let scores = list(&vocabulary["scores"], |value| value.as_f64().map(|score| score as f32));
        gguf.set("tokenizer.ggml.scores", Value::F32s(scores));
        let tokenizer = tokenizer(&gguf);
        let expected = vocabulary["ids"].as_array().unwrap();
        for (text, expected) in
            strings(&golden["texts"]).iter().zip(expected).filter(|(_, ids)| !ids.is_null())
        {
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(expected), "prefix {add_space}: {text:?}");
            assert_eq!(tokenizer.decode(&found, false).unwrap(), *text, "prefix {add_space}");
        }
    }
}

#[test]
fn special_tokens_around_a_text_are_those_of_the_file_or_of_its_kind() {
    let golden = golden();
    let mut gguf = model(&golden["byte_level"]);
    gguf.set("tokenizer.ggml.merges", Value::Strings(strings(&golden["byte_level"]["merges"])));
    gguf.set("tokenizer.ggml.bos_token_id", Value::U32(0));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(1));
    let around = |gguf: &Gguf| {
        let ids = tokenizer(gguf).encode("a", true).unwrap();
        (ids.first() == Some(&0), ids.last() == Some(&1))
    };
    for (pre, by_kind) in [("qwen2", false), ("llama-bpe", true), ("tekken", true)] {
        gguf.set("tokenizer.ggml.pre", pre.into());
        assert_eq!(around(&gguf), (by_kind, false), "{pre}");
    }
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    gguf.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    assert_eq!(around(&gguf), (false, true));
}
