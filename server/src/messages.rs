//! Messages of a chat: from what clients send to what chat templates expect.

use serde_json::{Map, Value};

use crate::openai::error::ApiError;
use crate::openai::fields::short;

/// A message as templates expect it: its content as one string, the arguments of tool calls as objects.
pub(crate) fn normalized(at: usize, mut message: Map<String, Value>) -> Result<Value, ApiError> {
    let field = |name: &str| format!("messages[{at}].{name}");
    match message.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(ApiError::invalid(field("role"), short(other), "a string")),
        None => return Err(ApiError::MissingField { param: field("role"), expected: "a string".to_owned() }),
    }
    match message.get_mut("content") {
        // The assistant's messages with tool calls have no content.
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(part, value)| {
                text_part(value).map_err(|(name, expected)| {
                    let found = value.get(name).map_or_else(|| short(value), short);
                    ApiError::invalid(format!("messages[{at}].content[{part}].{name}"), found, expected)
                })
            });
            let text = texts.collect::<Result<Vec<_>, _>>()?.join("\n");
            message.insert("content".to_owned(), text.into());
        }
        Some(other) => {
            return Err(ApiError::invalid(
                field("content"),
                short(other),
                "a string or a list of text parts",
            ));
        }
    }
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        match arguments.as_str() {
            Some(text) if text.trim().is_empty() => *arguments = Map::new().into(),
            Some(text) => {
                if let Ok(object) = serde_json::from_str::<Map<_, _>>(text) {
                    *arguments = object.into();
                }
            }
            None => {}
        }
    }
    Ok(message.into())
}

/// The text of a part of a message, or the field that is wrong and what is expected of it.
fn text_part(part: &Value) -> Result<&str, (&'static str, &'static str)> {
    if part.get("type").is_none_or(|kind| kind != "text") {
        return Err(("type", "\"text\", the only kind of content that is supported"));
    }
    part.get("text").and_then(Value::as_str).ok_or(("text", "a string"))
}
