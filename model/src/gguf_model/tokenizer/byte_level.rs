//! Byte-level BPE: `tokenizer.ggml.model` is `gpt2`.
//!
//! A text is cut into words by a regular expression, each word's bytes are written as printable characters, and
//! merges join them by rank. `tokenizer.ggml.pre` names the cutting; here it becomes what the tokenizer.json of
//! the model that llama.cpp took the name from says (its own regular expressions are re-written for its own engine).
//!
//! | `pre` | of | cutting |
//! |---|---|---|
//! | `smollm` | SmolLM, SmolLM2 | single digits, then GPT-2's |
//! | `gpt-2`, `default` | GPT-2 | GPT-2's |
//! | `qwen2`, `deepseek-r1-qwen` | Qwen2 to Qwen3, R1 distilled to them | contractions, words, single digits; NFC before |
//! | `llama-bpe`, `llama3`, `llama-v3` | Llama 3 | the same with up to three digits; whole words before merges |
//! | `tekken` | Mistral Nemo and later | words also cut where case changes; whole words before merges |
//!
//! Others, and none, are refused: a wrong cutting gives plausible tokens and a worse model.

use serde_json::{Value, json};

use super::{Pipeline, Vocabulary};
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a text is cut into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    Gpt2,
    SmolLm,
    Qwen2,
    Llama3,
    Tekken,
}

impl PreTokenizer {
    pub(super) fn read(gguf: &GgufFile) -> Result<Self, CheckpointError> {
        const SUPPORTED: &str =
            "smollm, gpt-2, default, qwen2, deepseek-r1-qwen, llama-bpe, llama3, llama-v3, tekken";
        match gguf.string(PRE)? {
            Some("gpt-2" | "default") => Ok(Self::Gpt2),
            Some("smollm") => Ok(Self::SmolLm),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some("tekken") => Ok(Self::Tekken),
            Some(other) => Err(gguf.unsupported(PRE, format!("\"{other}\""), SUPPORTED)),
            None => Err(gguf.mismatch(PRE, "missing", format!("one of {SUPPORTED}"))),
        }
    }

    /// Whether texts begin with the beginning-of-sequence token when the file does not say.
    pub(super) fn add_bos(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether a word that is a token by itself is one without merging.
    fn ignores_merges(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    fn normalizer(self) -> Value {
        match self {
            Self::Qwen2 => json!({ "type": "NFC" }),
            Self::Gpt2 | Self::SmolLm | Self::Llama3 | Self::Tekken => Value::Null,
        }
    }

    fn json(self) -> Value {
        let split = |pattern: &str| {
            let regex = json!({ "Regex": pattern });
            let split = json!({ "type": "Split", "pattern": regex, "behavior": "Isolated", "invert": false });
            json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] })
        };
        match self {
            Self::Gpt2 => byte_level(true),
            Self::SmolLm => {
                let digits = json!({ "type": "Digits", "individual_digits": true });
                json!({ "type": "Sequence", "pretokenizers": [digits, byte_level(true)] })
            }
            Self::Qwen2 => split(QWEN2),
            Self::Llama3 => split(LLAMA3),
            Self::Tekken => split(TEKKEN),
        }
    }
}

/// The byte-level step; `use_regex` cuts by GPT-2's regular expression first.
fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

pub(super) fn pipeline(
    vocabulary: &Vocabulary<'_>,
    pre_tokenizer: PreTokenizer,
) -> Result<Pipeline, CheckpointError> {
    let ids = vocabulary.ids()?;
    let merges = merges(vocabulary.gguf)?;
    let known = |token: &str| ids.contains_key(token);
    let broken = merges
        .iter()
        .find(|[left, right]| !(known(left) && known(right) && known(&format!("{left}{right}"))));
    if let Some([left, right]) = broken {
        let found = format!("joining {left:?} and {right:?}");
        return Err(vocabulary.gguf.mismatch(MERGES, found, "tokens of the vocabulary that give one"));
    }
    Ok(Pipeline {
        normalizer: pre_tokenizer.normalizer(),
        pre_tokenizer: pre_tokenizer.json(),
        decoder: byte_level(true),
        post_processor: Some(json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
        })),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre_tokenizer.ignores_merges(),
            "vocab": ids,
            "merges": merges,
        }),
    })
}

/// The merges of the file, best first: `left right` with one space, since spaces are written as `Ġ`.
fn merges(gguf: &GgufFile) -> Result<Vec<[&str; 2]>, CheckpointError> {
    let lines =
        gguf.strings(MERGES)?.ok_or_else(|| gguf.mismatch(MERGES, "missing", "an array of strings"))?;
    lines
        .iter()
        .map(|line| match line.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                Ok([left, right])
            }
            _ => Err(gguf.mismatch(MERGES, format!("holding {line:?}"), "two tokens with a space between")),
        })
        .collect()
}
