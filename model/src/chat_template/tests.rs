use serde_json::json;

use super::*;

/// Made by tests/golden/make_chat_templates.py with Jinja2.
const GOLDEN: &str = include_str!("../../tests/golden/chat_templates.json");

fn golden() -> Json {
    serde_json::from_str(GOLDEN).unwrap()
}

fn compile(source: &str, special_tokens: Map<String, Json>) -> ChatTemplate {
    let templates = vec![(DEFAULT.to_owned(), source.to_owned())];
    ChatTemplate::compile(Path::new("chat_template.jinja"), templates, special_tokens).unwrap()
}

fn render(source: &str) -> Result<String, ChatTemplateError> {
    compile(source, Map::new()).render(&ChatInputs::default())
}

fn list(value: &Json) -> Option<Vec<Json>> {
    value.as_array().cloned()
}

#[test]
fn templates_of_real_models_render_as_jinja2_renders_them() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 22);
    for case in cases {
        let entry = &golden["templates"][case["template"].as_str().unwrap()];
        let template = compile(
            entry["template"].as_str().unwrap(),
            entry["special_tokens"].as_object().unwrap().clone(),
        );
        let inputs = ChatInputs {
            messages: list(&case["inputs"]["messages"]).unwrap(),
            tools: list(&case["inputs"]["tools"]),
            add_generation_prompt: case["inputs"]["add_generation_prompt"].as_bool().unwrap(),
            ..ChatInputs::default()
        };
        assert_eq!(template.render(&inputs).unwrap(), case["expected"], "{case}");
    }
}

#[test]
fn values_and_methods_are_those_of_python() {
    let golden = golden();
    for case in golden["python"].as_array().unwrap() {
        let template = compile(case["template"].as_str().unwrap(), Map::new());
        let mut inputs = ChatInputs::default();
        inputs.variables.insert("value".to_owned(), golden["value"].clone());
        assert_eq!(template.render(&inputs).as_deref(), Ok(case["expected"].as_str().unwrap()), "{case}");
    }
}

#[test]
fn an_error_raised_by_a_template_comes_out_word_for_word() {
    let error = render("{% if not messages %}{{ raise_exception('No messages!') }}{% endif %}").unwrap_err();
    assert_eq!(error.message, "No messages!");
    assert_eq!(error.to_string(), "the chat template refuses these messages: No messages!");
}

#[test]
fn a_template_that_needs_something_absent_says_where() {
    let error = render("a\n{{ messages[0].content.text }}").unwrap_err();
    assert!(error.message.contains(":2"), "{error}");
}

#[test]
fn an_endless_template_is_ended() {
    let error =
        render("{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}")
            .unwrap_err();
    assert!(error.message.contains("does not end"), "{error}");
}

#[test]
fn a_template_that_prints_without_end_is_ended() {
    let error = render("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}").unwrap_err();
    assert!(error.message.contains("prints more than"), "{error}");
}

#[test]
fn a_template_cannot_reach_files() {
    assert!(render("{% include '/etc/passwd' %}").is_err());
}

#[test]
fn strftime_now_gives_a_year_and_refuses_unknown_formats() {
    let year: i32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2025);
    assert!(render("{{ strftime_now('%Q') }}").unwrap_err().message.contains("%Q"));
}

#[test]
fn extra_variables_are_passed_through_but_never_replace_the_conversation() {
    let template = compile("{{ thinking }}{{ bos_token }}{{ messages | length }}", {
        Map::from_iter([("bos_token".to_owned(), json!("<s>"))])
    });
    let mut inputs = ChatInputs::default();
    inputs.variables.insert("thinking".to_owned(), json!(true));
    inputs.variables.insert("messages".to_owned(), json!([1, 2, 3]));
    assert_eq!(template.render(&inputs).unwrap(), "True<s>0");
}

fn open(files: &[(&str, &str)]) -> Result<Option<ChatTemplate>, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    ChatTemplate::open(directory.path())
}

#[test]
fn the_template_file_wins_over_the_configuration() {
    let config = r#"{"chat_template": "from the configuration", "eos_token": {"content": "</s>"}}"#;
    let files = [("tokenizer_config.json", config), ("chat_template.jinja", "file {{ eos_token }}")];
    let render = |template: ChatTemplate| template.render(&ChatInputs::default()).unwrap();
    assert_eq!(open(&files).unwrap().map(render).as_deref(), Some("file </s>"));
    assert_eq!(open(&files[..1]).unwrap().map(render).as_deref(), Some("from the configuration"));
}

#[test]
fn of_named_templates_the_one_for_tools_is_taken_when_there_are_tools() {
    let config = r#"{"chat_template": [{"name": "default", "template": "plain"},
                                       {"name": "tool_use", "template": "with tools"}]}"#;
    let template = open(&[("tokenizer_config.json", config)]).unwrap().unwrap();
    assert_eq!(template.render(&ChatInputs::default()).unwrap(), "plain");
    let inputs = ChatInputs { tools: Some(vec![json!({})]), ..ChatInputs::default() };
    assert_eq!(template.render(&inputs).unwrap(), "with tools");
}

#[test]
fn a_model_without_a_template_has_none_and_a_wrong_one_is_an_error_that_names_the_file() {
    assert!(open(&[]).unwrap().is_none());
    assert!(open(&[("tokenizer_config.json", "{}")]).unwrap().is_none());
    let error = open(&[("chat_template.jinja", "{% if %}")]).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("not valid Jinja"), "{error}");
    let error = open(&[("tokenizer_config.json", r#"{"chat_template": 3}"#)]).unwrap_err().to_string();
    assert!(error.contains("chat_template") && error.contains("expected a template"), "{error}");
}
