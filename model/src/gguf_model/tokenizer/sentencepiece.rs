//! SentencePiece BPE: `tokenizer.ggml.model` is `llama`.
//!
//! A space is written `▁`, and one is put before a text unless the file says otherwise. The pieces of two
//! neighbours are joined, best score first, as long as the joined one is in the vocabulary; what no piece covers
//! is written as bytes, `<0x00>` to `<0xFF>`.
//!
//! tokenizer.json wants merges by rank. They follow from the scores: every way to cut a piece into two others is
//! a merge of the piece's score; among equals the longer left part comes first, then the longer right part, then
//! the lower ids (`generate_merges` of transformers).

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::{Pipeline, TokenType, Vocabulary};
use crate::error::CheckpointError;

const SCORES: &str = "tokenizer.ggml.scores";
const SPACE: &str = "▁";

pub(super) fn pipeline(vocabulary: &Vocabulary<'_>) -> Result<Pipeline, CheckpointError> {
    let gguf = vocabulary.gguf;
    let bytes = (0..=255u8).find(|byte| !vocabulary.tokens.contains(&format!("<0x{byte:02X}>")));
    if let Some(byte) = bytes {
        let expected = "the tokens <0x00> to <0xFF>, to fall back to";
        return Err(gguf.mismatch("tokenizer.ggml.tokens", format!("without <0x{byte:02X}>"), expected));
    }
    let add_space = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace =
        |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let to_marks = replace(" ", SPACE);
    let mut decoders =
        vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    let normalizer = if add_space {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        let prepend = json!({ "type": "Prepend", "prepend": SPACE });
        json!({ "type": "Sequence", "normalizers": [prepend, to_marks] })
    } else {
        to_marks
    };
    Ok(Pipeline {
        normalizer,
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        post_processor: None,
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": vocabulary.text(vocabulary.special.unknown),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids()?,
            "merges": merges(vocabulary)?,
        }),
    })
}

/// The merges that the scores imply, best first.
fn merges<'a>(vocabulary: &Vocabulary<'a>) -> Result<Vec<[&'a str; 2]>, CheckpointError> {
    let gguf = vocabulary.gguf;
    let scores =
        gguf.floats(SCORES)?.ok_or_else(|| gguf.mismatch(SCORES, "missing", "a score for each token"))?;
    if scores.len() != vocabulary.tokens.len() {
        let found = format!("an array of {}", scores.len());
        return Err(gguf.mismatch(
            SCORES,
            found,
            format!("one for each of {} tokens", vocabulary.tokens.len()),
        ));
    }
    // Only pieces take part: a text never contains the others, which are matched whole before.
    let pieces: std::collections::HashMap<&str, u32> = vocabulary
        .used()
        .filter(|&(.., kind)| kind == TokenType::Normal)
        .map(|(token, id, _)| (token, id))
        .collect();
    let mut merges = Vec::new();
    for (token, id, _) in vocabulary.used().filter(|&(.., kind)| kind == TokenType::Normal) {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (pieces.get(left), pieces.get(right)) {
                merges.push(Merge { score: scores[id as usize], left, right, left_id, right_id, id });
            }
        }
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.rank().cmp(&b.rank())));
    Ok(merges.into_iter().map(|merge| [merge.left, merge.right]).collect())
}

struct Merge<'a> {
    score: f64,
    left: &'a str,
    right: &'a str,
    left_id: u32,
    right_id: u32,
    id: u32,
}

impl Merge<'_> {
    /// The order among merges of one score.
    fn rank(&self) -> impl Ord {
        let lengths = (Reverse(self.left.chars().count()), Reverse(self.right.chars().count()));
        (lengths, self.id, self.left_id, self.right_id)
    }
}
