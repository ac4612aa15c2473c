use nibble_model::chat_template::ChatTemplate;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::parser::Delta;
use super::*;
use crate::testing::pieces;

/// Content and calls, as name and arguments, of a text that comes in pieces.
fn parse(mut parser: ToolCallParser, pieces: &[&str]) -> (String, Vec<(String, String)>) {
    let mut content = String::new();
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut take = |delta: Delta| {
        content.push_str(&delta.content);
        for (index, CallDelta { name, arguments }) in delta.calls {
            match name {
                Some(name) => {
                    assert_eq!(index, calls.len(), "calls come in order");
                    calls.push((name, arguments));
                }
                None => calls[index].1.push_str(&arguments),
            }
        }
    };
    for piece in pieces {
        take(parser.push(piece));
    }
    take(parser.finish());
    assert_eq!(parser.has_calls(), !calls.is_empty());
    (content, calls)
}

fn parser(format: ToolCallFormat) -> ToolCallParser {
    ToolCallParser::new(format, vec!["f".to_owned(), "weather".to_owned()], true)
}

fn check(format: ToolCallFormat, text: &str, content: &str, calls: &[(&str, &str)]) {
    let (found, found_calls) = parse(parser(format), &[text]);
    let found_calls: Vec<_> =
        found_calls.iter().map(|(name, arguments)| (name.as_str(), arguments.as_str())).collect();
    assert_eq!((found.as_str(), found_calls.as_slice()), (content, calls), "{text:?}");
}

const CALL: &str = r#"<tool_call>
{"name": "f", "arguments": {"a": "}\"</tool_call>{", "b": [1, {"c": null}]}}
</tool_call>"#;
const ARGUMENTS: &str = r#"{"a": "}\"</tool_call>{", "b": [1, {"c": null}]}"#;

#[test]
fn hermes_calls_are_found_among_text_and_white_space_around_them_is_dropped() {
    let hermes = ToolCallFormat::Hermes;
    check(hermes, CALL, "", &[("f", ARGUMENTS)]);
    check(hermes, &format!("Let me see.\n\n{CALL}\n"), "Let me see.", &[("f", ARGUMENTS)]);
    check(hermes, &format!("{CALL}\n{CALL}"), "", &[("f", ARGUMENTS), ("f", ARGUMENTS)]);
    check(hermes, &format!("{CALL}\nDone. "), "\nDone.", &[("f", ARGUMENTS)]);
    check(hermes, "no call, a < b <tool \n", "no call, a < b <tool \n", &[]);
}

#[test]
fn calls_that_are_written_otherwise_mean_the_same() {
    let hermes = ToolCallFormat::Hermes;
    for (object, arguments) in [
        (r#"{"arguments": {"a": 1}, "name": "f"}"#, r#"{"a": 1}"#),
        (r#"{"type":"function","name":"f","parameters":{"a":1},"id":7}"#, r#"{"a":1}"#),
        (r#"{"name": "f", "arguments": "{\"a\": 1}"}"#, r#"{"a": 1}"#),
        (r#"{"name": "f"}"#, "{}"),
        (r#"{"name": "f", "arguments": null}"#, "{}"),
        (r#"{"name": "f", "arguments": {"a": 1}}}}"#, r#"{"a": 1}"#),
        (r#"{"name": "f", "arguments": {"a": 1}"#, r#"{"a": 1}"#),
    ] {
        check(hermes, &format!("<tool_call>{object}</tool_call>"), "", &[("f", arguments)]);
        check(
            hermes,
            &format!("<tool_call>{object}</tool_call>{CALL}"),
            "",
            &[("f", arguments), ("f", ARGUMENTS)],
        );
    }
}

#[test]
fn what_is_no_call_is_content_to_the_letter() {
    let hermes = ToolCallFormat::Hermes;
    for text in [
        "write <tool_call> tags",
        "<tool_call>{\"city\": \"Paris\"}</tool_call>",
        "<tool_call>{\"name\": 5}</tool_call>",
        "<tool_call>",
        "x <tool_call>\n{\"na",
        "<<tool_call<tool_call>[]",
    ] {
        check(hermes, text, text, &[]);
    }
    let text = r#"{"name": "Bob", "age": 3}"#;
    for text in [text, "{\"a\": {\"name\": \"f\"}}", "  {}", "{\"na", "see {\"name\": \"f\"}"] {
        check(ToolCallFormat::Llama3Json, text, text, &[]);
    }
}

#[test]
fn a_call_that_is_cut_keeps_what_it_has() {
    check(
        ToolCallFormat::Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"<",
        "",
        &[("f", "{\"a\": \"<")],
    );
    check(ToolCallFormat::Hermes, "<tool_call>{\"name\": \"f\"", "", &[("f", "")]);
    check(ToolCallFormat::Hermes, &format!("{CALL}\n<tool_call>\n{{\"na"), "", &[("f", ARGUMENTS)]);
    check(
        ToolCallFormat::Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1</tool_call>!",
        "!",
        &[("f", "{\"a\": 1")],
    );
}

#[test]
fn llama_calls_stand_alone_or_after_the_tag() {
    let llama = ToolCallFormat::Llama3Json;
    let call = r#"{"name": "weather", "parameters": {"city": "Rome"}}"#;
    let expected = ("weather", r#"{"city": "Rome"}"#);
    check(llama, call, "", &[expected]);
    check(llama, &format!("\n<|python_tag|>{call}"), "", &[expected]);
    check(llama, &format!("Sure. <|python_tag|>{call}"), "Sure.", &[expected]);
    check(llama, &format!("{call}; {call}"), "", &[expected, expected]);
    check(llama, &format!("{call};{call}\nDone"), "Done", &[expected, expected]);
}

#[test]
fn an_answer_that_is_a_call_without_tags_is_one_if_the_function_exists() {
    let hermes = ToolCallFormat::Hermes;
    let call = r#"{"name": "weather", "arguments": {"city": "Rome"}}"#;
    let expected = ("weather", r#"{"city": "Rome"}"#);
    check(hermes, call, "", &[expected]);
    check(hermes, &format!("{call}\n{call}\n{CALL}"), "", &[expected, expected, ("f", ARGUMENTS)]);
    check(hermes, &format!("```json\n{call}\n```"), "", &[expected]);
    check(
        hermes,
        &format!("```json\n{call}\n```\n```json\n{call}\n```\nSo."),
        "\nSo.",
        &[expected, expected],
    );
    let fenced = "```json\n{\"a\": 1}\n```";
    for text in [
        format!("see {call}"),
        format!("see ```json\n{call}```"),
        call.replace("weather", "other"),
        format!("```json\n{}```", call.replace("weather", "other")),
        fenced.to_owned(),
        format!("````json{call}"),
        "```python\nx```".to_owned(),
    ] {
        check(hermes, &text, &text, &[]);
    }
    check(hermes, "<tool_call>{\"name\": \"other\"}</tool_call>", "", &[("other", "{}")]);
}

#[test]
fn without_parallel_calls_the_first_one_counts() {
    let parser = ToolCallParser::new(ToolCallFormat::Hermes, vec!["f".to_owned()], false);
    let (content, calls) = parse(parser, &[&format!("{CALL}\n{CALL}")]);
    assert_eq!((content.as_str(), calls.as_slice()), ("", &[("f".to_owned(), ARGUMENTS.to_owned())][..]));
}

#[test]
fn the_name_comes_first_and_arguments_as_they_are_written() {
    let mut parser = parser(ToolCallFormat::Hermes);
    assert_eq!(parser.push("<tool_call>\n{\"name\": \""), Delta::default());
    let call = |name: Option<&str>, arguments: &str| Delta {
        content: String::new(),
        calls: vec![(0, CallDelta { name: name.map(str::to_owned), arguments: arguments.to_owned() })],
    };
    assert_eq!(parser.push("f\""), call(Some("f"), ""));
    assert_eq!(parser.push(", \"arguments\": {\"a"), call(None, "{\"a"));
    assert_eq!(parser.push("\": 1}}"), call(None, "\": 1}"));
    assert_eq!((parser.push("</tool_call>"), parser.finish()), (Delta::default(), Delta::default()));
}

/// Pieces of texts that are calls, nearly calls, and other things.
fn text() -> impl Strategy<Value = String> {
    let parts = prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "```json",
        "`",
        "<|python_tag|>",
        "{",
        "}",
        "\"name\"",
        "\"arguments\"",
        "\"parameters\"",
        ": ",
        ", ",
        "\"f\"",
        "\"weather\"",
        "{\"a\": 1}",
        "\"",
        "\\",
        "[",
        "]",
        "null",
        " ",
        "\n",
        ";",
        "<",
        "é",
        "🦀",
        "text",
        "{\"name\": \"f\", \"arguments\": {\"x\": \"y\"}}",
        "{\"name\": \"weather\", \"parameters\": {}}",
    ]);
    prop::collection::vec(parts, 0..16).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_stream_says_what_the_whole_text_says_wherever_it_is_cut(
        text in text(),
        hermes: bool,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let format = if hermes { ToolCallFormat::Hermes } else { ToolCallFormat::Llama3Json };
        let pieces = pieces(&text, &cuts);
        let whole = parse(parser(format), &[&text]);
        prop_assert_eq!(parse(parser(format), &pieces), whole.clone());
        // Nothing is invented, and without a call nothing is lost.
        if whole.1.is_empty() {
            prop_assert_eq!(whole.0, text);
        }
    }
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
}

#[test]
fn tools_are_checked_by_field() {
    let hermes = Some(ToolCallFormat::Hermes);
    let named = json!({"type": "function", "function": {"name": "g"}});
    for (tools, choice, wrong) in [
        (vec![json!({"type": "code"})], None, "tools[0]"),
        (vec![tool("f"), json!({"type": "function", "function": {}})], None, "tools[1].function"),
        (vec![json!({"type": "x", "function": {"name": "f"}})], None, "tools[0].type"),
        (vec![tool("a b")], None, "tools[0].function.name"),
        (
            vec![json!({"type": "function", "function": {"name": "f", "parameters": 5}})],
            None,
            "tools[0].function.parameters",
        ),
        (vec![tool("f")], Some(json!("always")), "tool_choice"),
        (vec![tool("f")], Some(named), "tool_choice"),
        (vec![], Some(json!("required")), "tool_choice"),
        (vec![tool("f"); 129], None, "tools"),
    ] {
        match Tools::new(hermes, &tools, choice.as_ref(), true) {
            Err(ApiError::InvalidField { param, .. }) => assert_eq!(param, wrong),
            other => panic!("{wrong}: {other:?}"),
        }
    }
    assert!(Tools::new(None, &[tool("f")], None, true).is_err(), "nobody knows how to call it");
    assert!(Tools::new(None, &[tool("f")], Some(&json!("none")), true).is_ok_and(|tools| tools.is_none()));
}

#[test]
fn the_format_is_what_the_template_says() {
    let directory = tempfile::tempdir().unwrap();
    for (template, format) in [
        ("{{ tools }} <tool_call>", Some(ToolCallFormat::Hermes)),
        ("{{ '<|python_tag|>' }}", Some(ToolCallFormat::Llama3Json)),
        ("{\"name\": function name, \"parameters\": dictionary}", Some(ToolCallFormat::Llama3Json)),
        ("{{ messages }}", None),
    ] {
        std::fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
        let template = ChatTemplate::open(directory.path()).unwrap().unwrap();
        assert_eq!(ToolCallFormat::of_template(&template), format);
    }
}
