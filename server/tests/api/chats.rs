//! Chats: templates, continued messages, thoughts, and fields of vLLM.

use nibble_server::{ReasoningFormat, ServerOptions};
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Options, Server};

/// Marks whose turn it is, and knows of thoughts.
const TURNS: &str = "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}</>{% endfor %}\
    {% if add_generation_prompt %}<a>{{ reasoning_effort }}{% if think %}<think>{% endif %}{% endif %}\
    {# <think></think> #}";

fn server(template: &'static str) -> Server {
    let server = ServerOptions { trust_request_chat_template: true, ..ServerOptions::default() };
    Server::with(Options { chat_template: Some(template), server, ..Options::default() })
}

async fn prompt_of(server: &Server, mut body: Value) -> String {
    body["return_token_ids"] = true.into();
    body["max_tokens"] = 1.into();
    let answer = server.ok(CHAT, body).await;
    let ids: Vec<u8> = serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap();
    String::from_utf8(ids).unwrap()
}

#[tokio::test]
async fn the_last_message_is_continued_on_demand() {
    let server = server(TURNS);
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "wx"}]);
    let mut body = json!({"messages": messages, "continue_final_message": true, "temperature": 0});
    assert_eq!(prompt_of(&server, body.clone()).await, "<u>q</><a>wx");
    body["max_tokens"] = 2.into();
    assert_eq!(server.ok(CHAT, body.clone()).await["choices"][0]["message"]["content"], "yz");
    body["echo"] = true.into();
    assert_eq!(server.ok(CHAT, body.clone()).await["choices"][0]["message"]["content"], "wxyz");
    let events = server.stream(CHAT, body.clone()).await;
    let content: String =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(content, "wxyz");
    body["add_generation_prompt"] = true.into();
    let (status, answer) = server.post(CHAT, body).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("continue_final_message")));
    let body = json!({"messages": messages, "add_generation_prompt": false});
    assert_eq!(prompt_of(&server, body).await, "<u>q</><a>wx</>");
}

#[tokio::test]
async fn a_template_comes_from_the_request_if_the_server_allows_it() {
    let server = server(TURNS);
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "reasoning_effort": "low",
        "chat_template": "{{ messages[0].content }}{{ reasoning_effort }}{{ more }}{{ documents[0].title }}",
        "chat_template_kwargs": {"more": "!"}, "documents": [{"title": "T"}],
    });
    assert_eq!(prompt_of(&server, body.clone()).await, "xlow!T");
    let mut broken = body.clone();
    broken["chat_template"] = "{% if %}".into();
    let (status, answer) = server.post(CHAT, broken).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("chat_template")), "{answer}");
    let mut own = body.clone();
    own["chat_template_kwargs"] = json!({"reasoning_effort": "high"});
    assert_eq!(prompt_of(&server, own).await, "xhighT", "what the variables say is more exact");
    // It serves a model without one, too.
    let options = ServerOptions { trust_request_chat_template: true, ..ServerOptions::default() };
    let without = Server::with(Options { chat_template: None, server: options, ..Options::default() });
    assert_eq!(prompt_of(&without, body.clone()).await, "xlow!T");
    let (_, answer) = Server::new().post(CHAT, body).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("--trust-request-chat-template"), "{message}");
}

/// A request whose answer must be `text`.
fn saying(text: &str) -> Value {
    json!({
        "messages": [{"role": "user", "content": "q"}], "temperature": 0,
        "structured_outputs": {"choice": [text]},
    })
}

/// Reasoning and content of streamed deltas, put together.
fn together(events: &[Value]) -> (String, String) {
    let of = |field: &str| {
        let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
        deltas.filter_map(|delta| delta[field].as_str()).collect::<String>()
    };
    assert_eq!(of("reasoning"), of("reasoning_content"));
    (of("reasoning_content"), of("content"))
}

#[tokio::test]
async fn thoughts_are_split_from_the_answer_streamed_or_not() {
    let server = server(TURNS);
    for (text, reasoning, content) in
        [("<think>\nso so\n</think>\n\nyes", "so so", "yes"), ("yes", "", "yes"), ("<think>so", "so", "")]
    {
        let answer = server.ok(CHAT, saying(text)).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["content"], content, "{text}");
        for field in ["reasoning_content", "reasoning"] {
            assert_eq!(message.get(field).and_then(Value::as_str).unwrap_or_default(), reasoning, "{text}");
        }
        let events = server.stream(CHAT, saying(text)).await;
        assert_eq!(together(&events), (reasoning.to_owned(), content.to_owned()), "{text}");
        let mut hidden = saying(text);
        hidden["include_reasoning"] = false.into();
        let message = server.ok(CHAT, hidden.clone()).await["choices"][0]["message"].clone();
        assert_eq!((&message["content"], message.get("reasoning_content")), (&json!(content), None));
        assert_eq!(together(&server.stream(CHAT, hidden).await), (String::new(), content.to_owned()));
    }
}

#[tokio::test]
async fn thoughts_that_the_prompt_begins_are_free_even_if_the_answer_is_not() {
    let server = server(TURNS);
    let mut body = saying("yes");
    body["chat_template_kwargs"] = json!({"think": true});
    body["max_tokens"] = 30.into();
    let choice = server.ok(CHAT, body).await["choices"][0].clone();
    // This model never ends its thoughts; it may not end the answer before them.
    assert!(
        choice["message"]["reasoning_content"].as_str().unwrap().starts_with("abcdefghijklmnopqrstuvwxyz")
    );
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(""), &json!("length")));
}

#[tokio::test]
async fn tags_are_content_where_nobody_knows_of_thoughts() {
    let answer = Server::new().ok(CHAT, saying("<think>a</think>b")).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "<think>a</think>b");
    let options =
        ServerOptions { reasoning_parser: Some(ReasoningFormat::ThinkTags), ..ServerOptions::default() };
    let server = Server::with(Options { server: options, ..Options::default() });
    assert_eq!(server.ok(CHAT, saying("<think>a</think>b")).await["choices"][0]["message"]["content"], "b");
}

#[tokio::test]
async fn a_request_has_the_name_that_it_brings() {
    let server = Server::new();
    let mut body =
        json!({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "request_id": "r-1"});
    body.as_object_mut().unwrap().remove("prompt");
    assert_eq!(server.ok(CHAT, body).await["id"], "chatcmpl-r-1");
    let body = json!({"prompt": "x", "request_id": "r-1", "cache_salt": "s"});
    assert_eq!(server.ok(COMPLETIONS, body).await["id"], "cmpl-r-1");
}

#[tokio::test]
async fn only_allowed_tokens_come_and_bad_words_never() {
    let server = Server::new();
    let body = json!({"prompt": "b", "temperature": 0, "max_tokens": 3, "allowed_token_ids": [63, 99, 100]});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "cd?");
    let body = json!({"prompt": "a", "temperature": 0, "max_tokens": 4, "bad_words": ["de", "b"]});
    // "b" is followed by "?" then, that by "a", and "ad" is no bad word.
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "?a?a");
    let body = json!({"prompt": "b", "temperature": 0, "max_tokens": 3, "bad_words": ["de"]});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "cd?");
    let body = json!({"prompt": "b", "allowed_token_ids": [100], "bad_words": ["d"]});
    let (status, answer) = server.post(COMPLETIONS, body).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("allowed_token_ids")));
    // This one shows only when the first token is there.
    let body = json!({"prompt": "b", "allowed_token_ids": [100], "bad_words": ["dd"]});
    let (status, answer) = server.post(COMPLETIONS, body).await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert_eq!(status.as_u16(), 400);
    assert!(message.contains("allowed_token_ids") && message.contains("bad_words"), "{message}");
    // The others are not disturbed.
    assert_eq!(
        server.ok(COMPLETIONS, json!({"prompt": "x", "temperature": 0})).await["choices"][0]["text"],
        "yz"
    );
}

#[tokio::test]
async fn a_stop_token_belongs_to_the_text_on_demand() {
    let server = Server::new();
    let mut body =
        json!({"prompt": "a", "stop_token_ids": [101], "temperature": 0, "include_stop_str_in_output": true});
    assert_eq!(server.ok(COMPLETIONS, body.clone()).await["choices"][0]["text"], "bcde");
    body["prompt"] = "x".into();
    assert_eq!(server.ok(COMPLETIONS, body.clone()).await["choices"][0]["text"], "yz");
    body["skip_special_tokens"] = false.into();
    let choice = server.ok(COMPLETIONS, body).await["choices"][0].clone();
    assert_eq!(choice["text"], "yz<|end|>");
}

#[tokio::test]
async fn n_answers_are_streamed_each_under_its_index() {
    let body = json!({
        "messages": [{"role": "user", "content": "w"}], "n": 3, "temperature": 0,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    });
    let events = Server::new().stream(CHAT, body).await;
    for index in 0..3 {
        let of_choice = events.iter().filter(|event| event["choices"][0]["index"] == index);
        let text: String =
            of_choice.filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, "xyz");
    }
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 12);
    let counted = events.iter().filter(|event| !event["usage"].is_null()).count();
    assert!(counted > 3, "usage in each chunk: {counted}");
}
