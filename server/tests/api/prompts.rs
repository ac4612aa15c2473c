//! What answers tell about their prompts: echoes, log probabilities, tokens.

use std::sync::atomic::Ordering;

use nibble_engine::EngineConfig;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, END, Options, Server};

/// The log probability of a logit among one of 10, one of 5 and 255 of 0.
fn logprob(logit: f64) -> f64 {
    logit - (10_f64.exp() + 5_f64.exp() + 255.0).ln()
}

fn is_close(value: &Value, expected: f64) -> bool {
    (value.as_f64().unwrap() - expected).abs() < 1e-4
}

#[tokio::test]
async fn lists_of_tokens_are_scored_as_lm_eval_wants_them() {
    let server = Server::new();
    let prompts = json!([[97, 98, 63, 97], [120, 121, 122]]);
    for max_tokens in [0, 1] {
        let body = json!({
            "prompt": prompts, "echo": true, "max_tokens": max_tokens, "logprobs": 1, "temperature": 0, "seed": 1,
        });
        let answer = server.ok(COMPLETIONS, body).await;
        let choices = answer["choices"].as_array().unwrap();
        let expected = [(["a", "b", "?", "a", "b"], "ab?a", 4), (["x", "y", "z", "<|end|>", ""], "xyz", 3)];
        for (choice, (tokens, text, prompt_tokens)) in choices.iter().zip(expected) {
            let logprobs = &choice["logprobs"];
            let shown = prompt_tokens + max_tokens;
            // An end-of-sequence token has its place here, so that whoever cuts the last one off finds the prompt.
            assert_eq!(logprobs["tokens"], json!(tokens[..shown]), "{answer}");
            for column in ["token_logprobs", "top_logprobs", "text_offset"] {
                assert_eq!(logprobs[column].as_array().unwrap().len(), shown, "{column}");
            }
            assert_eq!(logprobs["text_offset"].as_array().unwrap()[..3], [json!(0), json!(1), json!(2)]);
            assert_eq!(
                (&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]),
                (&Value::Null, &Value::Null)
            );
            assert!(is_close(&logprobs["token_logprobs"][1], logprob(10.0)));
            assert!(choice["text"].as_str().unwrap().starts_with(text));
        }
        let logprobs = &choices[0]["logprobs"];
        assert!(is_close(&logprobs["token_logprobs"][2], logprob(5.0)), "the second best, not the best");
        assert!(is_close(&logprobs["top_logprobs"][2]["c"], logprob(10.0)));
        assert!(is_close(&logprobs["top_logprobs"][2]["?"], logprob(5.0)));
        assert_eq!(answer["usage"]["completion_tokens"], 2 * max_tokens);
        assert!(choices[0].get("prompt_logprobs").is_none(), "nobody asked for vLLM's");
        assert_eq!(choices[0]["finish_reason"], "length");
    }
    assert_eq!(server.metric("nibble:prefix_cache_queries_total").await, Some(0.0));
}

#[tokio::test]
async fn an_echo_alone_generates_nothing() {
    let answer = Server::new().ok(COMPLETIONS, json!({"prompt": "ax", "echo": true, "max_tokens": 0})).await;
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["logprobs"]),
        (&json!("ax"), &Value::Null)
    );
    assert_eq!(answer["usage"], json!({"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}));
}

#[tokio::test]
async fn prompt_logprobs_have_the_form_of_vllm() {
    let server = Server::new();
    let body = json!({"prompt": "ab?", "prompt_logprobs": 1, "temperature": 0, "max_tokens": 1});
    let answer = server.ok(COMPLETIONS, body).await;
    let prompt = &answer["choices"][0]["prompt_logprobs"];
    assert_eq!((prompt.as_array().unwrap().len(), &prompt[0]), (3, &Value::Null));
    let entry = &prompt[1]["98"];
    assert_eq!((&entry["rank"], &entry["decoded_token"]), (&json!(1), &json!("b")));
    assert!(is_close(&entry["logprob"], logprob(10.0)));
    assert_eq!(prompt[1].as_object().unwrap().len(), 1, "the best is the token itself");
    let ids: Vec<&String> = prompt[2].as_object().unwrap().keys().collect();
    assert_eq!(ids, ["63", "99"], "first the token itself");
    assert_eq!((&prompt[2]["63"]["rank"], &prompt[2]["99"]["rank"]), (&json!(2), &json!(1)));

    let message = json!([{"role": "user", "content": "ab"}]);
    let answer =
        server.ok(CHAT, json!({"messages": message, "prompt_logprobs": -1, "max_tokens": 0, "n": 2})).await;
    let prompt = &answer["prompt_logprobs"];
    assert_eq!((prompt.as_array().unwrap().len(), prompt[1].as_object().unwrap().len()), (2, 257));
    let mut ranks: Vec<u64> =
        prompt[1].as_object().unwrap().values().map(|entry| entry["rank"].as_u64().unwrap()).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, (1..=257).collect::<Vec<_>>());
    assert_eq!(answer["choices"][1]["message"]["content"], "");
}

#[tokio::test]
async fn a_prompt_is_scored_once_for_all_its_choices() {
    let prompt = "abcdef?hijklmnopqrstuvwx";
    for max_prompt_logit_rows in [1, 256] {
        let engine = EngineConfig { max_prompt_logit_rows, ..EngineConfig::default() };
        let options = Options { engine, ..Options::default() };
        let server = Server::with(options.clone());
        let rows = || options.logit_rows.swap(0, Ordering::Relaxed);
        let body = |seed: u64, n: usize, max_tokens: usize| {
            json!({"prompt": [prompt, "uv"], "prompt_logprobs": 2, "echo": true, "logprobs": 1, "temperature": 1,
                   "seed": seed, "n": n, "max_tokens": max_tokens, "ignore_eos": true, "return_token_ids": true})
        };
        let alone = |choice: u64| server.ok(COMPLETIONS, body(3 + choice, 1, 5));
        let mut expected = Vec::new();
        for choice in 0..3 {
            expected.push(alone(choice).await["choices"].clone());
        }
        rows();
        let answer = server.ok(COMPLETIONS, body(3, 3, 5)).await;
        assert_eq!(
            rows(),
            23 + 1 + 6 * 5,
            "each token of a prompt but the first once, each token of an answer"
        );
        for (at, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
            let mut alone = expected[at % 3][at / 3].clone();
            alone["index"] = at.into();
            assert_eq!(choice, &alone, "choice {at}");
        }
        let mut streamed = body(3, 3, 5);
        streamed["prompt_logprobs"].take();
        let streamed = server.stream(COMPLETIONS, streamed).await;
        for at in 0..6 {
            let of_choice = streamed.iter().filter(|event| event["choices"][0]["index"] == at);
            let texts = of_choice.map(|event| event["choices"][0]["text"].as_str().unwrap());
            assert_eq!(texts.collect::<String>(), answer["choices"][at]["text"].as_str().unwrap());
        }
        rows();
        let answer = server.ok(COMPLETIONS, body(3, 3, 0)).await;
        // The last row of each prompt comes with it.
        assert_eq!(rows(), 24 + 2);
        assert_eq!(answer["usage"]["completion_tokens"], 0);
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 6);
        for (at, choice) in choices.iter().enumerate() {
            assert_eq!(choice["prompt_logprobs"], expected[0][at / 3]["prompt_logprobs"]);
            assert_eq!(
                (&choice["text"], &choice["finish_reason"]),
                (&json!([prompt, "uv"][at / 3]), &json!("length"))
            );
        }
        server.eventually("nothing is left", |stats| stats.running == 0 && stats.kv_blocks_used == 0).await;
    }
}

#[tokio::test]
async fn a_streamed_echo_has_the_log_probabilities_of_the_whole() {
    let server = Server::new();
    let body =
        json!({"prompt": "ax", "echo": true, "logprobs": 2, "temperature": 0, "return_token_ids": true});
    let whole = server.ok(COMPLETIONS, body.clone()).await["choices"][0].clone();
    let events = server.stream(COMPLETIONS, body).await;
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = events.iter().flat_map(|event| event["choices"][0]["logprobs"][column].as_array());
        let together: Vec<Value> = parts.flatten().cloned().collect();
        assert_eq!(json!(together), whole["logprobs"][column], "{column}");
    }
    assert_eq!(whole["logprobs"]["tokens"], json!(["a", "x", "y", "z", "<|end|>"]));
    assert_eq!(events[0]["choices"][0]["prompt_token_ids"], json!([97, 120]));
    assert!(events[1..].iter().all(|event| event["choices"][0].get("prompt_token_ids").is_none()));
}

#[tokio::test]
async fn token_ids_are_shown_on_demand() {
    let server = Server::new();
    let body = json!({"prompt": "x", "temperature": 0, "return_token_ids": true});
    let choice = &server.ok(COMPLETIONS, body).await["choices"][0];
    assert_eq!((&choice["token_ids"], &choice["prompt_token_ids"]), (&json!([121, 122, END]), &json!([120])));
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "temperature": 0, "return_token_ids": true, "n": 2,
    });
    let answer = server.ok(CHAT, body.clone()).await;
    assert_eq!(answer["prompt_token_ids"], json!([120]));
    assert_eq!(answer["choices"][1]["token_ids"], json!([121, 122, END]));
    for index in [0, 1] {
        let events = server.stream(CHAT, body.clone()).await;
        let of_choice: Vec<&Value> =
            events.iter().filter(|event| event["choices"][0]["index"] == index).collect();
        let ids = of_choice.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array());
        assert_eq!(json!(ids.flatten().collect::<Vec<_>>()), json!([121, 122, END]));
        let prompts: Vec<&Value> =
            of_choice.iter().filter_map(|event| event.get("prompt_token_ids")).collect();
        assert_eq!(prompts, [&json!([120])]);
    }
}

#[tokio::test]
async fn tokens_of_log_probabilities_go_by_their_ids_on_demand() {
    let server = Server::new();
    let body = json!({
        "prompt": "a", "temperature": 0, "max_tokens": 1, "logprobs": 2, "return_tokens_as_token_ids": true,
    });
    let logprobs = &server.ok(COMPLETIONS, body).await["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["token_id:98"]));
    let top: Vec<&String> = logprobs["top_logprobs"][0].as_object().unwrap().keys().collect();
    assert_eq!(top, ["token_id:98", "token_id:63"]);
    let body = json!({
        "messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 1, "logprobs": true,
        "return_tokens_as_token_ids": true,
    });
    let content = &server.ok(CHAT, body).await["choices"][0]["logprobs"]["content"];
    assert_eq!(content[0]["token"], "token_id:98");
}

#[tokio::test]
async fn a_prompt_is_cut_at_its_beginning() {
    let server = Server::new();
    let mut body = json!({
        "prompt": "abcx", "truncate_prompt_tokens": 2, "echo": true, "temperature": 0, "return_token_ids": true,
    });
    let answer = server.ok(COMPLETIONS, body.clone()).await;
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["usage"]["prompt_tokens"]),
        (&json!("cxyz"), &json!(2))
    );
    body["truncate_prompt_tokens"] = 10.into();
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "abcxyz");
    let body = json!({"prompt": "a".repeat(400), "truncate_prompt_tokens": -1, "max_tokens": 10});
    let usage = &server.ok(COMPLETIONS, body).await["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["total_tokens"]), (&json!(246), &json!(256)));
    let body = json!({
        "messages": [{"role": "user", "content": "abcx"}], "truncate_prompt_tokens": 1, "temperature": 0,
    });
    assert_eq!(server.ok(CHAT, body).await["usage"]["prompt_tokens"], 1);
}
