//! Answers in a form that was asked for, by a model that would rather say the alphabet.

use nibble_engine::EngineConfig;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Options, Server};

fn chat(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "temperature": 0})
}

#[tokio::test]
async fn every_form_is_followed_on_both_endpoints_and_ends_with_stop() {
    let server = Server::new();
    let format =
        |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for (field, value, text) in [
        ("structured_outputs", json!({"choice": ["abc", "xyz"]}), "xyz"),
        ("structured_outputs", json!({"regex": "x[0-9]-?[u-z]{3}"}), "x0-uvw"),
        ("structured_outputs", json!({"grammar": "start: \"<\" /[x-z]{2}/ \">\""}), "<xy>"),
        ("structured_outputs", json!({"json": {"const": "x\"y"}}), r#""x\"y""#),
        ("structured_outputs", json!({"json": "{\"enum\": [true]}"}), "true"),
        ("response_format", format(json!({"enum": [null]})), "null"),
    ] {
        let mut body = chat("w");
        body[field] = value.clone();
        let answer = server.ok(CHAT, body.clone()).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], text, "{value}");
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(answer["usage"]["completion_tokens"], text.len() + 1, "the end of sequence is one more");
        let events = server.stream(CHAT, body.clone()).await;
        let streamed = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(streamed.collect::<String>(), text);
        body["prompt"] = "w".into();
        body.as_object_mut().unwrap().remove("messages");
        let answer = server.ok(COMPLETIONS, body).await;
        assert_eq!(answer["choices"][0]["text"], text[..text.len().min(16)]);
    }
}

#[tokio::test]
async fn a_json_object_is_one_whatever_is_sampled() {
    let server = Server::new();
    let mut body = chat("w");
    body["response_format"] = json!({"type": "json_object"});
    body["temperature"] = json!(1);
    // Without a preference of its own the model says anything: that ends.
    body["logit_bias"] =
        (b' '..=b'~').map(|byte| (byte.to_string(), json!(-20))).collect::<serde_json::Map<_, _>>().into();
    body["logit_bias"]["125"] = json!(20);
    body["n"] = json!(8);
    body["seed"] = json!(7);
    for choice in server.ok(CHAT, body).await["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop");
        let text = choice["message"]["content"].as_str().unwrap();
        assert!(serde_json::from_str::<Value>(text).unwrap().is_object(), "{text}");
    }
}

#[tokio::test]
async fn log_probabilities_stay_the_model_s_own() {
    let server = Server::new();
    let mut body = chat("w");
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(1);
    body["structured_outputs"] = json!({"choice": ["b"]});
    let answer = server.ok(CHAT, body).await;
    let entry = &answer["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["token"], "b");
    assert_eq!(entry["top_logprobs"][0]["token"], "x", "what the model would have said");
    let difference =
        entry["top_logprobs"][0]["logprob"].as_f64().unwrap() - entry["logprob"].as_f64().unwrap();
    assert!((difference - 10.0).abs() < 1e-4, "{difference}");
}

#[tokio::test]
async fn where_no_token_is_left_a_complete_answer_ends_and_another_fails_by_name() {
    let server = Server::new();
    let mut body = chat("w");
    // "a", "b" and no end of sequence.
    body["allowed_token_ids"] = json!([97, 98]);
    body["structured_outputs"] = json!({"regex": "ab(c|d)?"});
    let choice = &server.ok(CHAT, body.clone()).await["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("ab"), &json!("stop")));
    body["structured_outputs"] = json!({"regex": "ab(c|d)"});
    let (status, answer) = server.post(CHAT, body.clone()).await;
    assert_eq!((status.as_u16(), &answer["error"]["code"]), (400, &json!("no_token_left")), "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("allowed_token_ids") && message.contains("structured output"), "{message}");
    let events = server.stream(CHAT, body.clone()).await;
    let error = &events.last().unwrap()["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("no_token_left"), &json!("invalid_request_error")));
    // Its neighbours go on.
    body["structured_outputs"] = json!({"choice": ["ab"]});
    assert_eq!(server.ok(CHAT, body).await["choices"][0]["message"]["content"], "ab");
}

#[tokio::test]
async fn guesses_are_made_within_a_form_and_change_nothing() {
    let schema = json!({
        "type": "object",
        "properties": {"alphabetical": {"type": "boolean"}, "alphabetically": {"type": "array", "items": {
            "type": "object", "properties": {"longer_name": {"enum": ["one and the same text"]}},
            "required": ["longer_name"], "additionalProperties": false,
        }, "minItems": 2, "maxItems": 2}},
        "required": ["alphabetical", "alphabetically"],
        "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false},
    });
    let mut answers = Vec::new();
    for max_draft_tokens in [0, 5] {
        let engine = EngineConfig { max_draft_tokens, ..EngineConfig::default() };
        let server = Server::with(Options { engine, ..Options::default() });
        let mut body = chat("w");
        body["temperature"] = json!(1.5);
        body["seed"] = json!(4);
        body["n"] = json!(3);
        body["logprobs"] = json!(true);
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        let answer = server.ok(CHAT, body).await;
        for choice in answer["choices"].as_array().unwrap() {
            let content: Value =
                serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
            assert!(
                content["alphabetical"].is_boolean()
                    && content["alphabetically"][1]["longer_name"].is_string()
            );
        }
        answers.push(answer["choices"].clone());
        let stats = server.engine.stats();
        let right = stats.accepted_draft_tokens.iter().sum::<u64>();
        assert_eq!(right > 100, max_draft_tokens > 0, "{stats:?}");
        let length = answer["usage"]["completion_tokens"].as_u64().unwrap() / 3;
        assert_eq!(
            stats.steps < length / 2,
            max_draft_tokens > 0,
            "{} steps for {length} tokens",
            stats.steps
        );
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn what_a_form_contradicts_is_refused_and_its_end_comes_before_min_tokens() {
    let server = Server::new();
    let mut body = chat("w");
    body["structured_outputs"] = json!({"choice": ["xyz"]});
    body["min_tokens"] = json!(10);
    assert_eq!(server.ok(CHAT, body.clone()).await["choices"][0]["message"]["content"], "xyz");
    body["n"] = json!(129);
    let (status, answer) = server.post(CHAT, body.clone()).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("n")));
    body["n"] = json!(128);
    assert_eq!(server.ok(CHAT, body.clone()).await["choices"][127]["message"]["content"], "xyz");
    body["ignore_eos"] = json!(true);
    let (status, answer) = server.post(CHAT, body.clone()).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("ignore_eos")));
    body["response_format"] = json!({"type": "json_object"});
    let (status, answer) = server.post(CHAT, body).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("structured_outputs")));
}
