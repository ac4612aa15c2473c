//! The fields of requests: name, type, default, meaning.

use serde_json::{Value, json};

/// A field of a request's body.
#[derive(Clone, Copy)]
pub(super) struct Field {
    pub(super) name: &'static str,
    kind: Kind,
    /// What leaving it out means.
    default: Default,
    about: &'static str,
}

/// The type of a field.
#[derive(Clone, Copy)]
enum Kind {
    Boolean,
    /// With the least value.
    Integer(i64),
    /// With the least value and the largest.
    Number(f64, f64),
    Text,
    /// One text or several.
    Texts,
    TokenIds,
    Object,
    Objects,
    Words,
    Word(&'static [&'static str]),
    /// A word, or an object.
    WordOrObject(&'static [&'static str]),
    /// A text, several, token ids, or lists of them.
    Prompts,
}

/// What leaving out a field means.
#[derive(Clone, Copy)]
enum Default {
    /// It must be there.
    Required,
    /// Something that is no value of it; the description says what.
    None,
    Boolean(bool),
    Integer(i64),
    Number(f64),
    Word(&'static str),
}

const LARGEST: f64 = f32::MAX as f64;

const fn field(name: &'static str, kind: Kind, default: Default, about: &'static str) -> Field {
    Field { name, kind, default, about }
}

/// Fields of chat completions alone.
pub(super) const CHAT: &[Field] = &[
    field(
        "messages",
        Kind::Objects,
        Default::Required,
        "The conversation: objects with `role` and `content`.",
    ),
    field(
        "max_completion_tokens",
        Kind::Integer(1),
        Default::None,
        "Most tokens of an answer; as many as fit.",
    ),
    field("logprobs", Kind::Boolean, Default::Boolean(false), "Report the log probabilities of tokens."),
    field(
        "top_logprobs",
        Kind::Integer(0),
        Default::None,
        "So many of the likeliest tokens as well, up to 20.",
    ),
    field("tools", Kind::Objects, Default::None, "Functions that the model may call."),
    field(
        "tool_choice",
        Kind::WordOrObject(&["none", "auto", "required"]),
        Default::Word("auto"),
        "Whether and which tools are called; an object names a function.",
    ),
    field("parallel_tool_calls", Kind::Boolean, Default::Boolean(true), "Allow several calls in an answer."),
    field(
        "add_generation_prompt",
        Kind::Boolean,
        Default::Boolean(true),
        "End the prompt with the beginning of an answer.",
    ),
    field(
        "add_special_tokens",
        Kind::Boolean,
        Default::Boolean(false),
        "Add the tokenizer's special tokens to those of the template.",
    ),
    field("echo", Kind::Boolean, Default::Boolean(false), "Begin the answer with the last message."),
    field(
        "continue_final_message",
        Kind::Boolean,
        Default::Boolean(false),
        "Go on with the last message instead of answering it.",
    ),
    field(
        "chat_template",
        Kind::Text,
        Default::None,
        "A template for this request, where the server allows it.",
    ),
    field(
        "reasoning_effort",
        Kind::Word(&["none", "minimal", "low", "medium", "high"]),
        Default::None,
        "A variable for the chat template.",
    ),
    field("include_reasoning", Kind::Boolean, Default::Boolean(true), "Show what the model thinks."),
    field("documents", Kind::Objects, Default::None, "Documents for templates that take them."),
    field("chat_template_kwargs", Kind::Object, Default::None, "Variables for the chat template."),
];

/// Fields of completions alone.
pub(super) const COMPLETION: &[Field] = &[
    field(
        "prompt",
        Kind::Prompts,
        Default::Required,
        "What to continue: texts or token ids, one or several.",
    ),
    field("echo", Kind::Boolean, Default::Boolean(false), "Begin the answer with the prompt."),
    field(
        "logprobs",
        Kind::Integer(0),
        Default::None,
        "Report log probabilities, and of so many likely tokens.",
    ),
    field(
        "add_special_tokens",
        Kind::Boolean,
        Default::Boolean(true),
        "Add the tokenizer's special tokens to a text.",
    ),
];

/// Fields of both. Where no default is given, that of the model's generation_config.json counts, else it has no
/// effect.
pub(super) const GENERATION: &[Field] = &[
    field("model", Kind::Text, Default::None, "The served model's name; the one there is."),
    field(
        "max_tokens",
        Kind::Integer(0),
        Default::None,
        "Most tokens; of a completion 16, of a chat as many as fit.",
    ),
    field("min_tokens", Kind::Integer(0), Default::Integer(0), "Fewest tokens before an end."),
    field("temperature", Kind::Number(0.0, LARGEST), Default::Number(1.0), "0 takes the likeliest token."),
    field(
        "top_p",
        Kind::Number(0.0, 1.0),
        Default::Number(1.0),
        "Sample from the likeliest tokens of this sum.",
    ),
    field("top_k", Kind::Integer(-1), Default::Integer(0), "Sample from so many tokens; 0 and -1 are all."),
    field(
        "min_p",
        Kind::Number(0.0, 1.0),
        Default::Number(0.0),
        "Least probability, relative to the likeliest.",
    ),
    field(
        "repetition_penalty",
        Kind::Number(0.0, LARGEST),
        Default::Number(1.0),
        "Divides logits of seen tokens.",
    ),
    field(
        "frequency_penalty",
        Kind::Number(-2.0, 2.0),
        Default::Number(0.0),
        "Subtracted for each occurrence.",
    ),
    field(
        "presence_penalty",
        Kind::Number(-2.0, 2.0),
        Default::Number(0.0),
        "Subtracted for any occurrence.",
    ),
    field(
        "logit_bias",
        Kind::Object,
        Default::None,
        "Token ids to what is added to their logits, -100 to 100.",
    ),
    field("seed", Kind::Integer(i64::MIN), Default::None, "The same seed gives the same answer."),
    field("n", Kind::Integer(1), Default::Integer(1), "Answers for each prompt."),
    field("stop", Kind::Texts, Default::None, "Texts that end an answer, up to 16."),
    field("stop_token_ids", Kind::TokenIds, Default::None, "Tokens that end an answer."),
    field(
        "include_stop_str_in_output",
        Kind::Boolean,
        Default::Boolean(false),
        "Show what ended the answer.",
    ),
    field("ignore_eos", Kind::Boolean, Default::Boolean(false), "Go on after an end-of-sequence token."),
    field(
        "skip_special_tokens",
        Kind::Boolean,
        Default::Boolean(true),
        "Leave special tokens out of the text.",
    ),
    field(
        "response_format",
        Kind::Object,
        Default::None,
        "text, json_object or json_schema: the answer's form.",
    ),
    field(
        "structured_outputs",
        Kind::Object,
        Default::None,
        "The answer's form by one of json, json_object, regex, choice and grammar.",
    ),
    field("stream", Kind::Boolean, Default::Boolean(false), "Send events as the answer grows."),
    field("stream_options", Kind::Object, Default::None, "`include_usage`, `continuous_usage_stats`."),
    field("allowed_token_ids", Kind::TokenIds, Default::None, "The only tokens that may be generated."),
    field("bad_words", Kind::Words, Default::None, "Texts that are never generated."),
    field(
        "prompt_logprobs",
        Kind::Integer(-1),
        Default::None,
        "Report log probabilities of the prompt, and of so many likely tokens; -1 is all. Not in a stream.",
    ),
    field(
        "truncate_prompt_tokens",
        Kind::Integer(-1),
        Default::None,
        "Keep so many tokens of the prompt's end; -1 is as many as fit.",
    ),
    field("return_token_ids", Kind::Boolean, Default::Boolean(false), "Report token ids beside texts."),
    field(
        "return_tokens_as_token_ids",
        Kind::Boolean,
        Default::Boolean(false),
        "Show tokens in log probabilities as `token_id:ID`.",
    ),
    field("request_id", Kind::Text, Default::None, "The end of the answer's id."),
    field("cache_salt", Kind::Text, Default::None, SALT),
    field("priority", Kind::Integer(i32::MIN as i64), Default::Integer(0), PRIORITY),
    field("spaces_between_special_tokens", Kind::Boolean, Default::Boolean(true), WITHOUT_EFFECT),
    field("user", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("metadata", Kind::Object, Default::None, WITHOUT_EFFECT),
    field("store", Kind::Boolean, Default::None, WITHOUT_EFFECT),
    field("service_tier", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("safety_identifier", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("prompt_cache_key", Kind::Text, Default::None, WITHOUT_EFFECT),
];

const WITHOUT_EFFECT: &str = "Accepted without an effect.";

const SALT: &str = "Keys and values of prompts are shared only between requests with the same salt.";
const PRIORITY: &str = "Lower numbers are served first, where the server allows it.";

/// Fields of embeddings.
pub(super) const EMBEDDING: &[Field] = &[
    field("model", Kind::Text, Default::None, "The served model's name; the one there is."),
    field("input", Kind::Prompts, Default::Required, "Texts or token ids, one or several."),
    field(
        "encoding_format",
        Kind::Word(&["float", "base64"]),
        Default::Word("float"),
        "Numbers, or the bytes of 32-bit floats.",
    ),
    field("dimensions", Kind::Integer(1), Default::None, "Keep so many numbers, of length 1 together; all."),
    field(
        "pooling",
        Kind::Word(&["mean", "last"]),
        Default::None,
        "The mean of all tokens or the last one; what the checkpoint says, else the last.",
    ),
    field(
        "truncate_prompt_tokens",
        Kind::Integer(-1),
        Default::None,
        "Keep so many tokens of the input's end; -1 is as many as fit.",
    ),
    field("add_special_tokens", Kind::Boolean, Default::Boolean(true), "Add the tokenizer's special tokens."),
    field("request_id", Kind::Text, Default::None, "The end of the answer's id."),
    field("cache_salt", Kind::Text, Default::None, SALT),
    field("priority", Kind::Integer(i32::MIN as i64), Default::Integer(0), PRIORITY),
    field("user", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("metadata", Kind::Object, Default::None, WITHOUT_EFFECT),
    field("store", Kind::Boolean, Default::None, WITHOUT_EFFECT),
    field("service_tier", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("safety_identifier", Kind::Text, Default::None, WITHOUT_EFFECT),
    field("prompt_cache_key", Kind::Text, Default::None, WITHOUT_EFFECT),
];

/// Fields of `/tokenize`.
pub(super) const TOKENIZE: &[Field] = &[
    field("prompt", Kind::Text, Default::Required, "The text."),
    field("add_special_tokens", Kind::Boolean, Default::Boolean(true), "Add the tokenizer's special tokens."),
    field("model", Kind::Text, Default::None, "The served model's name."),
];

/// Fields of `/detokenize`.
pub(super) const DETOKENIZE: &[Field] = &[
    field("tokens", Kind::TokenIds, Default::Required, "The tokens."),
    field("model", Kind::Text, Default::None, "The served model's name."),
];

impl Field {
    pub(super) fn is_required(&self) -> bool {
        matches!(self.default, Default::Required)
    }

    /// Its JSON Schema.
    pub(super) fn schema(&self) -> Value {
        let mut schema = match self.kind {
            Kind::Boolean => json!({ "type": "boolean" }),
            Kind::Integer(i64::MIN) => json!({ "type": "integer" }),
            Kind::Integer(least) => json!({ "type": "integer", "minimum": least }),
            Kind::Number(least, LARGEST) => json!({ "type": "number", "minimum": least }),
            Kind::Number(least, largest) => json!({ "type": "number", "minimum": least, "maximum": largest }),
            Kind::Text => json!({ "type": "string" }),
            Kind::Texts => json!({ "anyOf": [{ "type": "string" }, texts()] }),
            Kind::Words => texts(),
            Kind::Word(words) => json!({ "type": "string", "enum": words }),
            Kind::TokenIds => token_ids(),
            Kind::Object => json!({ "type": "object" }),
            Kind::Objects => json!({ "type": "array", "items": { "type": "object" } }),
            Kind::WordOrObject(words) => {
                json!({ "anyOf": [{ "type": "string", "enum": words }, { "type": "object" }] })
            }
            Kind::Prompts => {
                let lists = json!({ "type": "array", "items": token_ids() });
                json!({ "anyOf": [{ "type": "string" }, texts(), token_ids(), lists] })
            }
        };
        schema["description"] = self.about.into();
        match self.default {
            Default::Required | Default::None => {}
            Default::Boolean(value) => schema["default"] = value.into(),
            Default::Integer(value) => schema["default"] = value.into(),
            Default::Number(value) => schema["default"] = value.into(),
            Default::Word(value) => schema["default"] = value.into(),
        }
        schema
    }
}

fn texts() -> Value {
    json!({ "type": "array", "items": { "type": "string" } })
}

fn token_ids() -> Value {
    json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } })
}
