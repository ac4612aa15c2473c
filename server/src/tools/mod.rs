//! Tools: functions that a request offers to the model, the formats in which models call them, and grammars of
//! calls for requests that demand one.

mod call;
mod parser;
#[cfg(test)]
mod tests;

use nibble_model::chat_template::ChatTemplate;
use serde::Deserialize;
use serde_json::{Value, json};

pub(crate) use call::CallDelta;
pub(crate) use parser::ToolCallParser;

use crate::grammar::{Grammar, lark_json, lark_string};
use crate::openai::error::ApiError;

/// Most tools of a request, as OpenAI has it.
const MAXIMUM_TOOLS: usize = 128;
/// Most calls of an answer that must call a tool: models that do not know when to stop end here.
const MAXIMUM_CALLS: usize = 16;
/// Most characters of a function's name, as OpenAI has it.
const MAXIMUM_NAME: usize = 64;

/// How a model writes the calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// `<tool_call>{"name": "f", "arguments": {...}}</tool_call>` among text: Qwen, Hermes and many others.
    Hermes,
    /// `{"name": "f", "parameters": {...}}` instead of text, after `<|python_tag|>` or nothing; several are
    /// separated by `;`: Llama 3.
    Llama3Json,
}

impl ToolCallFormat {
    /// The format that the model's chat template teaches, if it is a known one.
    pub fn of_template(template: &ChatTemplate) -> Option<Self> {
        if template.mentions("<tool_call>") {
            Some(Self::Hermes)
        } else if template.mentions("<|python_tag|>") || template.mentions("\"parameters\": ") {
            Some(Self::Llama3Json)
        } else {
            None
        }
    }

    fn opening_tag(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama3Json => "<|python_tag|>",
        }
    }

    fn closing_tag(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("</tool_call>"),
            Self::Llama3Json => None,
        }
    }

    /// The rule of a call in a Lark grammar, as the model was trained to write it.
    fn rule(self, function: &Function) -> String {
        let name = Value::from(function.name.as_str());
        let (before, after) = match self {
            Self::Hermes => (format!("<tool_call>\n{{\"name\": {name}, \"arguments\": "), "}\n</tool_call>"),
            Self::Llama3Json => (format!("{{\"name\": {name}, \"parameters\": "), "}"),
        };
        let arguments = lark_json(function.parameters.clone().unwrap_or_else(|| json!({"type": "object"})));
        format!("{} {arguments} {}", lark_string(&before), lark_string(after))
    }

    fn separator(self) -> &'static str {
        match self {
            Self::Hermes => "\n",
            Self::Llama3Json => "; ",
        }
    }
}

/// Whether the model must call a tool, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// It sees no tools.
    None,
    /// As it likes.
    Auto,
    /// One at least.
    Required,
    /// This one.
    Named(String),
}

/// The part of a tool that the server looks at.
#[derive(Debug, Deserialize)]
struct Tool {
    r#type: String,
    function: Function,
}

#[derive(Clone, Debug, Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    parameters: Option<Value>,
}

/// The tools of a request, with a known format of calls.
#[derive(Debug)]
pub(crate) struct Tools {
    format: ToolCallFormat,
    functions: Vec<Function>,
    choice: ToolChoice,
    parallel: bool,
}

impl ToolChoice {
    /// Reads the field `tool_choice`.
    pub(crate) fn parse(value: &Value) -> Result<Self, ApiError> {
        let named = value.get("type").is_some_and(|kind| kind == "function");
        let name = value.pointer("/function/name").and_then(Value::as_str).filter(|_| named);
        match (value.as_str(), name) {
            (Some("none"), _) => Ok(Self::None),
            (Some("auto"), _) => Ok(Self::Auto),
            (Some("required"), _) => Ok(Self::Required),
            (_, Some(name)) => Ok(Self::Named(name.to_owned())),
            _ => Err(ApiError::invalid(
                "tool_choice",
                crate::openai::fields::short(value),
                "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": NAME}}",
            )),
        }
    }
}

impl Tools {
    /// Checks the tools of a request; `None` when the model shall see none.
    pub(crate) fn new(
        format: Option<ToolCallFormat>,
        tools: &[Value],
        choice: Option<&Value>,
        parallel: bool,
    ) -> Result<Option<Self>, ApiError> {
        let choice = choice.map(ToolChoice::parse).transpose()?.unwrap_or(ToolChoice::Auto);
        if tools.is_empty() {
            return match choice {
                ToolChoice::None | ToolChoice::Auto => Ok(None),
                _ => Err(ApiError::invalid("tool_choice", "given", "tools beside it")),
            };
        }
        if tools.len() > MAXIMUM_TOOLS {
            return Err(ApiError::invalid("tools", tools.len(), format!("at most {MAXIMUM_TOOLS}")));
        }
        let functions: Vec<Function> = tools.iter().enumerate().map(function).collect::<Result<_, _>>()?;
        if let ToolChoice::Named(name) = &choice
            && functions.iter().all(|function| function.name != *name)
        {
            return Err(ApiError::invalid("tool_choice", format!("{name:?}"), "the name of one of tools"));
        }
        if choice == ToolChoice::None {
            return Ok(None);
        }
        let Some(format) = format else {
            let message =
                "tools are given, but the model's chat template does not say how to call them in a format \
                           that is known; use another model, or start the server with --tool-call-parser"
                    .to_owned();
            return Err(ApiError::InvalidField { param: "tools".to_owned(), message });
        };
        Ok(Some(Self { format, functions, choice, parallel }))
    }

    /// The grammar of an answer that must call a tool; otherwise, with the schema of other answers, of an answer
    /// that may. `None` when the answer is free.
    pub(crate) fn grammar(&self, answer_schema: Option<Value>) -> Option<Grammar> {
        let (functions, several): (Vec<&Function>, bool) = match &self.choice {
            ToolChoice::Named(name) => {
                (self.functions.iter().filter(|function| function.name == *name).take(1).collect(), false)
            }
            ToolChoice::Required => (self.functions.iter().collect(), self.parallel),
            ToolChoice::Auto if answer_schema.is_some() => (self.functions.iter().collect(), self.parallel),
            ToolChoice::Auto | ToolChoice::None => return None,
        };
        let mut lark = match (answer_schema, &self.choice) {
            (Some(schema), ToolChoice::Auto) => {
                format!("start: answer | calls\nanswer: {}\n", lark_json(schema))
            }
            _ => "start: calls\n".to_owned(),
        };
        let separator = lark_string(self.format.separator());
        lark.push_str(&if several {
            format!("calls: call ({separator} call){{0,{}}}\n", MAXIMUM_CALLS - 1)
        } else {
            "calls: call\n".to_owned()
        });
        let names: Vec<String> = (0..functions.len()).map(|index| format!("call_{index}")).collect();
        lark.push_str(&format!("call: {}\n", names.join(" | ")));
        for (name, function) in names.iter().zip(functions) {
            lark.push_str(&format!("{name}: {}\n", self.format.rule(function)));
        }
        Some(Grammar::Lark(lark))
    }

    /// A parser of one answer.
    pub(crate) fn parser(&self) -> ToolCallParser {
        let names = self.functions.iter().map(|function| function.name.clone()).collect();
        ToolCallParser::new(self.format, names, self.parallel)
    }
}

fn function((at, tool): (usize, &Value)) -> Result<Function, ApiError> {
    let field = |name: &str| format!("tools[{at}]{name}");
    let tool: Tool = serde_path_to_error::deserialize(tool).map_err(|error| {
        let path = error.path().to_string();
        let param = if path == "." { field("") } else { field(&format!(".{path}")) };
        let message = format!("{param}: {}", error.inner());
        ApiError::InvalidField { param, message }
    })?;
    if tool.r#type != "function" {
        return Err(ApiError::invalid(field(".type"), format!("{:?}", tool.r#type), "\"function\""));
    }
    let function = tool.function;
    let is_name = |name: &str| {
        (1..=MAXIMUM_NAME).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
    };
    if !is_name(&function.name) {
        let expected = format!("1 to {MAXIMUM_NAME} letters, digits, \"_\", \"-\" or \".\"");
        return Err(ApiError::invalid(field(".function.name"), format!("{:?}", function.name), expected));
    }
    if let Some(parameters) = function.parameters.as_ref().filter(|parameters| !parameters.is_object()) {
        let found = crate::openai::fields::short(parameters);
        return Err(ApiError::invalid(field(".function.parameters"), found, "a JSON schema of an object"));
    }
    Ok(function)
}
