use std::collections::BTreeSet;

use super::*;
use crate::openai::fields::{Fields, WITHOUT_EFFECT};
use crate::openai::types::chat::ChatRequest;
use crate::openai::types::completions::CompletionRequest;
use crate::openai::types::embeddings::EmbeddingRequest;

/// Names of the fields that the document has for the schema `name`.
fn documented(name: &str) -> BTreeSet<String> {
    let document = document(false);
    let properties = &document["components"]["schemas"][name]["properties"];
    properties.as_object().unwrap().keys().cloned().collect()
}

/// Names that reading a request takes, and those that are accepted without being taken.
fn accepted<T: TryFrom<Fields>>(body: &Value) -> BTreeSet<String>
where
    T::Error: std::fmt::Debug,
{
    let fields = Fields::parse(body.to_string().as_bytes(), None).unwrap();
    let taken = fields.taken();
    T::try_from(fields).unwrap_or_else(|error| panic!("{error:?}"));
    let taken = taken.lock().unwrap().clone();
    taken.into_iter().chain(WITHOUT_EFFECT.map(str::to_owned)).collect()
}

#[test]
fn the_fields_of_requests_are_documented_all_and_no_others() {
    let chat = accepted::<ChatRequest>(&json!({ "messages": [] }));
    assert_eq!(chat, documented("ChatCompletionRequest"), "left: taken, right: in openapi/fields.rs");
    let completion = accepted::<CompletionRequest>(&json!({ "prompt": "" }));
    assert_eq!(completion, documented("CompletionRequest"), "left: taken, right: in openapi/fields.rs");
    let embedding = accepted::<EmbeddingRequest>(&json!({ "input": "" }));
    assert_eq!(embedding, documented("EmbeddingRequest"), "left: taken, right: in openapi/fields.rs");
}

#[test]
fn no_field_is_documented_twice_for_a_request() {
    for (name, fields) in OPERATIONS.iter().filter_map(|operation| operation.request) {
        let names: Vec<&str> =
            fields.iter().flat_map(|fields| fields.iter()).map(|field| field.name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{name}");
    }
}

#[test]
fn the_routes_are_documented_all_and_no_others() {
    let source = include_str!("../../app.rs");
    let admin = source.find("pub fn admin_router").unwrap();
    let routes: BTreeSet<&str> = source
        .match_indices(".route(\"")
        .filter(|&(at, _)| {
            at < admin
                || source[at..].starts_with(".route(\"/health")
                || source[at..].starts_with(".route(\"/ready")
        })
        .map(|(at, found)| source[at + found.len()..].split('"').next().unwrap())
        .collect();
    let paths: BTreeSet<String> =
        OPERATIONS.iter().map(|operation| operation.path.replace("{model}", "{*model}")).collect();
    assert_eq!(routes, paths.iter().map(String::as_str).collect());
}
