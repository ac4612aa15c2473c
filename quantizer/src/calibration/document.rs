//! Documents: what a line of a JSONL file or a row of a Parquet file holds, a text or a conversation.
//!
//! A document is a string, or an object with one of these; the first that is there counts:
//!
//! ```text
//! messages                     conversation: a list of {role, content}            (OpenAI)
//! conversations                conversation: a list of {from, value}              (ShareGPT)
//! text                         text
//! prompt, completion           conversation: each a string or a list of messages  (TRL)
//! instruction, input?, output  conversation                                       (Alpaca)
//! ```
//!
//! A string `system` beside a conversation is its first message. A conversation becomes text by the model's own
//! chat template, without the beginning of an answer; a model without one sees its contents, one below the other.

use nibble_model::chat_template::{ChatInputs, ChatTemplate};
use serde_json::{Map, Value as Json, json};

/// The fields that documents are read from.
pub(super) const FIELDS: [&str; 9] =
    ["messages", "conversations", "text", "prompt", "completion", "instruction", "input", "output", "system"];

/// What to do about documents that have none of the fields.
pub(super) const HELP: &str = "give a text or an object with \"text\", \"messages\", \"conversations\", \
    \"prompt\" and \"completion\", or \"instruction\" and \"output\", or name another field by --calibration-field";

/// What a document holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    Text(String),
    /// Messages as chat templates expect them: objects with `role`, and `content` as one string.
    Chat(Vec<Json>),
}

impl Document {
    /// The document that `value` holds, in `field` when one is named. The error says what is wrong with it.
    pub(super) fn parse(value: Json, field: Option<&str>) -> Result<Self, String> {
        let mut object = match value {
            Json::String(text) => return Self::text(text),
            Json::Object(object) => object,
            other => return Err(format!("{}, neither a text nor an object", kind(&other))),
        };
        // Parquet has every field in every row, JSON leaves fields out.
        object.retain(|_, value| !value.is_null());
        if let Some(field) = field {
            return match object.remove(field) {
                Some(Json::String(text)) => Self::text(text),
                Some(Json::Array(messages)) => Self::chat(&mut object, messages),
                Some(other) => Err(format!("{field:?} is {}, neither a text nor messages", kind(&other))),
                None => Err(missing(&object, &format!("no field {field:?}"))),
            };
        }
        for field in ["messages", "conversations"] {
            match object.remove(field) {
                Some(Json::Array(messages)) => return Self::chat(&mut object, messages),
                Some(other) => return Err(format!("{field:?} is {}, not a list of messages", kind(&other))),
                None => {}
            }
        }
        match object.remove("text") {
            Some(Json::String(text)) => return Self::text(text),
            Some(other) => return Err(format!("\"text\" is {}, not a text", kind(&other))),
            None => {}
        }
        if object.contains_key("prompt") && object.contains_key("completion") {
            let mut messages = turn(&mut object, "prompt", "user")?;
            messages.extend(turn(&mut object, "completion", "assistant")?);
            return Self::chat(&mut object, messages);
        }
        if object.contains_key("instruction") && object.contains_key("output") {
            let mut instruction = string(&mut object, "instruction")?;
            if object.contains_key("input") {
                let input = string(&mut object, "input")?;
                if !input.trim().is_empty() {
                    instruction = format!("{instruction}\n\n{input}");
                }
            }
            let output = string(&mut object, "output")?;
            let messages = vec![message("user", instruction), message("assistant", output)];
            return Self::chat(&mut object, messages);
        }
        Err(missing(&object, "none of the known fields"))
    }

    fn text(text: String) -> Result<Self, String> {
        if text.trim().is_empty() { Err("empty".to_owned()) } else { Ok(Self::Text(text)) }
    }

    /// A conversation beside the other fields of its `object`.
    fn chat(object: &mut Map<String, Json>, messages: Vec<Json>) -> Result<Self, String> {
        let system = match object.remove("system") {
            Some(Json::String(text)) if !text.trim().is_empty() => Some(message("system", text)),
            _ => None,
        };
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(at, value)| normalized(value).map_err(|problem| format!("message {}: {problem}", at + 1)))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.iter().all(|message| content(message).trim().is_empty()) {
            return Err("empty".to_owned());
        }
        Ok(Self::Chat(system.into_iter().chain(messages).collect()))
    }
}

/// The text of a conversation for a model with `template`, or without one. The error is the template's.
pub(super) fn render(messages: &[Json], template: Option<&ChatTemplate>) -> Result<String, String> {
    let Some(template) = template else {
        let contents = messages.iter().map(content).filter(|content| !content.is_empty());
        return Ok(contents.collect::<Vec<_>>().join("\n\n"));
    };
    let inputs = ChatInputs { messages: messages.to_vec(), ..ChatInputs::default() };
    template.render(&inputs).map_err(|error| error.to_string())
}

fn message(role: &str, content: String) -> Json {
    json!({"role": role, "content": content})
}

fn content(message: &Json) -> &str {
    message.get("content").and_then(Json::as_str).unwrap_or_default()
}

/// One side of a prompt with its completion.
fn turn(object: &mut Map<String, Json>, field: &str, role: &str) -> Result<Vec<Json>, String> {
    match object.remove(field) {
        Some(Json::Array(messages)) => Ok(messages),
        Some(Json::String(text)) => Ok(vec![message(role, text)]),
        other => Err(format!("{field:?} is {}, neither a text nor messages", kind(&other.into()))),
    }
}

fn string(object: &mut Map<String, Json>, field: &str) -> Result<String, String> {
    match object.remove(field) {
        Some(Json::String(text)) => Ok(text),
        other => Err(format!("{field:?} is {}, not a text", kind(&other.into()))),
    }
}

/// A message of OpenAI or ShareGPT with `role`, and `content` as one string; other fields stay.
fn normalized(message: Json) -> Result<Json, String> {
    let Json::Object(mut message) = message else { return Err(format!("{}, not an object", kind(&message))) };
    message.retain(|_, value| !value.is_null());
    let role = match message.remove("role").or_else(|| message.remove("from")) {
        Some(Json::String(role)) => role,
        _ => return Err("no \"role\" or \"from\" that is a text".to_owned()),
    };
    let role = match role.as_str() {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    };
    message.insert("role".to_owned(), role.into());
    match message.remove("content").or_else(|| message.remove("value")) {
        Some(Json::Array(parts)) => {
            let text = |part: &Json| part.get("text").and_then(Json::as_str).map(str::to_owned);
            let texts = parts.iter().map(text).collect::<Option<Vec<_>>>();
            let texts = texts.ok_or_else(|| "a part of its content is not a text".to_owned())?;
            message.insert("content".to_owned(), texts.join("\n").into());
        }
        Some(content @ Json::String(_)) => drop(message.insert("content".to_owned(), content)),
        Some(other) => return Err(format!("its content is {}, not a text", kind(&other))),
        // An assistant's call of a tool has none; templates know it as none.
        None => drop(message.insert("content".to_owned(), Json::Null)),
    }
    Ok(message.into())
}

fn missing(object: &Map<String, Json>, what: &str) -> String {
    if object.is_empty() {
        return format!("{what}, it is empty");
    }
    format!("{what}, it has {}", quoted(object.keys().map(String::as_str)))
}

/// The first few names, each in quotation marks.
pub(super) fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let mut names: Vec<String> = names.take(SHOWN + 1).map(|name| format!("{name:?}")).collect();
    if names.len() > SHOWN {
        names[SHOWN] = "...".to_owned();
    }
    names.join(", ")
}

fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(value: Json) -> Json {
        match Document::parse(value, None).unwrap() {
            Document::Chat(messages) => messages.into(),
            Document::Text(text) => panic!("{text} is no conversation"),
        }
    }

    #[test]
    fn every_known_layout_gives_its_text_or_its_conversation() {
        for (value, field) in
            [(json!("a"), None), (json!({"text": "a", "id": 1}), None), (json!({"body": "a"}), Some("body"))]
        {
            assert_eq!(Document::parse(value, field), Ok(Document::Text("a".to_owned())));
        }
        let asked = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        for value in [
            json!({"messages": asked.clone(), "text": "another rendering", "prompt": "q"}),
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            json!({"prompt": "q", "completion": "a"}),
            json!({"prompt": [{"role": "user", "content": "q"}], "completion": "a", "text": null}),
            json!({"instruction": "q", "input": "", "output": "a"}),
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, asked[1]]}),
        ] {
            assert_eq!(chat(value.clone()), asked, "{value}");
        }
        let with_input = chat(json!({"instruction": "q", "input": "i", "output": "a", "system": "s"}));
        let system = json!({"role": "system", "content": "s"});
        assert_eq!(with_input, json!([system, {"role": "user", "content": "q\n\ni"}, asked[1]]));
        let named = Document::parse(json!({"dialog": asked.clone(), "text": "x"}), Some("dialog"));
        assert_eq!(named, Ok(Document::Chat(asked.as_array().unwrap().clone())));
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_what_was_found() {
        for (value, field, problem) in [
            (json!(3), None, "a number, neither"),
            (json!(" \n"), None, "empty"),
            (json!({}), None, "it is empty"),
            (json!({"text": ""}), None, "empty"),
            (json!({"text": ["a"]}), None, "\"text\" is a list"),
            (json!({"body": "a", "id": 3}), None, "it has \"body\", \"id\""),
            (json!({"text": "a"}), Some("body"), "no field \"body\", it has \"text\""),
            (json!({"body": 3}), Some("body"), "\"body\" is a number"),
            (json!({"messages": []}), None, "empty"),
            (json!({"messages": "a"}), None, "not a list"),
            (json!({"messages": [{"role": "user", "content": "q"}, "a"]}), None, "message 2: a text"),
            (json!({"messages": [{"content": "q"}]}), None, "message 1: no \"role\""),
            (json!({"messages": [{"role": "user", "content": {}}]}), None, "an object, not a text"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), None, "not a text"),
            (json!({"prompt": 1, "completion": "a"}), None, "\"prompt\" is a number"),
            (json!({"instruction": "q", "output": 1}), None, "\"output\" is a number"),
        ] {
            let refused = Document::parse(value.clone(), field).unwrap_err();
            assert!(refused.contains(problem), "{value}: {refused}");
        }
    }

    #[test]
    fn a_model_without_a_template_sees_the_contents_one_below_the_other() {
        let messages = chat(json!({"prompt": "q", "completion": "a"}));
        assert_eq!(render(messages.as_array().unwrap(), None), Ok("q\n\na".to_owned()));
    }
}
