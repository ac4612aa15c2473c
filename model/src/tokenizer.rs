//! Text to token ids and back, by the tokenizer.json of a model directory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer as HuggingFaceTokenizer;

use crate::config::ModelConfig;
use crate::error::CheckpointError;

/// The tokenizer of a model.
pub struct Tokenizer {
    inner: HuggingFaceTokenizer,
    special_ids: HashSet<u32>,
    byte_spelling: ByteSpelling,
    file: PathBuf,
}

/// What stands for a space in the tokens of SentencePiece, where byte fallback comes from.
const SENTENCEPIECE_SPACE: char = '\u{2581}';

/// How the tokens of a vocabulary spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByteSpelling {
    /// GPT-2's alphabet: each character of a token stands for one byte.
    ByteLevel,
    /// Tokens `<0x00>` to `<0xFF>` stand for what has no token of its own.
    Fallback,
    /// Tokens are text.
    None,
}

impl ByteSpelling {
    fn of(tokenizer: &HuggingFaceTokenizer) -> Self {
        // The kinds of a sequence of decoders are private: the file's own form names them.
        let decoder = tokenizer.get_decoder().and_then(|decoder| serde_json::to_string(decoder).ok());
        match decoder {
            Some(decoder) if decoder.contains("\"ByteFallback\"") => Self::Fallback,
            Some(decoder) if decoder.contains("\"ByteLevel\"") => Self::ByteLevel,
            _ => Self::None,
        }
    }
}

impl Tokenizer {
    /// Opens tokenizer.json of `directory`.
    ///
    /// # Errors
    /// When it is missing or malformed, or gives ids that the model `config` has no embedding for.
    pub fn open(directory: &Path, config: &ModelConfig) -> Result<Self, CheckpointError> {
        let file = directory.join("tokenizer.json");
        let text = std::fs::read(&file).map_err(CheckpointError::io("read", &file))?;
        let inner = HuggingFaceTokenizer::from_bytes(&text).map_err(|error| {
            CheckpointError::malformed(&file, error, "fetch the model again or import it again")
        })?;
        let largest = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id);
        if let Some((token, id)) = largest.filter(|&(_, id)| id as usize >= config.vocabulary_size) {
            let size = config.vocabulary_size;
            return Err(CheckpointError::Mismatch {
                file,
                item: format!("token {token:?}"),
                found: format!("id {id}"),
                expected: format!("an id below the model's vocab_size {size}"),
                help: "the tokenizer belongs to another model".to_owned(),
            });
        }
        Ok(Self::new(inner, file))
    }

    pub(crate) fn new(inner: HuggingFaceTokenizer, file: PathBuf) -> Self {
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let byte_spelling = ByteSpelling::of(&inner);
        Self { inner, special_ids, byte_spelling, file }
    }

    /// The tokens of `text`, with the special tokens the model expects around it or without.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, CheckpointError> {
        match self.inner.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(self.failed("encode a text", &error)),
        }
    }

    /// The text of `ids`, with special tokens or without.
    ///
    /// # Errors
    /// When the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, CheckpointError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| self.failed("decode tokens", &error))
    }

    /// The bytes that a token stands for, which may be a part of a character; a special token's are its name.
    /// Empty for an id that the vocabulary does not have.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        let decoded = || self.decode(&[id], false).unwrap_or_default().into_bytes();
        match self.byte_spelling {
            ByteSpelling::ByteLevel => token
                .chars()
                .map(byte_of_character)
                .collect::<Option<_>>()
                .unwrap_or_else(|| token.into_bytes()),
            // Decoded alone, a token would lose the space before it.
            ByteSpelling::Fallback => byte_of_token(&token)
                .map_or_else(|| token.replace(SENTENCEPIECE_SPACE, " ").into_bytes(), |byte| vec![byte]),
            ByteSpelling::None => decoded(),
        }
    }

    /// Whether `id` is a special token, which is no part of a text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether [`Tokenizer::decode`] leaves `id` out: a special token, or an id that the vocabulary does not
    /// have.
    pub(crate) fn leaves_out(&self, id: u32, skip_special_tokens: bool) -> bool {
        (skip_special_tokens && self.special_ids.contains(&id)) || self.inner.id_to_token(id).is_none()
    }

    /// Whether `id` stands for a single byte that is decoded together with its neighbours.
    pub(crate) fn is_byte_token(&self, id: u32) -> bool {
        self.byte_spelling == ByteSpelling::Fallback
            && self.inner.id_to_token(id).is_some_and(|token| byte_of_token(&token).is_some())
    }

    fn failed(&self, what: &str, error: &tokenizers::Error) -> CheckpointError {
        let problem = format!("the tokenizer cannot {what}: {error}");
        CheckpointError::malformed(&self.file, problem, "fetch the model again or import it again")
    }
}

/// The byte that a token `<0xE4>` stands for.
fn byte_of_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, the other
/// bytes are numbered from U+0100 on.
fn byte_of_character(character: char) -> Option<u8> {
    let stands_for_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(character) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|&byte| stands_for_itself(byte)),
        code => (0..=u8::MAX).filter(|&byte| !stands_for_itself(byte)).nth((code - 0x100) as usize),
    }
}
