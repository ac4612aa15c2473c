//! The fields that say what form an answer must have: OpenAI's `response_format`, vLLM's `structured_outputs`.

use serde::Deserialize;
use serde_json::Value;

use crate::grammar::Grammar;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

/// The form of an answer, and the field that asks for it.
#[derive(Debug)]
pub(crate) struct StructuredOutput {
    pub(crate) grammar: Grammar,
    pub(crate) param: &'static str,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchemaFormat },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchemaFormat {
    /// For the client's own use, as the description.
    #[serde(rename = "name")]
    _name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    schema: Value,
    /// Schemas are always followed to the letter.
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StructuredOutputs {
    /// A schema, or the text of one.
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
}

impl StructuredOutput {
    /// Takes the fields; `None` when the form is free.
    pub(crate) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        const FORMAT: &str = "response_format";
        const OUTPUTS: &str = "structured_outputs";
        let format = match fields.take(FORMAT, "an object with a type")? {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some((Grammar::json_object(), FORMAT)),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some((Grammar::JsonSchema(json_schema.schema), "response_format.json_schema.schema"))
            }
        };
        let outputs =
            fields.take(OUTPUTS, "an object with one of json, json_object, regex, choice and grammar")?;
        let outputs = outputs.map(grammar_of).transpose()?;
        if format.is_some() && outputs.is_some() {
            return Err(ApiError::invalid(OUTPUTS, "given beside response_format", "one of them"));
        }
        Ok(format.or(outputs).map(|(grammar, param)| Self { grammar, param }))
    }
}

fn grammar_of(outputs: StructuredOutputs) -> Result<(Grammar, &'static str), ApiError> {
    let StructuredOutputs { json, json_object, regex, choice, grammar } = outputs;
    let json = json
        .map(schema_of)
        .transpose()?
        .map(|schema| (Grammar::JsonSchema(schema), "structured_outputs.json"));
    let object = json_object
        .filter(|&wanted| wanted)
        .map(|_| (Grammar::json_object(), "structured_outputs.json_object"));
    let regex = regex.map(|regex| (Grammar::Regex(regex), "structured_outputs.regex"));
    let choice = choice.map(|choices| (Grammar::Choice(choices), "structured_outputs.choice"));
    let grammar = grammar.map(|grammar| (Grammar::Lark(grammar), "structured_outputs.grammar"));
    let mut given = [json, object, regex, choice, grammar].into_iter().flatten();
    match (given.next(), given.next()) {
        (Some((Grammar::Choice(choices), param)), None) if choices.is_empty() => {
            Err(ApiError::invalid(param, "[]", "at least one text"))
        }
        (Some(one), None) => Ok(one),
        (first, _) => {
            let found = if first.is_none() { "empty" } else { "several" };
            let expected = "exactly one of json, json_object, regex, choice and grammar";
            Err(ApiError::invalid("structured_outputs", found, expected))
        }
    }
}

fn schema_of(json: Value) -> Result<Value, ApiError> {
    match json {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid("structured_outputs.json", error, "a JSON schema")),
        schema => Ok(schema),
    }
}
