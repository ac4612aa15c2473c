//! `GET /openapi.json`: every address, and every field of a request with its type and default.
//!
//! Requests are taken field by field, so the document comes from a table of fields ([`fields`]), which tests hold
//! against what the server takes. A new field of a request is a new row there.

mod fields;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use crate::app::AppState;
use fields::{CHAT, COMPLETION, DETOKENIZE, EMBEDDING, Field, GENERATION, TOKENIZE};

/// What answers at an address.
struct Operation {
    path: &'static str,
    about: &'static str,
    /// The name of the request's schema and its fields; absent for a GET.
    request: Option<(&'static str, &'static [&'static [Field]])>,
    /// What an answer with status 200 is.
    answer: &'static str,
    /// The content type of the answer, besides a stream's.
    content: &'static str,
    needs_key: bool,
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

const OPERATIONS: &[Operation] = &[
    Operation {
        path: "/v1/chat/completions",
        about: "Answers the last message of a conversation.",
        request: Some(("ChatCompletionRequest", &[CHAT, GENERATION])),
        answer: "A chat.completion, or with `stream` chat.completion.chunk events, then [DONE].",
        content: JSON,
        needs_key: true,
    },
    Operation {
        path: "/v1/completions",
        about: "Continues one or several prompts.",
        request: Some(("CompletionRequest", &[COMPLETION, GENERATION])),
        answer: "A text_completion, or with `stream` text_completion events, then [DONE].",
        content: JSON,
        needs_key: true,
    },
    Operation {
        path: "/v1/embeddings",
        about: "Makes one vector of each input.",
        request: Some(("EmbeddingRequest", &[EMBEDDING])),
        answer: "A list of embeddings of length 1.",
        content: JSON,
        needs_key: true,
    },
    get("/v1/models", "The one model.", "A list of models.", JSON, true),
    get("/v1/models/{model}", "A model by its name.", "A model.", JSON, true),
    Operation {
        path: "/tokenize",
        about: "Text to tokens.",
        request: Some(("TokenizeRequest", &[TOKENIZE])),
        answer: "`tokens`, their `count` and `max_model_len`.",
        content: JSON,
        needs_key: true,
    },
    Operation {
        path: "/detokenize",
        about: "Tokens to text.",
        request: Some(("DetokenizeRequest", &[DETOKENIZE])),
        answer: "`prompt`, the text.",
        content: JSON,
        needs_key: true,
    },
    get("/metrics", "Metrics for Prometheus.", "Prometheus' text format.", TEXT, true),
    get("/version", "The server's version.", "`version`.", JSON, true),
    get("/openapi.json", "This document.", "An OpenAPI document.", JSON, true),
    get("/health", "Whether the engine works; 503 when it is dead or stuck.", "`status`.", JSON, false),
    get("/ready", "Whether requests are accepted; 503 when not.", "`status`.", JSON, false),
];

const fn get(
    path: &'static str,
    about: &'static str,
    answer: &'static str,
    content: &'static str,
    needs_key: bool,
) -> Operation {
    Operation { path, about, request: None, answer, content, needs_key }
}

/// `GET /openapi.json`.
pub(crate) async fn openapi(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(document(state.options.metrics_on_admin_only))
}

/// The document; without the metrics' address if that is the admin's alone.
fn document(metrics_on_admin_only: bool) -> Value {
    let (mut paths, mut schemas) = (Map::new(), Map::new());
    let served = |operation: &&Operation| !(metrics_on_admin_only && operation.path == "/metrics");
    for operation in OPERATIONS.iter().filter(served) {
        let method = if operation.request.is_some() { "post" } else { "get" };
        paths.insert(operation.path.to_owned(), json!({ method: described(operation) }));
        if let Some((name, fields)) = operation.request {
            schemas.insert(name.to_owned(), object_schema(fields));
        }
    }
    schemas.insert("Error".to_owned(), error_schema());
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Nibble", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
        },
    })
}

fn described(operation: &Operation) -> Value {
    let error = json!({
        "description": "An error.",
        "content": { JSON: { "schema": { "$ref": "#/components/schemas/Error" } } },
    });
    let mut content = json!({ operation.content: {} });
    let mut described = json!({ "summary": operation.about });
    if let Some((name, fields)) = operation.request {
        let schema = json!({ "$ref": format!("#/components/schemas/{name}") });
        described["requestBody"] = json!({ "required": true, "content": { JSON: { "schema": schema } } });
        if fields.iter().any(|fields| fields.iter().any(|field| field.name == "stream")) {
            content["text/event-stream"] = json!({});
        }
    }
    if operation.path.contains("{model}") {
        let parameter =
            json!({ "name": "model", "in": "path", "required": true, "schema": { "type": "string" } });
        described["parameters"] = json!([parameter]);
    }
    described["responses"] = json!({
        "200": { "description": operation.answer, "content": content },
        "default": error,
    });
    // Without keys nothing is demanded: {} is the alternative that says so.
    described["security"] = if operation.needs_key { json!([{ "key": [] }, {}]) } else { json!([]) };
    described
}

fn object_schema(fields: &[&[Field]]) -> Value {
    let all = || fields.iter().flat_map(|fields| fields.iter());
    let properties: Map<String, Value> = all().map(|field| (field.name.to_owned(), field.schema())).collect();
    let required: Vec<&str> = all().filter(|field| field.is_required()).map(|field| field.name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn error_schema() -> Value {
    let text_or_null = json!({ "type": ["string", "null"] });
    json!({
        "type": "object",
        "properties": { "error": {
            "type": "object",
            "properties": {
                "message": { "type": "string" },
                "type": { "type": "string" },
                "param": text_or_null,
                "code": text_or_null,
            },
            "required": ["message", "type", "param", "code"],
        } },
        "required": ["error"],
    })
}

#[cfg(test)]
mod tests;
