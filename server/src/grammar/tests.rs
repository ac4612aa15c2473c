use nibble_engine::TokenMask;
use nibble_model::config::ModelConfig;
use serde_json::Value;

use super::cache::{MAXIMUM_BYTES, MAXIMUM_GRAMMARS};
use super::*;

/// Tokens of several bytes, after those of one.
const WORDS: [&str; 9] = ["{\"", "\":", "true", "null", "  ", "\"}", "ab", "12", "}\n"];
pub(crate) const END: u32 = 300;
/// Tokenizers number added tokens themselves; the first is the end of sequence.
pub(crate) const ADDED: u32 = 256 + WORDS.len() as u32 + 1;
/// The model has logits for more tokens than the tokenizer.
pub(crate) const VOCABULARY: usize = 320;

/// A tokenizer of bytes and some words.
fn tokenizer() -> Tokenizer {
    tokenizer_with(&[])
}

/// A tokenizer of bytes, some words, and tokens that are `added` from [`ADDED`] on, of which none is special.
pub(crate) fn tokenizer_with(added: &[&str]) -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    let mut moved = 0x100;
    let mut characters = Vec::new();
    for byte in 0..=u8::MAX {
        characters.push(match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                moved += 1;
                char::from_u32(moved - 1).unwrap()
            }
        });
    }
    let spell = |text: &str| -> String { text.bytes().map(|byte| characters[byte as usize]).collect() };
    let bytes = characters.iter().enumerate().map(|(byte, character)| (character.to_string(), byte.into()));
    let words = WORDS.iter().enumerate().map(|(index, word)| (spell(word), (256 + index).into()));
    let vocabulary: serde_json::Map<String, Value> = bytes.chain(words).collect();
    let token = |id: u32, content: &str, special: bool| {
        json!({
            "id": id, "content": content, "special": special,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let mut added: Vec<Value> = (ADDED..).zip(added).map(|(id, content)| token(id, content, false)).collect();
    added.insert(0, token(END, "<|end|>", true));
    let tokenizer = json!({
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let config = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64, "torch_dtype": "float32",
    });
    for (name, value) in [("tokenizer.json", tokenizer), ("config.json", config)] {
        std::fs::write(directory.path().join(name), value.to_string()).unwrap();
    }
    let config = ModelConfig::from_file(&directory.path().join("config.json")).unwrap();
    Tokenizer::open(directory.path(), &config).unwrap()
}

fn grammars() -> Grammars {
    Grammars::new(Arc::new(tokenizer()), VOCABULARY, vec![END])
}

fn allowed(mask: &TokenMask) -> Vec<u32> {
    (0..VOCABULARY as u32 + 64).filter(|&token| mask.allows(token)).collect()
}

/// A text of the grammar, of tokens chosen at random among those allowed; `None` if it does not end.
fn random_text(grammars: &Grammars, constraint: &dyn TokenConstraint, seed: u64) -> Option<String> {
    let mut constraint = constraint.boxed_clone();
    let mut state = seed;
    let mut tokens = Vec::new();
    for _ in 0..400 {
        let choices = allowed(&constraint.allowed_after(&tokens).unwrap());
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = choices[(state >> 33) as usize % choices.len()];
        if token == END {
            return Some(grammars.tokenizer.decode(&tokens, false).unwrap());
        }
        tokens.push(token);
    }
    None
}

/// Texts of a grammar, at least some.
fn texts(grammar: Grammar) -> Vec<String> {
    let grammars = grammars();
    let constraint = grammars.compile(grammar).unwrap();
    let texts: Vec<String> = (0..60).filter_map(|seed| random_text(&grammars, &*constraint, seed)).collect();
    assert!(texts.len() > 10, "most texts end: {}", texts.len());
    texts
}

#[test]
fn whatever_is_sampled_satisfies_the_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "on": {"type": "boolean"},
            "level": {"type": "integer", "minimum": -3, "maximum": 12},
            "tags": {"type": "array", "items": {"enum": ["a", "ab"]}, "maxItems": 3},
            "inner": {"$ref": "#/$defs/inner"},
        },
        "required": ["on", "level", "inner"],
        "additionalProperties": false,
        "$defs": {"inner": {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"], "additionalProperties": false}},
    });
    for text in texts(Grammar::JsonSchema(schema)) {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert!(
            value["on"].is_boolean() && (-3.0..=12.0).contains(&value["level"].as_f64().unwrap()),
            "{text}"
        );
        assert_eq!(value["inner"], json!({"x": null}));
        let tags = value.get("tags").map_or(&[][..], |tags| tags.as_array().unwrap());
        assert!(tags.len() <= 3 && tags.iter().all(|tag| tag == "a" || tag == "ab"), "{text}");
        assert!(!text.contains(&" ".repeat(33)), "white space ends: {text:?}");
    }
}

#[test]
fn choices_regular_expressions_and_lark_are_followed() {
    let choices = ["yes", "no", "say \"ab\"\n", "yes!"].map(str::to_owned);
    assert!(texts(Grammar::Choice(choices.to_vec())).iter().all(|text| choices.contains(text)));
    for text in texts(Grammar::Regex("[a-c]{2}-(12|7)+".to_owned())) {
        let (letters, digits) = text.split_once('-').unwrap();
        assert!(
            letters.len() == 2 && letters.bytes().all(|letter| (b'a'..=b'c').contains(&letter)),
            "{text}"
        );
        assert!(!digits.is_empty() && digits.replace("12", "").replace('7', "").is_empty(), "{text}");
    }
    for text in texts(Grammar::Lark("start: \"(\" start \")\" | \"x\"".to_owned())) {
        let depth = text.len() / 2;
        assert_eq!(text, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
    }
}

#[test]
fn the_end_is_allowed_where_the_text_may_end_and_alone_where_it_must() {
    let grammars = grammars();
    let mut constraint = grammars.compile(Grammar::Regex("a(ab)?".to_owned())).unwrap();
    let (a, b, ab) = (u32::from(b'a'), u32::from(b'b'), 256 + 6);
    assert_eq!(allowed(&constraint.allowed_after(&[]).unwrap()), [a]);
    assert_eq!(allowed(&constraint.allowed_after(&[a]).unwrap()), [a, ab, END]);
    // A copy goes on where this one is, on its own. Asked twice, it says the same.
    let mut other = constraint.boxed_clone();
    assert_eq!(allowed(&constraint.allowed_after(&[a, a]).unwrap()), [b]);
    for _ in 0..2 {
        assert_eq!(allowed(&other.allowed_after(&[a, ab]).unwrap()), [END]);
    }
    assert!(constraint.allowed_after(&[a, a, a]).is_err());
}

/// Holds what `constraint` says along random drafts against what copies of it say step by step, on the way of a random
/// completion, which likes the tokens `favourites`; returns how many tokens of drafts were allowed.
pub(crate) fn drafts_are_as_step_by_step(
    constraint: &dyn TokenConstraint,
    seed: u64,
    favourites: &[u32],
) -> usize {
    let mut constraint = constraint.boxed_clone();
    let mut state = seed;
    let mut below = move |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let mut choose = |mask: &TokenMask| {
        let liked: Vec<u32> = favourites.iter().copied().filter(|&token| mask.allows(token)).collect();
        let choices = if liked.is_empty() || below(2) == 0 { allowed(mask) } else { liked };
        (choices[below(choices.len())], below(8) == 0, below(VOCABULARY) as u32)
    };
    let (mut completion, mut allowed_tokens) = (Vec::new(), 0);
    for _ in 0..30 {
        let mut step_by_step = constraint.boxed_clone();
        let mut draft = Vec::new();
        let mut expected = vec![step_by_step.allowed_after(&completion)];
        while let Some(Ok(mask)) = expected.last()
            && draft.len() < 6
        {
            let (good, guesses, guess) = choose(mask);
            let token = if guesses { guess } else { good };
            let is_allowed = mask.allows(token);
            draft.push(token);
            if !is_allowed {
                // Whatever follows does not matter.
                draft.extend([97, 98]);
                break;
            }
            expected.push(step_by_step.allowed_after(&[&completion[..], &draft].concat()));
            allowed_tokens += 1;
        }
        assert_eq!(constraint.allowed_along(&completion, &draft), expected, "{completion:?} {draft:?}");
        let forced = constraint.forced_after(&completion);
        assert_eq!(constraint.forced_after(&completion), forced, "a guess moves nothing");
        let Some(Ok(mask)) = expected.first() else { break };
        let (token, ..) = choose(mask);
        if token == END {
            break;
        }
        completion.push(token);
    }
    allowed_tokens
}

#[test]
fn what_may_come_along_a_draft_is_what_may_come_step_by_step() {
    let grammars = grammars();
    let schema =
        json!({"type": "object", "properties": {"abab": {"type": "boolean"}, "b": {"enum": ["ab12", "ab"]}}});
    let mut allowed_tokens = 0;
    for grammar in [
        Grammar::JsonSchema(schema),
        Grammar::json_object(),
        Grammar::Regex("(ab|12)*true".to_owned()),
        Grammar::Lark("start: \"(\" start \")\" | \"x\"".to_owned()),
    ] {
        let constraint = grammars.compile(grammar).unwrap();
        for seed in 0..20 {
            allowed_tokens += drafts_are_as_step_by_step(&*constraint, seed, &[]);
        }
    }
    assert!(allowed_tokens > 3000, "{allowed_tokens}");
}

#[test]
fn text_that_the_grammar_forces_is_guessed() {
    let grammars = grammars();
    let mut constraint = grammars.compile(Grammar::Regex("ab12(true|null)x".to_owned())).unwrap();
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let tokens = |text: &str| grammars.tokenizer.encode(text, false).unwrap();
    assert_eq!(constraint.forced_after(&[]), tokens("ab12"));
    assert_eq!(constraint.forced_after(&bytes("a")), tokens("b12"));
    assert!(constraint.forced_after(&bytes("ab12")).is_empty());
    assert_eq!(constraint.forced_after(&bytes("ab12t")), tokens("ruex"));
    assert!(constraint.forced_after(&bytes("ab12truex")).is_empty(), "the end is no text");
}

#[test]
fn grammars_that_cannot_be_followed_are_refused() {
    let grammars = grammars();
    for (grammar, word) in [
        (Grammar::JsonSchema(json!({"type": "thing"})), "type"),
        (Grammar::JsonSchema(json!({"$ref": "#/$defs/missing"})), "missing"),
        (Grammar::JsonSchema(json!({"$ref": "https://example.com/schema.json"})), "example.com"),
        (Grammar::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 3})), ""),
        (Grammar::JsonSchema(json!(5)), ""),
        (Grammar::JsonSchema(json!(false)), ""),
        (Grammar::Regex("(".to_owned()), ""),
        (Grammar::Regex("a".repeat(MAXIMUM_GRAMMAR_BYTES + 1)), "bytes"),
        (Grammar::Lark("start: missing".to_owned()), "missing"),
        (Grammar::Lark(String::new()), ""),
        (Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000))), "nested"),
        (Grammar::Regex("(".repeat(100_000)), ""),
    ] {
        let started = std::time::Instant::now();
        match grammars.compile(grammar.clone()) {
            Ok(_) => panic!("{grammar:?} compiles"),
            Err(error) => assert!(error.message.contains(word) && !error.message.is_empty(), "{error}"),
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(10), "{grammar:?}");
    }
}

#[test]
fn grammars_that_blow_up_cost_a_bounded_time_whether_they_are_refused_or_not() {
    let grammars = grammars();
    let objects = (0..12).fold(json!({"type": "null"}), |inner, _| {
        json!({"type": "object", "properties": {"a": inner, "b": inner}, "additionalProperties": inner})
    });
    for grammar in [
        Grammar::Regex("(a{1000}){1000}{1000}".to_owned()),
        Grammar::Regex(format!("{}b", "(a|ab|a.*)*".repeat(2000))),
        Grammar::Regex("(.*a.{900}){90}".to_owned()),
        Grammar::Regex(format!("{}a{}", "(".repeat(240), ")*".repeat(240))),
        Grammar::Lark(format!("start: {}\"a\"{}", "(".repeat(MAXIMUM_NESTING), ")".repeat(MAXIMUM_NESTING))),
        Grammar::JsonSchema(json!({"type": "string", "maxLength": u64::MAX})),
        Grammar::JsonSchema(json!({"type": "array", "items": {}, "minItems": 1_000_000})),
        Grammar::JsonSchema(objects),
        Grammar::Lark("start: start start | \"a\" | ".to_owned()),
        Grammar::Choice((0..20_000).map(|number| number.to_string()).collect()),
    ] {
        let started = std::time::Instant::now();
        if let Ok(mut constraint) = grammars.compile(grammar.clone()) {
            let mut tokens = Vec::new();
            for _ in 0..20 {
                let Ok(mask) = constraint.allowed_after(&tokens) else { break };
                tokens.extend(allowed(&mask).first());
            }
        }
        let form = format!("{grammar:?}");
        assert!(started.elapsed() < std::time::Duration::from_secs(20), "{}", &form[..form.len().min(80)]);
    }
}

#[test]
fn a_grammar_that_was_used_lately_is_not_compiled_again_and_does_the_same() {
    let grammars = grammars();
    let compiles = || grammars.compiles.load(std::sync::atomic::Ordering::Relaxed);
    let schema = Grammar::JsonSchema(json!({"type": "object", "properties": {"a": {"type": "integer"}}}));
    let mut first = grammars.compile(schema.clone()).unwrap();
    let open = u32::from(b'{');
    let after_first = allowed(&first.allowed_after(&[open]).unwrap());
    let mut second = grammars.compile(schema.clone()).unwrap();
    assert_eq!(compiles(), 1, "the second request with a schema finds it");
    assert_eq!(allowed(&second.allowed_after(&[]).unwrap()).first(), Some(&open), "at its beginning");
    assert_eq!(allowed(&second.allowed_after(&[open]).unwrap()), after_first);
    // The same text in another language is another grammar.
    grammars.compile(Grammar::Choice(vec!["a".to_owned()])).unwrap();
    grammars.compile(Grammar::Lark("start: \"a\"".to_owned())).unwrap();
    grammars.compile(Grammar::JsonSchema(json!("a"))).unwrap_err();
    grammars.compile(Grammar::JsonSchema(json!("a"))).unwrap_err();
    assert_eq!(compiles(), 4, "errors are not kept");
}

#[test]
fn the_cache_of_grammars_is_bounded_and_keeps_those_used_last() {
    let grammars = grammars();
    let compiles = || grammars.compiles.load(std::sync::atomic::Ordering::Relaxed);
    let number = |number: usize| Grammar::Lark(format!("start: \"{number}\""));
    for at in 0..MAXIMUM_GRAMMARS {
        grammars.compile(number(at)).unwrap();
    }
    grammars.compile(number(0)).unwrap();
    grammars.compile(number(MAXIMUM_GRAMMARS)).unwrap();
    assert_eq!(
        (compiles(), grammars.cache.lock().unwrap().size().0),
        (MAXIMUM_GRAMMARS + 1, MAXIMUM_GRAMMARS)
    );
    grammars.compile(number(0)).unwrap();
    assert_eq!(compiles(), MAXIMUM_GRAMMARS + 1, "it was used again");
    grammars.compile(number(1)).unwrap();
    assert_eq!(compiles(), MAXIMUM_GRAMMARS + 2, "the one that was not went first");
    for at in 0..6 {
        let long = format!("// {}\nstart: \"{at}\"", "x".repeat(MAXIMUM_BYTES / 5));
        grammars.compile(Grammar::Lark(long)).unwrap();
        assert!(grammars.cache.lock().unwrap().size().1 <= MAXIMUM_BYTES);
    }
    assert_eq!(grammars.cache.lock().unwrap().size().0, 4);
}
