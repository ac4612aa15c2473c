//! Embeddings, by a model whose hidden states are the token, its position, 3 and 4.

use serde_json::{Value, json};

use crate::support::{COMPLETIONS, MAXIMUM_TOKENS, Options, Server};

const EMBEDDINGS: &str = "/v1/embeddings";

/// The numbers scaled to length 1.
fn unit(values: &[f64]) -> Vec<f64> {
    let length = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    values.iter().map(|value| value / length).collect()
}

fn assert_close(found: &Value, expected: &[f64]) {
    let found: Vec<f64> = serde_json::from_value(found.clone()).unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(
        found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6),
        "{found:?}, expected {expected:?}"
    );
}

#[tokio::test]
async fn every_form_of_an_input_is_embedded_by_its_last_token() {
    let server = Server::new();
    for (input, last) in [
        (json!("ab"), vec![(98.0, 1.0)]),
        (json!(["ab", "c"]), vec![(98.0, 1.0), (99.0, 0.0)]),
        (json!([97, 98]), vec![(98.0, 1.0)]),
        (json!([[97, 98], [100]]), vec![(98.0, 1.0), (100.0, 0.0)]),
    ] {
        let answer = server.ok(EMBEDDINGS, json!({"model": "alphabet", "input": input})).await;
        assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("alphabet")));
        let data = answer["data"].as_array().unwrap();
        assert_eq!(data.len(), last.len());
        for (index, (entry, &(token, position))) in data.iter().zip(&last).enumerate() {
            assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
            assert_close(&entry["embedding"], &unit(&[token, position, 3.0, 4.0]));
        }
    }
    let usage = &server.ok(EMBEDDINGS, json!({"input": ["ab", "c"]})).await["usage"];
    assert_eq!(*usage, json!({"prompt_tokens": 3, "total_tokens": 3}));
    server.eventually("nothing is held", |stats| stats.running == 0 && stats.kv_blocks_used == 0).await;
}

#[tokio::test]
async fn the_mean_is_taken_on_demand_and_dimensions_are_cut_before_the_length_is_1() {
    let server = Server::new();
    let mut body = json!({"input": "abc", "pooling": "mean"});
    let answer = server.ok(EMBEDDINGS, body.clone()).await;
    assert_close(&answer["data"][0]["embedding"], &unit(&[98.0, 1.0, 3.0, 4.0]));
    body["dimensions"] = 2.into();
    let answer = server.ok(EMBEDDINGS, body.clone()).await;
    assert_close(&answer["data"][0]["embedding"], &unit(&[98.0, 1.0]));
    body["truncate_prompt_tokens"] = 1.into();
    let answer = server.ok(EMBEDDINGS, body).await;
    assert_close(&answer["data"][0]["embedding"], &unit(&[99.0, 0.0]));
}

#[tokio::test]
async fn base64_holds_the_bytes_of_the_numbers() {
    let server = Server::new();
    let body = json!({"input": "\u{0}", "encoding_format": "base64", "request_id": "r"});
    let answer = server.ok(EMBEDDINGS, body).await;
    // 0, 0, 0.6 and 0.8.
    assert_eq!(answer["data"][0]["embedding"], "AAAAAAAAAACamRk/zcxMPw==");
    assert_eq!(answer["id"], "embd-r");
}

#[tokio::test]
async fn a_cached_prefix_changes_no_embedding() {
    let server = Server::new();
    let text = "abcdefghijklmnopqrstuvwxyz".repeat(4);
    for pooling in ["mean", "last"] {
        let body = json!({"input": text, "pooling": pooling});
        let first = server.ok(EMBEDDINGS, body.clone()).await["data"].clone();
        server.ok(COMPLETIONS, json!({"prompt": text, "max_tokens": 1})).await;
        assert_eq!(server.ok(EMBEDDINGS, body).await["data"], first);
    }
}

#[tokio::test]
async fn wrong_fields_are_refused_by_name() {
    let server = Server::new();
    for (field, wrong, code) in [
        ("input", json!(null), "missing_required_parameter"),
        ("input", json!(""), "invalid_value"),
        ("input", json!([]), "invalid_value"),
        ("input", json!([[]]), "invalid_value"),
        ("input", json!([257]), "invalid_value"),
        ("input", json!({}), "invalid_value"),
        ("input", json!("a".repeat(MAXIMUM_TOKENS + 1)), "context_length_exceeded"),
        ("model", json!("other"), "model_not_found"),
        ("dimensions", json!(0), "invalid_value"),
        ("dimensions", json!(5), "invalid_value"),
        ("encoding_format", json!("hex"), "invalid_value"),
        ("pooling", json!("cls"), "invalid_value"),
        ("truncate_prompt_tokens", json!(0), "invalid_value"),
        ("temperature", json!(1), "unknown_parameter"),
    ] {
        let mut body = json!({"input": "a"});
        body[field] = wrong.clone();
        let (status, answer) = server.post(EMBEDDINGS, body).await;
        assert!(status.is_client_error(), "{field}: {wrong}");
        assert_eq!(
            (&answer["error"]["param"], &answer["error"]["code"]),
            (&json!(field), &json!(code)),
            "{answer}"
        );
    }
    let without = Server::with(Options { hidden_size: None, ..Options::default() });
    let (status, answer) = without.post(EMBEDDINGS, json!({"input": "a"})).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("model")), "{answer}");
}
