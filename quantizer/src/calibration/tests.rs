//! Files of every kind through a word-level tokenizer, where every sequence can be read.

use std::path::Path;

use nibble_model::checkpoint::CheckpointWriter;
use safetensors::Dtype;
use serde_json::{Map, Value as Json, json};

use super::*;

const WORDS: usize = 200;
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}\
    {{ raise_exception('tools are unknown') }}{% endif %}{{ message.role }} {{ message.content }} end {% endfor %}\
    {% if add_generation_prompt %}assistant{% endif %}";

/// A model without layers in `parent/model`, whose tokenizer knows "begin", roles and the words w0 to w199 and
/// puts "begin" before every text, with a chat template or without one.
fn checkpoint(parent: &Path, template: Option<&str>) -> Checkpoint {
    let directory = parent.join("model");
    let mut writer = CheckpointWriter::create(&directory, u64::MAX).unwrap();
    let named = ["begin", "user", "assistant", "system", "tool", "end"].map(str::to_owned);
    let words = named.into_iter().chain((0..WORDS).map(|number| format!("w{number}")));
    let vocabulary: Map<String, Json> = words.zip(0..).map(|(word, id)| (word, json!(id))).collect();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary.len(), "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "hidden_act": "silu",
        "tie_word_embeddings": true,
    });
    let begin = json!({"id": "begin", "ids": [0], "tokens": ["begin"]});
    let first =
        json!([{"SpecialToken": {"id": "begin", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": null,
        "post_processor": {"type": "TemplateProcessing", "single": first, "pair": first,
            "special_tokens": {"begin": begin}},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    writer.tensor("model.norm.weight", Dtype::F32, &[8], &[0; 32]).unwrap();
    writer.file("config.json", config.to_string().as_bytes()).unwrap();
    writer.file("tokenizer.json", tokenizer.to_string().as_bytes()).unwrap();
    if let Some(template) = template {
        let config = json!({"bos_token": "begin ", "chat_template": template}).to_string();
        writer.file("tokenizer_config.json", config.as_bytes()).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(&directory).unwrap()
}

/// The sequences as words.
fn words(checkpoint: &Checkpoint, calibration: &Calibration) -> Vec<String> {
    let tokenizer = checkpoint.tokenizer().unwrap();
    calibration.sequences().iter().map(|tokens| tokenizer.decode(tokens, false).unwrap()).collect()
}

fn write(parent: &Path, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
    let file = parent.join(name);
    std::fs::write(&file, contents).unwrap();
    file
}

fn text(numbers: std::ops::Range<usize>) -> String {
    numbers.map(|number| format!("w{number}")).collect::<Vec<_>>().join(" ")
}

const OPTIONS: CalibrationOptions = CalibrationOptions { samples: 8, sequence_length: 11, seed: 0 };

#[test]
fn a_text_gives_the_stretches_of_the_seed_in_order_each_after_the_beginning_token() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), None);
    let file = write(parent.path(), "text.txt", text(0..187));
    // 18 whole stretches of 10 words; which ones, plain Python says.
    let drawn = Calibration::from_files(&[file], None, &checkpoint, OPTIONS).unwrap();
    let expected = DRAWN_OF_18.map(|stretch| format!("begin {}", text(10 * stretch..10 * stretch + 10)));
    assert_eq!(words(&checkpoint, &drawn), expected);
}

/// The first eight of Fisher and Yates' shuffle of 18 numbers by SplitMix64 from seed 0, sorted.
const DRAWN_OF_18: [usize; 8] = [0, 1, 7, 8, 11, 12, 13, 17];

#[test]
fn several_files_are_drawn_from_together() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), None);
    let one = write(parent.path(), "one.txt", text(0..90));
    let short = write(parent.path(), "short.txt", text(0..9));
    let other = write(parent.path(), "other.txt", text(90..187));
    let drawn = Calibration::from_files(&[one, short, other], None, &checkpoint, OPTIONS).unwrap();
    let expected = DRAWN_OF_18.map(|stretch| format!("begin {}", text(10 * stretch..10 * stretch + 10)));
    assert_eq!(words(&checkpoint, &drawn), expected, "as if they were one");
}

#[test]
fn documents_share_sequences_and_conversations_go_through_the_template() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), Some(TEMPLATE));
    let lines = [
        json!({"prompt": "w1 w2", "completion": "w3"}),
        json!({"text": text(10..40)}),
        json!({"messages": [{"role": "tool", "content": "w9"}]}),
        json!({"conversations": [{"from": "human", "value": "w5"}]}),
    ];
    let lines: Vec<String> = lines.iter().map(Json::to_string).collect();
    let file = write(parent.path(), "documents.jsonl", lines.join("\n"));
    let draw =
        |options| Calibration::from_files(std::slice::from_ref(&file), None, &checkpoint, options).unwrap();
    let drawn = draw(OPTIONS);
    let expected = [
        "begin user w1 w2 end assistant w3 end".to_owned(),
        format!("begin {}", text(10..20)),
        format!("begin {}", text(20..30)),
        format!("begin {}", text(30..40)),
        "begin user w5 end".to_owned(),
    ];
    let mut sequences = words(&checkpoint, &drawn);
    sequences.sort();
    let mut sorted = expected.to_vec();
    sorted.sort();
    assert_eq!(sequences, sorted, "the tool's message is refused and skipped");
    let one = draw(CalibrationOptions { samples: 1, sequence_length: 12, ..OPTIONS });
    assert_eq!(one.sequences().len(), 1);
    assert_eq!(draw(OPTIONS), drawn);
}

#[test]
fn a_model_without_a_template_sees_conversations_as_texts() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), None);
    let file = write(parent.path(), "chat.jsonl", r#"{"prompt": "w1 w2", "completion": "w3"}"#);
    let drawn = Calibration::from_files(&[file], None, &checkpoint, OPTIONS).unwrap();
    assert_eq!(words(&checkpoint, &drawn), ["begin w1 w2 w3"]);
}

#[test]
fn data_without_a_usable_sample_is_refused_with_the_reasons() {
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), Some(TEMPLATE));
    let tool = json!({"messages": [{"role": "tool", "content": "w9"}]}).to_string();
    for (name, contents, problem) in [
        (
            "a.jsonl",
            tool.as_str(),
            "a.jsonl line 1: the chat template refuses these messages: tools are unknown",
        ),
        ("a.txt", "w1 w2", "a.txt: 2 tokens, fewer than one sequence of 11"),
        ("a.json", r#"[{"body": "w1"}]"#, "a.json element 1: none of the known fields, it has \"body\""),
    ] {
        let file = write(parent.path(), name, contents);
        let refused = Calibration::from_files(&[file], None, &checkpoint, OPTIONS).unwrap_err().to_string();
        assert!(refused.contains(problem), "{refused}");
    }
    let file = write(parent.path(), "a.txt", text(0..100));
    for (samples, sequence_length) in [(0, 11), (8, 65), (8, 1)] {
        let options = CalibrationOptions { samples, sequence_length, seed: 0 };
        let refused =
            Calibration::from_files(std::slice::from_ref(&file), None, &checkpoint, options).unwrap_err();
        assert!(refused.to_string().contains("2 to 64 tokens"), "{refused}");
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn parquet_rows_are_read_as_json_lines_are() {
    let documents = |name: &str| match read(&golden(name), None, &mut Skipped::default()).unwrap() {
        Contents::Documents(documents) => documents,
        Contents::Text(text) => panic!("{text} is no document"),
    };
    let rows = documents("documents.parquet");
    assert_eq!(rows.iter().map(|&(place, _)| place).collect::<Vec<_>>(), [1, 2, 3, 4, 7, 9].map(Place::Row));
    let lines = documents("documents.jsonl").into_iter().map(|(_, document)| document);
    assert!(rows.into_iter().map(|(_, document)| document).eq(lines));

    let text = read(&golden("documents.parquet"), Some("text"), &mut Skipped::default()).unwrap();
    assert!(matches!(text, Contents::Documents(documents) if documents.len() == 1));
    let parent = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(parent.path(), Some(TEMPLATE));
    let files = [golden("documents.parquet")];
    let drawn = Calibration::from_files(&files, None, &checkpoint, OPTIONS).unwrap();
    assert!(
        words(&checkpoint, &drawn).concat().contains("begin system w1 end user w2 w3 end assistant w5 end")
    );
    let missing =
        Calibration::from_files(&files, Some("body"), &checkpoint, OPTIONS).unwrap_err().to_string();
    assert!(missing.contains("no column \"body\", it has \"id\", \"messages\""), "{missing}");
}

#[test]
fn a_damaged_parquet_file_is_an_error_or_other_text_and_never_a_panic() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("damaged.parquet");
    let whole = std::fs::read(golden("documents.parquet")).unwrap();
    let read_damaged = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        read(&file, None, &mut Skipped::default()).err().map(|error| error.to_string())
    };
    for length in (0..whole.len()).step_by(50) {
        let error = read_damaged(&whole[..length]).expect("a part of a file is refused");
        assert!(error.contains("damaged.parquet"), "{error}");
    }
    let damaged = (0..whole.len()).step_by(5).filter_map(|position| {
        let mut bytes = whole.clone();
        bytes[position] ^= [0x01, 0x80, 0xff][position % 3];
        read_damaged(&bytes)
    });
    let errors: Vec<String> = damaged.collect();
    assert!(errors.iter().any(|error| error.contains("cannot be read as Parquet")));
    assert!(errors.iter().any(|error| error.contains("it is damaged")), "the decoder no longer panics");
}
