//! Chat templates: from a list of messages to the text that the model was trained to continue.
//!
//! A model brings its template in Jinja, in chat_template.jinja or in tokenizer_config.json. It is rendered as
//! Hugging Face transformers does: `trim_blocks`, `lstrip_blocks`, loop controls, `{% generation %}` blocks,
//! `tojson`, `raise_exception`, `strftime_now`, the special tokens as variables, and Python's methods and
//! spelling of values.
//!
//! A template is data from a model file, not code to trust: it reaches no file and no network, and the
//! number of instructions it may run and of bytes it may print are bounded.

mod python;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;

use minijinja::{Environment, ErrorKind, Template, Value, context};
use regex::Regex;
use serde_json::{Map, Value as Json};

use crate::config::Fields;
use crate::error::CheckpointError;

/// Instructions a template may run. The largest templates run a few hundred for a message, so that this
/// allows tens of thousands of messages and ends an endless loop within about a second.
const FUEL: u64 = 20_000_000;

/// Bytes a template may print: far more than any context holds.
const MAXIMUM_BYTES: usize = 64 << 20;

/// Name of the template that is used unless another fits better.
const DEFAULT: &str = "default";
/// Name of the template that is used when there are tools.
const TOOL_USE: &str = "tool_use";

/// Special tokens of tokenizer_config.json that templates see as variables.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The chat template of a model, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Json>,
}

/// What a chat template is given.
#[derive(Clone, Debug, Default)]
pub struct ChatInputs {
    /// The conversation: objects with `role`, `content` and whatever else the template knows.
    pub messages: Vec<Json>,
    /// JSON schemas of functions that the model may call.
    pub tools: Option<Vec<Json>>,
    /// Documents to answer from.
    pub documents: Option<Vec<Json>>,
    /// Whether the text shall end with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Json>,
}

/// A template refused its inputs or could not be rendered with them; the message is the template's own where it
/// has one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chat template refuses these messages: {message}")]
pub struct ChatTemplateError {
    /// What is wrong.
    pub message: String,
}

impl ChatTemplate {
    /// Opens the chat template of the model in `directory`: chat_template.jinja, else `chat_template` of
    /// tokenizer_config.json. `None` when the model has none.
    ///
    /// # Errors
    /// When a file cannot be read, or holds something else than a template.
    pub fn open(directory: &Path) -> Result<Option<Self>, CheckpointError> {
        let config_file = directory.join("tokenizer_config.json");
        let config = Fields::read_if_present(&config_file)?;
        let template_file = directory.join("chat_template.jinja");
        if template_file.exists() {
            let special_tokens = config.as_ref().map(special_tokens).transpose()?.unwrap_or_default();
            let source = std::fs::read_to_string(&template_file)
                .map_err(CheckpointError::io("read", &template_file))?;
            let templates = vec![(DEFAULT.to_owned(), source)];
            return Self::compile(&template_file, templates, special_tokens).map(Some);
        }
        match config {
            Some(config) => Self::of_config(&config_file, &config),
            None => Ok(None),
        }
    }

    /// The chat template in `config`, the tokenizer_config.json that `file` holds.
    ///
    /// # Errors
    /// When it is no template.
    pub(crate) fn of_config(file: &Path, config: &Fields) -> Result<Option<Self>, CheckpointError> {
        match named_templates(config)? {
            Some(templates) => Self::compile(file, templates, special_tokens(config)?).map(Some),
            None => Ok(None),
        }
    }

    /// A template from its source, with the special tokens of the model's own template, if it has one.
    ///
    /// # Errors
    /// When it is no template.
    pub fn from_source(source: String, of_model: Option<&Self>) -> Result<Self, ChatTemplateError> {
        let special_tokens = of_model.map(|template| template.special_tokens.clone()).unwrap_or_default();
        let mut environment = environment();
        add_template(&mut environment, DEFAULT.to_owned(), &source)
            .map_err(|error| ChatTemplateError { message: format!("not valid Jinja: {error}") })?;
        Ok(Self { environment, special_tokens })
    }

    fn compile(
        file: &Path,
        templates: Vec<(String, String)>,
        special_tokens: Map<String, Json>,
    ) -> Result<Self, CheckpointError> {
        let mut environment = environment();
        for (name, source) in templates {
            add_template(&mut environment, name.clone(), &source).map_err(|error| {
                let problem = format!("the chat template \"{name}\" is not valid Jinja: {error}");
                CheckpointError::malformed(file, problem, "correct the template or fetch the model again")
            })?;
        }
        Ok(Self { environment, special_tokens })
    }

    /// Whether `text` occurs in the source of the template that is used when there are tools.
    pub fn mentions(&self, text: &str) -> bool {
        self.template(true).is_ok_and(|template| template.source().contains(text))
    }

    fn template(&self, with_tools: bool) -> Result<Template<'_, '_>, ChatTemplateError> {
        with_tools
            .then(|| self.environment.get_template(TOOL_USE).ok())
            .flatten()
            .map_or_else(|| self.environment.get_template(DEFAULT), Ok)
            .map_err(|_| ChatTemplateError {
                message: format!("the model has no chat template named \"{DEFAULT}\""),
            })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// When the template raises an error, needs something that the inputs do not have, or does not end.
    pub fn render(&self, inputs: &ChatInputs) -> Result<String, ChatTemplateError> {
        let template = self.template(inputs.tools.is_some())?;
        let given = context! {
            messages => inputs.messages,
            tools => inputs.tools,
            documents => inputs.documents,
            add_generation_prompt => inputs.add_generation_prompt,
        };
        // What stands first wins: no variable of a request can replace the conversation.
        let variables = context! {
            ..given, ..context! {
                ..Value::from_serialize(&inputs.variables), ..Value::from_serialize(&self.special_tokens)
            }
        };
        let mut output = BoundedOutput(Vec::new());
        template
            .render_captured_to(variables, &mut output)
            .map_err(|error| ChatTemplateError { message: explain(&error) })?;
        String::from_utf8(output.0).map_err(|error| ChatTemplateError { message: error.to_string() })
    }
}

/// What transformers renders templates with, within bounds.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    python::install(&mut environment);
    environment
}

fn add_template(
    environment: &mut Environment<'static>,
    name: String,
    source: &str,
) -> Result<(), minijinja::Error> {
    // transformers marks the assistant's tokens with these blocks; what they enclose is always printed.
    let generation = Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("a valid pattern");
    let source = generation.replace_all(source, |found: &regex::Captures<'_>| {
        let tag = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{tag}{}", &found[1], &found[3])
    });
    environment.add_template_owned(name, source.into_owned())
}

/// What a template has printed.
struct BoundedOutput(Vec<u8>);

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAXIMUM_BYTES {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a client is told about an error of a template.
fn explain(error: &minijinja::Error) -> String {
    if let Some(message) = python::raised_message(error) {
        return message;
    }
    match error.kind() {
        ErrorKind::OutOfFuel => "it does not end within the allowed number of instructions".to_owned(),
        ErrorKind::WriteFailure => format!("it prints more than {MAXIMUM_BYTES} bytes"),
        _ => error.to_string(),
    }
}

/// The special tokens of tokenizer_config.json: strings, or objects with the string under `content`.
fn special_tokens(config: &Fields) -> Result<Map<String, Json>, CheckpointError> {
    let mut tokens = Map::new();
    for name in SPECIAL_TOKENS {
        let token = match config.value(name) {
            None => continue,
            Some(Json::Object(token)) => token.get("content"),
            token => token,
        };
        match token {
            Some(Json::String(token)) => tokens.insert(name.to_owned(), token.clone().into()),
            _ => {
                return Err(config.mismatch(name, "something else", "a token or an object with its content"));
            }
        };
    }
    Ok(tokens)
}

/// `chat_template` of tokenizer_config.json: one template, or a list of named ones.
fn named_templates(config: &Fields) -> Result<Option<Vec<(String, String)>>, CheckpointError> {
    const NAME: &str = "chat_template";
    const EXPECTED: &str = "a template or a list of objects with name and template";
    let entries = match config.value(NAME) {
        None => return Ok(None),
        Some(Json::String(template)) => return Ok(Some(vec![(DEFAULT.to_owned(), template.clone())])),
        Some(Json::Array(entries)) => entries,
        Some(_) => return Err(config.mismatch(NAME, "something else", EXPECTED)),
    };
    let text = |entry: &Json, name: &str| entry.get(name).and_then(Json::as_str).map(str::to_owned);
    entries
        .iter()
        .map(|entry| text(entry, "name").zip(text(entry, "template")))
        .collect::<Option<Vec<_>>>()
        .map(Some)
        .ok_or_else(|| config.mismatch(NAME, "a list of something else", EXPECTED))
}
