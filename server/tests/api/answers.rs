//! Answers in one body.

use nibble_model::generation_config::GenerationConfig;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, END, MAXIMUM_TOKENS, Options, Server};

const ALPHABET: &str = "bcdefghijklmnopqrstuvwxyz";

#[tokio::test]
async fn a_chat_is_answered_to_the_end_of_the_sequence() {
    let body = json!({"model": "alphabet", "messages": [{"role": "user", "content": "a"}], "temperature": 0});
    let answer = Server::new().ok(CHAT, body).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "alphabet");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = json!({
        "index": 0, "message": {"role": "assistant", "content": ALPHABET, "refusal": null},
        "logprobs": null, "finish_reason": "stop", "stop_reason": null,
    });
    assert_eq!(answer["choices"], json!([choice]));
    // The end-of-sequence token was generated, too.
    assert_eq!(answer["usage"], json!({"prompt_tokens": 1, "completion_tokens": 26, "total_tokens": 27}));
}

#[tokio::test]
async fn a_completion_has_16_tokens_unless_asked_otherwise() {
    let server = Server::new();
    let answer = server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0})).await;
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["choices"][0]["text"], ALPHABET[..16]);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let answer = server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "max_tokens": 3})).await;
    assert_eq!(answer["choices"][0]["text"], "bcd");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn a_chat_without_max_tokens_takes_what_fits() {
    let body = json!({
        "messages": [{"role": "user", "content": "a"}], "temperature": 0, "ignore_eos": true,
        "logit_bias": {END.to_string(): -100},
    });
    let answer = Server::new().ok(CHAT, body).await;
    assert_eq!(answer["usage"]["total_tokens"], MAXIMUM_TOKENS);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn every_form_of_a_prompt_is_continued() {
    let server = Server::new();
    for (prompt, texts) in [
        (json!("ax"), vec!["yz"]),
        (json!(["x", "y"]), vec!["yz", "z"]),
        (json!([97, 120]), vec!["yz"]),
        (json!([[120], [97, 121]]), vec!["yz", "z"]),
    ] {
        let answer = server.ok(COMPLETIONS, json!({"prompt": prompt, "temperature": 0})).await;
        let answers: Vec<&Value> = answer["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
        assert_eq!(answers, texts, "{prompt}");
    }
}

#[tokio::test]
async fn n_choices_of_each_prompt_come_in_order_and_prompts_count_once() {
    let body = json!({"prompt": ["ax", "y"], "n": 2, "temperature": 0});
    let answer = Server::new().ok(COMPLETIONS, body).await;
    let texts: Vec<_> =
        answer["choices"].as_array().unwrap().iter().map(|c| (&c["index"], &c["text"])).collect();
    assert_eq!(json!(texts), json!([[0, "yz"], [1, "yz"], [2, "z"], [3, "z"]]));
    assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}));
}

#[tokio::test]
async fn choices_with_a_seed_differ_from_each_other_and_not_from_run_to_run() {
    let server = Server::new();
    let body =
        json!({"prompt": "a", "n": 2, "temperature": 5, "seed": -7, "max_tokens": 30, "ignore_eos": true});
    let first = server.ok(COMPLETIONS, body.clone()).await["choices"].clone();
    assert_ne!(first[0]["text"], first[1]["text"]);
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"], first);
}

#[tokio::test]
async fn echo_begins_with_the_prompt() {
    let server = Server::new();
    for prompt in [json!("ax"), json!([97, 120])] {
        let answer = server.ok(COMPLETIONS, json!({"prompt": prompt, "echo": true, "temperature": 0})).await;
        assert_eq!(answer["choices"][0]["text"], "axyz");
    }
}

#[tokio::test]
async fn stop_strings_end_the_text_before_them() {
    let server = Server::new();
    let body = json!({"prompt": "a", "stop": ["zzz", "ef"], "temperature": 0});
    let choice = &server.ok(COMPLETIONS, body).await["choices"][0];
    assert_eq!(choice["text"], "bcd");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("ef")));
    let body = json!({"prompt": "a", "stop": "ef", "include_stop_str_in_output": true, "temperature": 0});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "bcdef");
    // Five tokens first: the stop string among them does not count.
    let body = json!({"prompt": "a", "stop": ["ef", "i"], "min_tokens": 6, "temperature": 0});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "bcdefgh");
    server.eventually("a stop string frees its sequence", |stats| stats.running == 0).await;
}

#[tokio::test]
async fn stop_tokens_end_the_text_and_are_named() {
    let body = json!({"prompt": "a", "stop_token_ids": [101], "temperature": 0});
    let choice = &Server::new().ok(COMPLETIONS, body).await["choices"][0];
    assert_eq!(choice["text"], "bcd");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(101)));
}

#[tokio::test]
async fn special_tokens_are_shown_on_demand() {
    let server = Server::new();
    let mut body = json!({"prompt": "x", "temperature": 0, "max_tokens": 4, "ignore_eos": true});
    assert_eq!(server.ok(COMPLETIONS, body.clone()).await["choices"][0]["text"], "yza");
    body["skip_special_tokens"] = false.into();
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "yz<|end|>a");
}

/// The log probability of a logit among one of 10, one of 5 and 255 of 0.
fn logprob(logit: f64) -> f64 {
    logit - (10_f64.exp() + 5_f64.exp() + 255.0).ln()
}

fn close(value: &Value, expected: f64) -> bool {
    (value.as_f64().unwrap() - expected).abs() < 1e-4
}

#[tokio::test]
async fn logprobs_of_a_completion_come_in_columns() {
    let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 2, "logprobs": 2});
    let logprobs = &Server::new().ok(COMPLETIONS, body).await["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["b", "c"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
    assert!(close(&logprobs["token_logprobs"][1], logprob(10.0)));
    let top = logprobs["top_logprobs"][1].as_object().unwrap();
    assert_eq!(top.keys().collect::<Vec<_>>(), ["c", "?"]);
    assert!(close(&top["?"], logprob(5.0)));
}

#[tokio::test]
async fn logprobs_of_a_chat_come_by_token_with_true_bytes() {
    let body = json!({
        "messages": [{"role": "user", "content": "!"}], "temperature": 0, "max_tokens": 1,
        "logprobs": true, "top_logprobs": 1,
    });
    let choice = &Server::new().ok(CHAT, body).await["choices"][0];
    let entry = &choice["logprobs"]["content"][0];
    // The first byte of a crab alone is no text.
    assert_eq!((&entry["token"], &entry["bytes"]), (&json!("\u{FFFD}"), &json!([0xF0])));
    assert!(close(&entry["logprob"], logprob(10.0)));
    assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 1);
    assert_eq!(choice["message"]["content"], "\u{FFFD}");
}

#[tokio::test]
async fn parts_of_a_message_are_joined_and_variables_reach_the_template() {
    let parts = json!([{"type": "text", "text": "q"}, {"type": "text", "text": "u"}]);
    let body = json!({
        "messages": [{"role": "system", "content": parts}], "temperature": 0,
        "chat_template_kwargs": {"suffix": "x"},
    });
    let answer = Server::new().ok(CHAT, body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "yz");
    assert_eq!(answer["usage"]["prompt_tokens"], "q\nux".len());
}

#[tokio::test]
async fn fields_without_effect_and_neutral_values_are_accepted() {
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "temperature": 0, "user": "u", "metadata": {"a": "b"},
        "store": false, "service_tier": "auto", "parallel_tool_calls": true, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "stop": null, "stream_options": null, "top_k": -1, "priority": 0,
    });
    assert_eq!(Server::new().ok(CHAT, body).await["choices"][0]["message"]["content"], "yz");
}

#[tokio::test]
async fn texts_and_tokens_are_turned_into_each_other() {
    let server = Server::new();
    let tokens = server.ok("/tokenize", json!({"prompt": "ab"})).await;
    assert_eq!(tokens, json!({"tokens": [97, 98], "count": 2, "max_model_len": MAXIMUM_TOKENS}));
    assert_eq!(server.ok("/detokenize", json!({"tokens": [97, 256]})).await, json!({"prompt": "a<|end|>"}));
}

#[tokio::test]
async fn a_model_without_a_template_completes_and_refuses_chats_clearly() {
    let server = Server::with(Options { chat_template: None, ..Options::default() });
    let (status, body) = server.post(CHAT, json!({"messages": [{"role": "user", "content": "a"}]})).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (400, &json!("no_chat_template")));
    assert_eq!(
        server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await["choices"][0]["text"],
        "yz"
    );
}

#[tokio::test]
async fn the_model_s_own_defaults_count_where_the_request_says_nothing() {
    let generation_config = GenerationConfig { top_k: Some(1), ..GenerationConfig::default() };
    let server = Server::with(Options { generation_config, ..Options::default() });
    let body = json!({"prompt": "a", "temperature": 20});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], ALPHABET[..16]);
    let body = json!({"prompt": "a", "temperature": 20, "top_k": 0});
    assert_ne!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], ALPHABET[..16]);
}
