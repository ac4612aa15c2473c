use std::path::PathBuf;

use proptest::prelude::*;
use tokenizers::Tokenizer as HuggingFaceTokenizer;

use super::*;

/// A byte-level vocabulary as GPT-2, Llama 3 and Qwen have it: 256 bytes, some merges over the borders of
/// characters, a special token.
fn byte_level() -> Arc<Tokenizer> {
    let mut vocabulary: Vec<String> = Vec::new();
    for byte in 0..=u8::MAX {
        let itself = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let moved = vocabulary.iter().filter(|token| token.chars().any(|c| c as u32 >= 0x100)).count() as u32;
        let character = if itself { char::from(byte) } else { char::from_u32(0x100 + moved).unwrap() };
        vocabulary.push(character.to_string());
    }
    let of = |bytes: &[u8]| bytes.iter().map(|&byte| vocabulary[byte as usize].as_str()).collect::<String>();
    // " you", all of U+4F60, its first two bytes, the end of one crab and the beginning of the next, U+FFFD.
    let merged = [
        of(b" you"),
        of("你".as_bytes()),
        of(&[0xE4, 0xBD]),
        of(&[0xA6, 0x80, 0xF0, 0x9F]),
        of("\u{FFFD}".as_bytes()),
    ];
    vocabulary.extend(merged);
    let ids: serde_json::Map<_, _> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    tokenizer(serde_json::json!({
        "added_tokens": [special(ids.len())],
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    }))
}

/// A vocabulary as Llama 2 and Mistral have it: pieces with a mark for spaces, and bytes for the rest.
fn byte_fallback() -> Arc<Tokenizer> {
    let bytes = (0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["▁", "▁you", "you", "你", "s", "▁▁", "!", "\u{FFFD}"].map(str::to_owned);
    let ids: serde_json::Map<_, _> =
        bytes.chain(pieces).enumerate().map(|(id, token)| (token, id.into())).collect();
    tokenizer(serde_json::json!({
        "added_tokens": [special(ids.len())],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": ids, "merges": [], "byte_fallback": true},
    }))
}

fn special(id: usize) -> serde_json::Value {
    serde_json::json!({
        "id": id, "content": "<|end|>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

fn tokenizer(json: serde_json::Value) -> Arc<Tokenizer> {
    let inner = HuggingFaceTokenizer::from_bytes(json.to_string()).unwrap();
    Arc::new(Tokenizer::new(inner, PathBuf::from("tokenizer.json")))
}

/// The pieces of a stream, the last from `finish`.
fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special_tokens: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip_special_tokens);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
    pieces.push(detokenizer.finish().unwrap());
    pieces
}

fn ids_of_bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Token ids, bytes of whole characters among them so that most sequences hold some.
fn sequences(vocabulary: u32) -> impl Strategy<Value = Vec<u32>> {
    let characters = prop::sample::select(vec!["你", "🦀", "ß", "a", " ", "\u{FFFD}"]).prop_map(ids_of_bytes);
    let anything = (0..vocabulary).prop_map(|id| vec![id]);
    let named = (256..vocabulary).prop_map(|id| vec![id]);
    prop::collection::vec(prop_oneof![characters, anything, named], 0..120).prop_map(|ids| ids.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_pieces_of_byte_level_tokens_are_the_whole_decode(ids in sequences(263), skip: bool) {
        let tokenizer = byte_level();
        prop_assert_eq!(pieces(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn the_pieces_of_byte_fallback_tokens_are_the_whole_decode(ids in sequences(266), skip: bool) {
        let tokenizer = byte_fallback();
        prop_assert_eq!(pieces(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }
}

#[test]
fn a_character_comes_with_its_last_byte() {
    let pieces = pieces(&byte_level(), &ids_of_bytes("a你🦀"), true);
    assert_eq!(pieces, ["a", "", "", "你", "", "", "", "🦀", ""]);
}

#[test]
fn an_incomplete_character_is_replaced_at_the_end() {
    assert_eq!(pieces(&byte_level(), &[0xE4, 0xBD], true), ["", "", "\u{FFFD}"]);
}

#[test]
fn special_tokens_are_left_out_or_kept_as_asked() {
    let tokenizer = byte_level();
    let ids = [0xE4, 0xBD, 261, 0xA0];
    assert_eq!(pieces(&tokenizer, &ids, true), ["", "", "", "你", ""]);
    assert_eq!(pieces(&tokenizer, &ids, false).concat(), "\u{FFFD}<|end|>\u{FFFD}");
}

#[test]
fn an_id_that_the_vocabulary_lacks_does_not_end_a_run_of_bytes() {
    let tokenizer = byte_fallback();
    let ids = [0xE4, 0xBD, 0xA0, 999, 0x80];
    assert_eq!(pieces(&tokenizer, &ids, false), ["", "", "", "", "", "\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}"]);
}

#[test]
fn a_space_is_dropped_at_the_beginning_of_a_text_only() {
    assert_eq!(pieces(&byte_fallback(), &[257, 257, 260], true), ["you", " you", "s", ""]);
}

#[test]
fn a_long_run_of_broken_characters_keeps_the_window_short() {
    let mut detokenizer = Detokenizer::new(byte_level(), true);
    let mut text = String::new();
    for _ in 0..10_000 {
        text += &detokenizer.push(0xE4).unwrap();
        assert!(detokenizer.window.len() <= LONG_WINDOW);
    }
    text += &detokenizer.finish().unwrap();
    assert_eq!(text, "\u{FFFD}".repeat(10_000));
}

#[test]
fn the_bytes_of_a_token_are_the_true_ones() {
    let byte_level = byte_level();
    for byte in 0..=u8::MAX {
        assert_eq!(byte_level.token_bytes(u32::from(byte)), [byte]);
    }
    assert_eq!(byte_level.token_bytes(256), b" you");
    assert_eq!(byte_level.token_bytes(258), [0xE4, 0xBD]);
    assert_eq!(byte_level.token_bytes(261), b"<|end|>");
    assert_eq!(byte_level.token_bytes(999), b"");
    assert_eq!(byte_fallback().token_bytes(0xE4), [0xE4]);
    assert_eq!(byte_fallback().token_bytes(258), b"you");
}
