//! Requests that are refused: status, code and the field that is to blame.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Server, post};

/// A body with one field replaced.
fn with(path: &str, field: &str, value: Value) -> Value {
    let mut body = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "a"}]}),
        _ => json!({"prompt": "a"}),
    };
    body[field] = value;
    body
}

#[tokio::test]
async fn a_wrong_field_is_refused_by_name() {
    let server = Server::new();
    let value = "invalid_value";
    let unsupported = "unsupported_parameter";
    let long = "a".repeat(300);
    for (path, field, wrong, param, code) in [
        (CHAT, "temperature", json!("hot"), "temperature", value),
        (CHAT, "temperature", json!(-1), "temperature", value),
        (CHAT, "temperature", json!(1e300), "temperature", value),
        (CHAT, "top_p", json!(0), "top_p", value),
        (CHAT, "top_k", json!(-2), "top_k", value),
        (CHAT, "min_p", json!(2), "min_p", value),
        (CHAT, "repetition_penalty", json!(0), "repetition_penalty", value),
        (CHAT, "frequency_penalty", json!([]), "frequency_penalty", value),
        (CHAT, "seed", json!(1.5), "seed", value),
        (CHAT, "n", json!(0), "n", value),
        (CHAT, "n", json!(1_000_000), "n", value),
        (CHAT, "logit_bias", json!({"a": 1}), "logit_bias", value),
        (CHAT, "logit_bias", json!({"5": 101}), "logit_bias", value),
        (CHAT, "logit_bias", json!({"257": 1}), "logit_bias", value),
        (CHAT, "stop", json!(""), "stop", value),
        (CHAT, "stop", json!([1]), "stop", value),
        (CHAT, "stop", json!(vec!["x"; 17]), "stop", value),
        (CHAT, "stop_token_ids", json!([257]), "stop_token_ids", value),
        (CHAT, "stream", json!("yes"), "stream", value),
        (CHAT, "stream_options", json!({"include_usage": true}), "stream_options", value),
        (CHAT, "max_tokens", json!(-1), "max_tokens", value),
        (CHAT, "max_completion_tokens", json!(0), "max_completion_tokens", value),
        (CHAT, "max_tokens", json!(0), "max_tokens", value),
        (CHAT, "max_tokens", json!(4_000_000_000_u32), "messages", "context_length_exceeded"),
        (CHAT, "top_logprobs", json!(2), "top_logprobs", value),
        (CHAT, "messages", json!([]), "messages", value),
        (CHAT, "messages", json!("hello"), "messages", value),
        (CHAT, "messages", json!([{"content": "a"}]), "messages[0].role", "missing_required_parameter"),
        (CHAT, "messages", json!([{"role": 1}]), "messages[0].role", value),
        (CHAT, "messages", json!([{"role": "user", "content": 1}]), "messages[0].content", value),
        (CHAT, "messages", json!([{"role": "user", "content": ""}]), "messages", value),
        (
            CHAT,
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0].type",
            value,
        ),
        (CHAT, "messages", json!([{"role": "stranger"}]), "messages", "chat_template_error"),
        (CHAT, "messages", json!([{"role": "user", "content": long}]), "messages", "context_length_exceeded"),
        (CHAT, "messages", Value::Null, "messages", "missing_required_parameter"),
        (CHAT, "model", json!("gpt-4"), "model", "model_not_found"),
        (CHAT, "tools", json!([{"type": "function"}]), "tools[0]", value),
        (CHAT, "tools", json!([{"type": "function", "function": {"name": "f"}}]), "tools", value),
        (CHAT, "tool_choice", json!("required"), "tool_choice", value),
        (CHAT, "tool_choice", json!({"type": "allowed_tools"}), "tool_choice", value),
        (CHAT, "parallel_tool_calls", json!(1), "parallel_tool_calls", value),
        (CHAT, "response_format", json!({"type": "xml"}), "response_format.type", value),
        (CHAT, "response_format", json!({"type": "json_schema"}), "response_format", value),
        (CHAT, "structured_outputs", json!({}), "structured_outputs", value),
        (CHAT, "structured_outputs", json!({"choice": []}), "structured_outputs.choice", value),
        (CHAT, "structured_outputs", json!({"choice": ["a"], "regex": "a"}), "structured_outputs", value),
        (CHAT, "structured_outputs", json!({"regex": "("}), "structured_outputs.regex", value),
        (CHAT, "structured_outputs", json!({"json": "{"}), "structured_outputs.json", value),
        (CHAT, "structured_outputs", json!({"grammar": "start: x"}), "structured_outputs.grammar", value),
        (CHAT, "guided_json", json!({}), "guided_json", unsupported),
        (
            CHAT,
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}),
            "response_format.json_schema.schema",
            value,
        ),
        (CHAT, "functions", json!([{"name": "f"}]), "functions", unsupported),
        (CHAT, "function_call", json!({"name": "f"}), "function_call", unsupported),
        (CHAT, "use_beam_search", json!(true), "use_beam_search", unsupported),
        (CHAT, "length_penalty", json!(0.5), "length_penalty", unsupported),
        (CHAT, "mm_processor_kwargs", json!({}), "mm_processor_kwargs", unsupported),
        (CHAT, "logits_processors", json!(["x"]), "logits_processors", unsupported),
        (CHAT, "kv_transfer_params", json!({}), "kv_transfer_params", unsupported),
        (CHAT, "vllm_xargs", json!({"a": 1}), "vllm_xargs", unsupported),
        (CHAT, "repetition_min_count", json!(3), "repetition_min_count", unsupported),
        (CHAT, "chat_template", json!("{{ 1 }}"), "chat_template", value),
        (
            CHAT,
            "chat_template_kwargs",
            json!({"chat_template": "x"}),
            "chat_template_kwargs.chat_template",
            value,
        ),
        (CHAT, "continue_final_message", json!(1), "continue_final_message", value),
        (CHAT, "reasoning_effort", json!("much"), "reasoning_effort", value),
        (CHAT, "include_reasoning", json!("no"), "include_reasoning", value),
        (CHAT, "allowed_token_ids", json!([]), "allowed_token_ids", value),
        (CHAT, "allowed_token_ids", json!([257]), "allowed_token_ids", value),
        (CHAT, "bad_words", json!([""]), "bad_words[0]", value),
        (CHAT, "bad_words", json!(vec!["x"; 257]), "bad_words", value),
        (CHAT, "prompt_logprobs", json!(21), "prompt_logprobs", value),
        (CHAT, "prompt_logprobs", json!(-2), "prompt_logprobs", value),
        (CHAT, "truncate_prompt_tokens", json!(0), "truncate_prompt_tokens", value),
        (CHAT, "truncate_prompt_tokens", json!(257), "truncate_prompt_tokens", value),
        (CHAT, "request_id", json!(""), "request_id", value),
        (CHAT, "cache_salt", json!(""), "cache_salt", value),
        (CHAT, "priority", json!(2_147_483_648_u64), "priority", value),
        (CHAT, "return_token_ids", json!(1), "return_token_ids", value),
        (CHAT, "spaces_between_special_tokens", json!(1), "spaces_between_special_tokens", value),
        (COMPLETIONS, "include_reasoning", json!(false), "include_reasoning", unsupported),
        (COMPLETIONS, "prompt_embeds", json!("x"), "prompt_embeds", unsupported),
        (CHAT, "temprature", json!(1), "temprature", "unknown_parameter"),
        (COMPLETIONS, "prompt", json!(""), "prompt", value),
        (COMPLETIONS, "prompt", json!([]), "prompt", value),
        (COMPLETIONS, "prompt", json!([[]]), "prompt", value),
        (COMPLETIONS, "prompt", json!({}), "prompt", value),
        (COMPLETIONS, "prompt", json!([-1]), "prompt", value),
        (COMPLETIONS, "prompt", json!([257]), "prompt", value),
        (COMPLETIONS, "prompt", json!(vec!["a"; 1025]), "prompt", value),
        (COMPLETIONS, "prompt", Value::Null, "prompt", "missing_required_parameter"),
        (COMPLETIONS, "max_tokens", json!(0), "max_tokens", value),
        (COMPLETIONS, "max_tokens", json!(256), "prompt", "context_length_exceeded"),
        (COMPLETIONS, "min_tokens", json!(17), "min_tokens", value),
        (COMPLETIONS, "logprobs", json!(21), "logprobs", value),
        (COMPLETIONS, "suffix", json!("x"), "suffix", unsupported),
        (COMPLETIONS, "best_of", json!(3), "best_of", unsupported),
    ] {
        let (status, body) = server.post(path, with(path, field, wrong.clone())).await;
        let error = &body["error"];
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!(param), &json!(code)),
            "{field}: {wrong}: {body}"
        );
        assert_eq!(error["type"], "invalid_request_error");
        let expected = if code == "model_not_found" { 404 } else { 400 };
        assert_eq!(status, expected, "{body}");
        assert!(error["message"].as_str().unwrap().len() > 10, "{body}");
    }
    server.eventually("nothing runs", |stats| stats.running == 0 && stats.waiting == 0).await;
}

#[tokio::test]
async fn log_probabilities_of_prompts_are_not_streamed_and_bounded() {
    let server = Server::new();
    let message = json!([{"role": "user", "content": "a"}]);
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "a", "stream": true, "prompt_logprobs": 1})),
        (CHAT, json!({"messages": message, "stream": true, "prompt_logprobs": 0})),
        (COMPLETIONS, json!({"prompt": "a".repeat(200), "prompt_logprobs": -1, "n": 40})),
    ] {
        let (status, answer) = server.post(path, body).await;
        assert_eq!(
            (status.as_u16(), &answer["error"]["param"]),
            (400, &json!("prompt_logprobs")),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_template_s_own_words_reach_the_client() {
    let (_, body) = Server::new().post(CHAT, json!({"messages": [{"role": "stranger"}]})).await;
    assert!(body["error"]["message"].as_str().unwrap().ends_with("I do not talk to strangers"), "{body}");
}

#[tokio::test]
async fn whatever_is_sent_the_error_has_a_body() {
    let server = Server::new();
    let empty = || Body::empty();
    let plain = Request::post(CHAT).header("content-type", "text/plain").body(Body::from("{}")).unwrap();
    for (request, status, code) in [
        (post(CHAT, "{\"messages\": "), 400, "invalid_json"),
        (post(CHAT, "[]"), 400, "invalid_json"),
        (post(CHAT, ""), 400, "invalid_json"),
        (post(CHAT, vec![b'{', 0xFF, b'}']), 400, "invalid_json"),
        (post(CHAT, format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))), 400, "invalid_json"),
        (
            post(COMPLETIONS, format!("{{\"prompt\": \"{}\"}}", "a".repeat(10 << 20))),
            413,
            "request_too_large",
        ),
        (plain, 415, "unsupported_content_type"),
        (Request::post(CHAT).body(Body::from("{}")).unwrap(), 415, "unsupported_content_type"),
        (Request::get(CHAT).body(empty()).unwrap(), 405, "method_not_allowed"),
        (Request::delete("/health").body(empty()).unwrap(), 405, "method_not_allowed"),
        (Request::get("/v2/nothing").body(empty()).unwrap(), 404, "unknown_url"),
        (Request::get("/v1/models/gpt-4").body(empty()).unwrap(), 404, "model_not_found"),
    ] {
        let (found, headers, body) = server.send(request).await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((found.as_u16(), &body["error"]["code"]), (status, &json!(code)), "{body}");
        assert!(headers.contains_key("x-request-id"));
    }
}
