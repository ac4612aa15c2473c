//! Whatever a body holds, the answer is a result or an error that names a field; the server lives on.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;

use crate::support::{CHAT, COMPLETIONS, Server};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
static SERVER: LazyLock<Server> = LazyLock::new(Server::new);

const FIELDS: [&str; 57] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "add_special_tokens",
    "stream_options",
    "echo",
    "logprobs",
    "top_logprobs",
    "add_generation_prompt",
    "documents",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "spaces_between_special_tokens",
    "request_id",
    "cache_salt",
    "continue_final_message",
    "chat_template",
    "reasoning_effort",
    "include_reasoning",
    "functions",
    "repetition_min_count",
    "suffix",
    "best_of",
    "modalities",
    "priority",
    "user",
    "metadata",
    "length_penalty",
    "unknown",
];

/// A value that a field may hold or not.
fn value() -> impl Strategy<Value = Value> {
    let numbers = prop::sample::select(vec![
        json!(0),
        json!(1),
        json!(2),
        json!(-1),
        json!(0.5),
        json!(-0.0),
        json!(1e300),
        json!(256),
        json!(257),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(i64::MIN),
    ]);
    let words =
        prop::sample::select(vec!["", "a", "x!", "🦀", "user", "text", "alphabet", "none", "\u{0}<|end|>"]);
    let keys = prop::sample::select(vec![
        "role",
        "content",
        "type",
        "text",
        "include_usage",
        "97",
        "x",
        "tool_calls",
        "json",
        "regex",
        "choice",
        "grammar",
        "function",
        "name",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        numbers,
        words.prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((keys.clone(), inner), 0..4).prop_map(|entries| {
                entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>().into()
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_body_breaks_the_server(
        chat: bool,
        valid_prompt in prop::bool::weighted(0.8),
        fields in prop::collection::vec((prop::sample::select(&FIELDS[..]), value()), 0..4),
    ) {
        let mut body = Map::new();
        if valid_prompt {
            body.insert("prompt".to_owned(), json!("x"));
            body.insert("messages".to_owned(), json!([{"role": "user", "content": "x"}]));
            body.remove(if chat { "prompt" } else { "messages" });
        }
        body.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let path = if chat { CHAT } else { COMPLETIONS };
        let (status, answer) = RUNTIME.block_on(SERVER.post(path, body.clone().into()));
        if status == 200 {
            prop_assert!(!answer["choices"].as_array().unwrap().is_empty(), "{}", answer);
            let generated = answer["usage"]["completion_tokens"].as_u64().unwrap();
            prop_assert!(generated > 0 || body.get("max_tokens") == Some(&json!(0)), "{}", answer);
        } else {
            prop_assert!(status == 400 || status == 404, "{}", answer);
            let param = answer["error"]["param"].as_str().unwrap_or_default();
            let field = param.split(['.', '[']).next().unwrap_or_default();
            let named = body.contains_key(field) || answer["error"]["code"] == "missing_required_parameter";
            prop_assert!(named, "{} for {:?}", answer, body);
        }
    }
}
