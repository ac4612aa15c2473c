//! The tokenizer, from the vocabulary in a GGUF file to tokenizer.json and tokenizer_config.json, which need not be
//! written anywhere.
//!
//! `tokenizer.ggml.model` says which kind: `gpt2` is byte-level BPE ([`byte_level`]), `llama` is SentencePiece BPE
//! with bytes to fall back to ([`sentencepiece`]). Token types become added tokens: control and unknown ones
//! special, user-defined ones not; both are matched whole in a text. Others are refused by name.
//!
//! tokenizer_config.json names the class `PreTrainedTokenizerFast`, which does as tokenizer.json says. The chat
//! template is in it and in chat_template.jinja: transformers before 4.43 reads only the one, from 5 on writes
//! only the other.

mod byte_level;
mod sentencepiece;

use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::gguf::GgufFile;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MODEL: &str = "tokenizer.ggml.model";

/// Control tokens that end a turn by their text: metadata have room for one or two, models often have more. Of
/// llama.cpp's list (`llama_vocab::impl::load`, `special_eog_ids`), what its architectures here use.
const END_OF_GENERATION: [&str; 9] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
];

/// The tokenizer.
pub(crate) struct GgufTokenizer {
    /// tokenizer.json.
    pub(crate) json: Value,
    /// What it describes.
    pub(crate) inner: tokenizers::Tokenizer,
}

/// The token ids that a config names.
pub(super) struct TokenIds {
    /// Beginning of sequence.
    pub(super) bos: Option<u32>,
    /// Ends of a generation; that of the metadata first.
    pub(super) eos: Vec<u32>,
    /// Padding.
    pub(super) pad: Option<u32>,
}

/// The kinds of tokenizers.
enum Kind {
    ByteLevel(byte_level::PreTokenizer),
    SentencePiece,
}

/// ggml's token types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// A vocabulary as the file has it.
struct Vocabulary<'a> {
    gguf: &'a GgufFile,
    tokens: &'a [String],
    types: Vec<TokenType>,
    special: SpecialTokens,
}

/// The tokens with a role.
struct SpecialTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
    add_eos: bool,
}

/// The chat template of the model, if it has one.
pub(super) fn chat_template(gguf: &GgufFile) -> Result<Option<&str>, CheckpointError> {
    gguf.string("tokenizer.chat_template")
}

/// Reads the token ids of the model `config`, which has none yet.
pub(super) fn token_ids(gguf: &GgufFile, config: &ModelConfig) -> Result<TokenIds, CheckpointError> {
    let (_, vocabulary) = vocabulary(gguf, config)?;
    let SpecialTokens { bos, pad, .. } = vocabulary.special;
    Ok(TokenIds { bos, eos: vocabulary.ends_of_generation()?, pad })
}

/// Reads the tokenizer of the model `config`.
pub(super) fn read(gguf: &GgufFile, config: &ModelConfig) -> Result<GgufTokenizer, CheckpointError> {
    let (kind, vocabulary) = vocabulary(gguf, config)?;
    let pipeline = match kind {
        Kind::ByteLevel(pre_tokenizer) => byte_level::pipeline(&vocabulary, pre_tokenizer)?,
        Kind::SentencePiece => sentencepiece::pipeline(&vocabulary)?,
    };
    let json = vocabulary.tokenizer_json(pipeline);
    // What tokenizer.json promises, its reader must accept.
    let inner = tokenizers::Tokenizer::from_bytes(json.to_string()).map_err(|error| {
        CheckpointError::malformed(
            gguf.path(),
            format!("the vocabulary does not make a tokenizer: {error}"),
            "fetch the file again or convert the model again",
        )
    })?;
    Ok(GgufTokenizer { json, inner })
}

/// tokenizer_config.json of the model `config`.
pub(super) fn config_json(gguf: &GgufFile, config: &ModelConfig) -> Result<Value, CheckpointError> {
    Ok(vocabulary(gguf, config)?.1.config_json(config, chat_template(gguf)?))
}

fn vocabulary<'a>(
    gguf: &'a GgufFile,
    config: &ModelConfig,
) -> Result<(Kind, Vocabulary<'a>), CheckpointError> {
    let model = gguf.string(MODEL)?.ok_or_else(|| gguf.mismatch(MODEL, "missing", "a kind of tokenizer"))?;
    let (kind, add_bos) = match model {
        "gpt2" => {
            let pre_tokenizer = byte_level::PreTokenizer::read(gguf)?;
            (Kind::ByteLevel(pre_tokenizer), pre_tokenizer.add_bos())
        }
        "llama" => (Kind::SentencePiece, true),
        other => return Err(gguf.unsupported(MODEL, format!("\"{other}\""), "gpt2, llama")),
    };
    Ok((kind, Vocabulary::read(gguf, config, add_bos)?))
}

/// The parts of tokenizer.json that depend on the kind of tokenizer.
struct Pipeline {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// What to do with the tokens of a text beside adding the special ones around them.
    post_processor: Option<Value>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a GgufFile, config: &ModelConfig, add_bos: bool) -> Result<Self, CheckpointError> {
        let tokens =
            gguf.strings(TOKENS)?.ok_or_else(|| gguf.mismatch(TOKENS, "missing", "an array of strings"))?;
        if tokens.len() != config.vocabulary_size {
            let found = format!("an array of {}", tokens.len());
            let expected =
                format!("one token for each of the {} rows of token_embd.weight", config.vocabulary_size);
            return Err(gguf.mismatch(TOKENS, found, expected));
        }
        let types = match gguf.integers(TOKEN_TYPES)? {
            Some(numbers) => {
                numbers.into_iter().map(|number| token_type(gguf, number)).collect::<Result<_, _>>()?
            }
            None => vec![TokenType::Normal; tokens.len()],
        };
        if types.len() != tokens.len() {
            let found = format!("an array of {}", types.len());
            return Err(gguf.mismatch(
                TOKEN_TYPES,
                found,
                format!("one for each of {} tokens", tokens.len()),
            ));
        }
        let special = SpecialTokens::read(gguf, tokens.len(), add_bos)?;
        Ok(Self { gguf, tokens, types, special })
    }

    /// Token and id of every token that can occur. Byte-level vocabularies are filled up to the rows of the embedding
    /// with unused tokens, which the model's own tokenizer does not have.
    fn used(&self) -> impl Iterator<Item = (&'a str, u32, TokenType)> {
        let tokens = self.tokens.iter().zip(0u32..).zip(&self.types);
        tokens
            .map(|((token, id), &kind)| (token.as_str(), id, kind))
            .filter(|&(.., kind)| kind != TokenType::Unused)
    }

    /// `{token: id}`; two ids with one text are refused.
    fn ids(&self) -> Result<Map<String, Value>, CheckpointError> {
        let mut ids = Map::new();
        for (token, id, _) in self.used() {
            if let Some(other) = ids.insert(token.to_owned(), id.into()) {
                let found = format!("holding {token:?} twice, as {other} and {id}");
                return Err(self.gguf.mismatch(TOKENS, found, "every token once"));
            }
        }
        Ok(ids)
    }

    fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(id? as usize).map(String::as_str)
    }

    /// Tokens that are matched whole in a text: id, text, whether they are special.
    fn added(&self) -> impl Iterator<Item = (u32, &'a str, bool)> {
        let SpecialTokens { bos, eos, unknown, pad, .. } = self.special;
        let has_role = move |id| [bos, eos, unknown, pad].contains(&Some(id));
        self.used().filter_map(move |(token, id, kind)| match kind {
            TokenType::Control | TokenType::Unknown => Some((id, token, true)),
            TokenType::UserDefined => Some((id, token, false)),
            TokenType::Normal | TokenType::Unused | TokenType::Byte => {
                has_role(id).then_some((id, token, true))
            }
        })
    }

    /// The ends of a generation: of the metadata, then of the list.
    fn ends_of_generation(&self) -> Result<Vec<u32>, CheckpointError> {
        const END_OF_TURN: &str = "tokenizer.ggml.eot_token_id";
        let end_of_turn = token_id(self.gguf, END_OF_TURN, self.tokens.len())?;
        let mut ids: Vec<u32> = self.special.eos.into_iter().chain(end_of_turn).collect();
        ids.extend(self.added().filter(|(_, token, _)| END_OF_GENERATION.contains(token)).map(|(id, ..)| id));
        let mut unique = Vec::new();
        for id in ids {
            if !unique.contains(&id) {
                unique.push(id);
            }
        }
        Ok(unique)
    }

    fn tokenizer_json(&self, pipeline: Pipeline) -> Value {
        let added: Vec<Value> = self
            .added()
            .map(|(id, content, special)| {
                let mut token = added_token(content, special);
                token.insert("id".to_owned(), id.into());
                Value::Object(token)
            })
            .collect();
        let processors: Vec<Value> = pipeline.post_processor.into_iter().chain(self.template()).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": pipeline.normalizer,
            "pre_tokenizer": pipeline.pre_tokenizer,
            "post_processor": match processors.as_slice() {
                [] => Value::Null,
                [one] => one.clone(),
                several => json!({ "type": "Sequence", "processors": several }),
            },
            "decoder": pipeline.decoder,
            "model": pipeline.model,
        })
    }

    /// The special tokens around a text, if there are any.
    fn template(&self) -> Option<Value> {
        let SpecialTokens { bos, eos, add_bos, add_eos, .. } = self.special;
        let bos = self.text(bos.filter(|_| add_bos)).zip(bos);
        let eos = self.text(eos.filter(|_| add_eos)).zip(eos);
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let special =
            |(token, _): (&str, u32), part: u32| json!({ "SpecialToken": { "id": token, "type_id": part } });
        let part = |name: &str, number: u32| {
            let sequence = json!({ "Sequence": { "id": name, "type_id": number } });
            bos.map(|token| special(token, number))
                .into_iter()
                .chain([sequence])
                .chain(eos.map(|token| special(token, number)))
                .collect::<Vec<_>>()
        };
        let (single, second) = (part("A", 0), part("B", 1));
        let used: Map<String, Value> = bos
            .into_iter()
            .chain(eos)
            .map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
            .collect();
        let pair = [single.clone(), second].concat();
        Some(json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used }))
    }

    fn config_json(&self, config: &ModelConfig, chat_template: Option<&str>) -> Value {
        let added: Map<String, Value> = self
            .added()
            .map(|(id, token, special)| (id.to_string(), Value::Object(added_token(token, special))))
            .collect();
        let mut json = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.special.add_bos,
            "add_eos_token": self.special.add_eos,
            "added_tokens_decoder": added,
        });
        let SpecialTokens { bos, eos, unknown, pad, .. } = self.special;
        for (name, id) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", pad)]
        {
            if let Some(token) = self.text(id) {
                json[name] = token.into();
            }
        }
        if let Some(template) = chat_template {
            json["chat_template"] = template.into();
        }
        json
    }
}

impl SpecialTokens {
    fn read(gguf: &GgufFile, tokens: usize, add_bos: bool) -> Result<Self, CheckpointError> {
        let id = |name: &str| token_id(gguf, &format!("tokenizer.ggml.{name}_token_id"), tokens);
        Ok(Self {
            bos: id("bos")?,
            eos: id("eos")?,
            unknown: id("unknown")?,
            pad: id("padding")?,
            add_bos: gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
            add_eos: gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        })
    }
}

fn token_type(gguf: &GgufFile, number: u64) -> Result<TokenType, CheckpointError> {
    Ok(match number {
        1 => TokenType::Normal,
        2 => TokenType::Unknown,
        3 => TokenType::Control,
        4 => TokenType::UserDefined,
        5 => TokenType::Unused,
        6 => TokenType::Byte,
        other => {
            return Err(gguf.mismatch(TOKEN_TYPES, format!("holding {other}"), "numbers from 1 to 6"));
        }
    })
}

/// The token id `key`, if present; it must be one of `tokens` ids.
fn token_id(gguf: &GgufFile, key: &str, tokens: usize) -> Result<Option<u32>, CheckpointError> {
    gguf.integer(key)?
        .map(|id| {
            u32::try_from(id)
                .ok()
                .filter(|&id| (id as usize) < tokens)
                .ok_or_else(|| gguf.mismatch(key, id, format!("an id below the number of tokens {tokens}")))
        })
        .transpose()
}

fn added_token(content: &str, special: bool) -> Map<String, Value> {
    let fields = [
        ("content", content.into()),
        ("lstrip", false.into()),
        ("normalized", false.into()),
        ("rstrip", false.into()),
        ("single_word", false.into()),
        ("special", special.into()),
    ];
    fields.into_iter().map(|(name, value): (&str, Value)| (name.to_owned(), value)).collect()
}
