//! The OpenAPI document, held against what the server does.

use nibble_server::ServerOptions;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Options, Server, post};

async fn document(server: &Server) -> Value {
    let (status, body) = server.get("/openapi.json").await;
    assert_eq!(status, 200);
    serde_json::from_str(&body).unwrap()
}

/// A value that `schema` allows.
fn sample(schema: &Value) -> Value {
    if let Some(default) = schema.get("default") {
        return default.clone();
    }
    let one = schema["anyOf"].as_array().and_then(|kinds| kinds.first()).unwrap_or(schema);
    match one["type"].as_str().unwrap() {
        "boolean" => json!(true),
        "integer" => json!(one["minimum"].as_i64().unwrap_or(0).max(1)),
        "number" => one["minimum"].clone(),
        "string" => one["enum"].as_array().map_or(json!("alphabet"), |words| words[0].clone()),
        "array" => json!([]),
        "object" => json!({}),
        other => panic!("{other}"),
    }
}

fn schema_of<'a>(document: &'a Value, operation: &Value) -> &'a Value {
    let reference =
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
    document.pointer(reference.trim_start_matches('#')).unwrap()
}

#[tokio::test]
async fn every_documented_field_is_known_and_every_other_is_not() {
    let server = Server::new();
    let document = document(&server).await;
    let mut sent = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(operation) = methods.get("post") else { continue };
        let schema = schema_of(&document, operation);
        let mut body = json!({});
        for required in schema["required"].as_array().unwrap() {
            let name = required.as_str().unwrap();
            body[name] = if name == "messages" {
                json!([{"role": "user", "content": "x"}])
            } else {
                sample(&schema["properties"][name])
            };
        }
        for (name, property) in schema["properties"].as_object().unwrap() {
            let mut body = body.clone();
            if body.get(name).is_none() {
                body[name] = sample(property);
            }
            let (_, answer) = server.post(path, body).await;
            let code = &answer["error"]["code"];
            assert!(
                code != "unknown_parameter" && code != "unsupported_parameter",
                "{path} {name}: {answer}"
            );
            sent += 1;
        }
        body["undocumented"] = json!(1);
        let (_, answer) = server.post(path, body).await;
        assert_eq!(answer["error"]["code"], "unknown_parameter", "{path}");
    }
    assert!(sent > 60, "{sent} fields are documented");
}

#[tokio::test]
async fn defaults_are_what_leaving_a_field_out_means() {
    let server = Server::new();
    let document = document(&server).await;
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "a", "seed": 1, "max_tokens": 8})),
        (CHAT, json!({"messages": [{"role": "user", "content": "a"}], "seed": 1, "max_tokens": 8})),
    ] {
        let mut with_defaults = body.clone();
        let schema = schema_of(&document, &document["paths"][path]["post"]);
        for (name, property) in schema["properties"].as_object().unwrap() {
            if let Some(default) = property.get("default") {
                with_defaults[name] = default.clone();
            }
        }
        let text = |answer: &Value| (answer["choices"].clone(), answer["usage"].clone());
        let (left_out, given) = (server.ok(path, body).await, server.ok(path, with_defaults).await);
        assert_eq!(text(&left_out), text(&given), "{path}");
    }
}

#[tokio::test]
async fn every_documented_address_is_there() {
    let server = Server::new();
    for (path, methods) in document(&server).await["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "alphabet");
        let status = match methods.get("get") {
            Some(_) => server.get(&path).await.0,
            None => server.send(post(&path, "{}")).await.0,
        };
        let expected = if methods.get("get").is_some() { 200 } else { 400 };
        assert_eq!(status, expected, "{path}");
    }
    let options = ServerOptions { metrics_on_admin_only: true, ..ServerOptions::default() };
    let server = Server::with(Options { server: options, ..Options::default() });
    assert!(document(&server).await["paths"].get("/metrics").is_none());
}
