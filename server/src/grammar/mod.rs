//! Structured output: from a JSON schema, a regular expression, a list of choices or a Lark grammar to a
//! constraint of the engine, by llguidance.
//!
//! Compiling takes milliseconds, at most some tens of them (see [`Grammars::compile`]): it belongs on a thread
//! that may block. Every sequence has a parser of its own with caches of its own, so that neither its tokens nor
//! whether it exceeds its budget depend on others.

mod cache;
mod constraint;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use nibble_engine::TokenConstraint;
use nibble_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use cache::{GrammarCache, GrammarKey, GrammarKind};
use constraint::GrammarConstraint;

/// Most bytes of a grammar, in the form it is compiled from.
const MAXIMUM_GRAMMAR_BYTES: usize = 256 << 10;

/// Most parentheses and brackets around each other in a Lark grammar, whose parser goes down one by one.
const MAXIMUM_NESTING: usize = 200;

/// What may be spent on one grammar, compiling and for each token: llguidance's defaults, which compile the largest
/// schemas in use (FHIR's), with less memory for the states of its lexer. 50,000 units of fuel are a millisecond.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 20_000,
    max_grammar_size: 500_000,
    precompute_large_lexemes: false,
    verbose_errors: false,
};

/// White space between the tokens of a JSON text: any, so that a model may indent, but not without end, where
/// small models get lost.
const JSON_WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// What a completion must be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Grammar {
    /// A JSON text that satisfies a schema.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// A grammar cannot be compiled; the message is llguidance's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct GrammarError {
    message: String,
}

/// Compiles grammars for the tokens of one model.
pub(crate) struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocabulary_size: usize,
    eos_token_ids: Vec<u32>,
    /// Made when the first grammar is compiled: it takes a part of a second and some memory.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    cache: Mutex<GrammarCache>,
    #[cfg(test)]
    compiles: std::sync::atomic::AtomicUsize,
}

impl Grammar {
    /// Any JSON object.
    pub(crate) fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    fn compiled_form(self) -> GrammarWithLexer {
        match self {
            Self::JsonSchema(schema) => GrammarWithLexer::from_json_schema(with_whitespace(schema)),
            Self::Regex(regex) => GrammarWithLexer::from_regex(&regex),
            Self::Choice(choices) => {
                let choices: Vec<String> = choices.iter().map(|choice| lark_string(choice)).collect();
                GrammarWithLexer::from_lark(format!("start: {}", choices.join(" | ")))
            }
            Self::Lark(grammar) => GrammarWithLexer::from_lark(grammar),
        }
    }
}

/// A JSON schema in a rule of a Lark grammar.
pub(crate) fn lark_json(schema: Value) -> String {
    format!("%json {}", with_whitespace(schema))
}

/// A text in a rule of a Lark grammar.
pub(crate) fn lark_string(text: &str) -> String {
    Value::from(text).to_string()
}

/// `schema` with llguidance's option for white space, unless it has options of its own.
fn with_whitespace(mut schema: Value) -> Value {
    match &mut schema {
        Value::Object(object) => {
            object.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_WHITESPACE}));
        }
        // Any value, or none.
        Value::Bool(true) => return with_whitespace(json!({})),
        _ => {}
    }
    schema
}

impl Grammars {
    /// A compiler for the tokens of `tokenizer`, of which `eos_token_ids` end a completion; the model has logits
    /// for `vocabulary_size` tokens.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, vocabulary_size: usize, eos_token_ids: Vec<u32>) -> Self {
        Self {
            tokenizer,
            vocabulary_size,
            eos_token_ids,
            factory: OnceLock::new(),
            cache: Mutex::default(),
            #[cfg(test)]
            compiles: 0.into(),
        }
    }

    /// A constraint that lets through exactly the texts of `grammar`, followed by an end-of-sequence token. Grammars that
    /// were used lately are not compiled again.
    ///
    /// The size of the grammar and of what it is compiled to are bounded, and with them the time.
    ///
    /// # Errors
    /// When the grammar is malformed, matches nothing, uses what is not supported, or exceeds the bounds.
    pub(crate) fn compile(&self, grammar: Grammar) -> Result<Box<dyn TokenConstraint>, GrammarError> {
        let grammar = grammar.compiled_form();
        let key = match (&grammar.json_schema, &grammar.lark_grammar) {
            (Some(schema), _) => GrammarKey { kind: GrammarKind::JsonSchema, text: schema.to_string() },
            (None, lark) => {
                GrammarKey { kind: GrammarKind::Lark, text: lark.as_deref().unwrap_or_default().to_owned() }
            }
        };
        if let Some(matcher) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Box::new(GrammarConstraint::new(matcher, Arc::clone(&self.tokenizer))));
        }
        let matcher = self.matcher(grammar, key.text.len())?;
        let constraint = GrammarConstraint::new(matcher.deep_clone(), Arc::clone(&self.tokenizer));
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).insert(key, matcher);
        Ok(Box::new(constraint))
    }

    /// Compiles a grammar whose text has `bytes` bytes.
    fn matcher(&self, grammar: GrammarWithLexer, bytes: usize) -> Result<Matcher, GrammarError> {
        if bytes > MAXIMUM_GRAMMAR_BYTES {
            let message = format!("it has {bytes} bytes, expected at most {MAXIMUM_GRAMMAR_BYTES}");
            return Err(GrammarError { message });
        }
        if let Some(nesting) =
            grammar.lark_grammar.as_deref().map(nesting).filter(|&found| found > MAXIMUM_NESTING)
        {
            let message = format!("it is nested {nesting} levels deep, expected at most {MAXIMUM_NESTING}");
            return Err(GrammarError { message });
        }
        #[cfg(test)]
        self.compiles.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let factory = self.factory.get_or_init(|| self.factory()).as_ref().map_err(Clone::clone)?;
        let parser = catch_unwind(std::panic::AssertUnwindSafe(|| {
            factory.create_parser(TopLevelGrammar::from_grammar(grammar))
        }));
        let mut matcher = Matcher::new(parser);
        // The first mask shows what compiling leaves for later: whether there is any text at all.
        let mask =
            matcher.compute_mask_or_eos().map_err(|error| GrammarError { message: first_line(&error) })?;
        if mask.is_zero() {
            return Err(GrammarError { message: "no text satisfies it".to_owned() });
        }
        Ok(matcher)
    }

    fn factory(&self) -> Result<ParserFactory, GrammarError> {
        let failed = |message: String| GrammarError { message };
        let Some(&end) = self.eos_token_ids.first() else {
            return Err(failed(
                "the model has no end-of-sequence token to end a structured output with".to_owned(),
            ));
        };
        let words: Vec<Vec<u8>> = (0..self.vocabulary_size as u32).map(|id| self.word(id)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&self.eos_token_ids)));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| failed(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = LIMITS;
        Ok(factory)
    }

    /// The bytes of a token as llguidance expects them: special tokens are marked, so that they are no text.
    fn word(&self, id: u32) -> Vec<u8> {
        let bytes = self.tokenizer.token_bytes(id);
        if self.tokenizer.is_special(id) || self.eos_token_ids.contains(&id) {
            return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat();
        }
        bytes
    }
}

/// The most parentheses and brackets that are open at once, wherever they stand.
fn nesting(lark: &str) -> usize {
    let depths = lark.bytes().scan(0_usize, |depth, byte| {
        match byte {
            b'(' | b'[' => *depth += 1,
            b')' | b']' => *depth = depth.saturating_sub(1),
            _ => {}
        }
        Some(*depth)
    });
    depths.max().unwrap_or(0)
}

/// The message of an error without the parser's state, which may follow it.
fn first_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
