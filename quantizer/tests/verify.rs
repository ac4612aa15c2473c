//! What was written is read back and compared with what was computed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::formats::{Format, GptqVersion, GroupSize};
use nibble_model::forward::Model;
use nibble_model::self_test::{SELF_TEST_FILE, SelfTest};
use nibble_quantizer::{Method, RangeSearch, Report, RunOptions, Settings, quantize, verify};
use nibble_tests::tiny_model::{TINY_MODELS, TinyModel};

fn quantized(model: &TinyModel, parent: &Path, format: Format) -> (PathBuf, Report) {
    let (original, out) = (parent.join("original"), parent.join("out"));
    std::fs::create_dir(&original).expect("a new directory");
    model.write(&original);
    let settings = Settings {
        method: Method::RoundToNearest,
        correction: false,
        damping: 0.01,
        overrides: Vec::new(),
        target_bits: None,
        quantize_lm_head: false,
        pad_for_tensor_parallel: None,
        bits: 4,
        group_size: GroupSize::Inputs(16),
        symmetric: false,
        range: RangeSearch::MinMax,
        format,
        threads: 1,
    };
    let options = RunOptions { resume: false, journal_interval: Duration::ZERO, memory_limit: u64::MAX };
    let checkpoint = Checkpoint::open(&original).expect("a valid checkpoint");
    let report =
        quantize(Cpu::new(1), &checkpoint, &out, &settings, None, options, &mut |_| {}).expect("quantized");
    (out, report)
}

#[test]
fn what_is_written_passes_its_own_self_test_loaded_and_streamed() {
    for (index, model) in TINY_MODELS.iter().enumerate() {
        let formats = [Format::Gptq(GptqVersion::V1), Format::Awq, Format::CompressedTensors];
        let parent = tempfile::tempdir().expect("a temporary directory");
        let (out, report) = quantized(model, parent.path(), formats[index % 3]);
        let test = verify(|| Cpu::new(2), &out, &report).expect("what was written reads back").self_test;
        assert_eq!(SelfTest::open(&out).expect("written"), test, "read back to the last bit");
        assert!(test.tolerance > 0.0 && test.logits.len() == 16);

        let checkpoint = Checkpoint::open(&out).expect("a valid checkpoint");
        test.check_weights(&checkpoint).expect("unchanged");
        let mut loaded = Model::load(Cpu::new(2), &checkpoint, 64).expect("a valid model");
        assert_eq!(test.check_model(&mut loaded, &out).expect("the same logits"), 0.0, "{}", model.name);
        assert_eq!(test.check_streamed(Cpu::new(1), &checkpoint).expect("the same logits"), 0.0);
    }
}

#[test]
fn a_matrix_that_reads_back_as_another_is_named_and_no_self_test_is_written() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let (out, mut report) = quantized(&TINY_MODELS[0], parent.path(), Format::Gptq(GptqVersion::V1));
    report.layers[9].checksum = report.layers[8].checksum;
    let message = verify(|| Cpu::new(1), &out, &report).expect_err("refused").to_string();
    assert!(message.contains(&report.layers[9].name), "{message}");
    assert!(message.contains(&report.layers[8].checksum.to_string()), "{message}");
    report.layers[9].name = "model.norm".to_owned();
    let message = verify(|| Cpu::new(1), &out, &report).expect_err("refused").to_string();
    assert!(message.contains("model.norm") && message.contains("not quantized"), "{message}");
    assert!(!out.join(SELF_TEST_FILE).exists());
}

#[test]
fn logits_that_are_off_are_refused_and_those_within_the_tolerance_are_not() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let (out, report) = quantized(&TINY_MODELS[4], parent.path(), Format::CompressedTensors);
    let recorded = verify(|| Cpu::new(1), &out, &report).expect("what was written reads back").self_test;
    let checkpoint = Checkpoint::open(&out).expect("a valid checkpoint");
    let shifted = |by: f32| {
        let mut test = recorded.clone();
        test.logits[7].logit += by * test.tolerance;
        test.check_streamed(Cpu::new(1), &checkpoint)
    };
    assert!(shifted(0.9).expect("within the tolerance") > 0.0);
    let message = shifted(-1.1).expect_err("off").to_string();
    assert!(message.contains(&format!("token {}", recorded.logits[7].token)), "{message}");
    let mut foreign = recorded.clone();
    foreign.logits[0].token = 1_000_000;
    assert!(foreign.check_streamed(Cpu::new(1), &checkpoint).is_err());
    foreign.tokens = vec![1_000_000];
    assert!(foreign.check_streamed(Cpu::new(1), &checkpoint).is_err());
}
