//! What was written is read back and compared with what was computed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nibble_kernels::backend::Activations;
use nibble_kernels::device::cpu::{Cpu, InstructionSet};
use nibble_model::checkpoint::Checkpoint;
use nibble_model::formats::{Format, GptqVersion, GroupSize};
use nibble_model::forward::{Batch, Model, SequenceRows};
use nibble_model::self_test::{SELF_TEST_FILE, SelfTest};
use nibble_quantizer::{Method, RangeSearch, Report, RunOptions, Settings, quantize, verify};
use nibble_tests::tiny_model::{TINY_MODELS, TinyModel, tokens};

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
        let test = verify(|activations| Cpu::new(2).with_activations(activations), &out, &report)
            .expect("what was written reads back")
            .self_test;
        assert_eq!(SelfTest::open(&out).expect("written"), test, "read back to the last bit");
        assert!(test.tolerance > 0.0 && test.logits.len() == 16);

        let checkpoint = Checkpoint::open(&out).expect("a valid checkpoint");
        test.check_weights(&checkpoint).expect("unchanged");
        let mut loaded = Model::load(Cpu::new(2), &checkpoint, 64).expect("a valid model");
        assert_eq!(test.check_model(&mut loaded, &out).expect("the same logits"), 0.0, "{}", model.name);
        assert_eq!(test.check_streamed(Cpu::new(1), &checkpoint).expect("the same logits"), 0.0);

        assert_ne!(test.rounded_logits, test.logits, "rounded activations are others");
        let rounded = |set| Cpu::with_instruction_set(2, set).with_activations(Activations::Integer);
        for set in InstructionSet::available() {
            let mut loaded = Model::load(rounded(set), &checkpoint, 64).expect("a valid model");
            let difference = test.check_model(&mut loaded, &out).expect("within the tolerance");
            let streamed = test.check_streamed(rounded(set), &checkpoint).expect("within the tolerance");
            assert_eq!(difference, streamed, "{}", model.name);
            assert!(set != InstructionSet::detect() || difference == 0.0, "{}: {difference}", model.name);
        }
    }
}

#[test]
fn with_rounded_activations_a_sequence_has_the_same_bits_alone_among_others_and_in_any_chunks() {
    for model in &TINY_MODELS {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let (out, _) = quantized(model, parent.path(), Format::CompressedTensors);
        let checkpoint = Checkpoint::open(&out).expect("a valid checkpoint");
        let cpu = Cpu::new(2).with_activations(Activations::Integer);
        let mut loaded = Model::load(cpu, &checkpoint, 64).expect("a valid model");
        let mut cache = loaded.kv_cache(3 * 4).expect("there is memory for a test");
        let sequences: Vec<Vec<u32>> = (0..3).map(|index| tokens(40 + 5 * index, 50 + index)).collect();
        let table = |index: usize| (0..4).map(|block| (block * 3 + index) as u32).collect::<Vec<u32>>();
        let mut together = Batch::default();
        for (index, tokens) in sequences.iter().enumerate() {
            let (first_row, rows) = (together.token_ids.len(), tokens.len());
            together.token_ids.extend(tokens);
            together.positions.extend(0..rows as u32);
            together.logit_rows.extend(first_row..first_row + rows);
            let block_table = table(index);
            together.sequences.push(SequenceRows { first_row, rows, first_position: 0, block_table });
        }
        let batched = loaded.forward(&together, &mut cache).expect("a valid batch").values;
        for chunk in [64, 1, 7] {
            let mut alone = Vec::new();
            for (index, tokens) in sequences.iter().enumerate() {
                for (at, part) in tokens.chunks(chunk).enumerate() {
                    let batch = Batch::single(part, at * chunk, table(index));
                    alone.extend(loaded.forward(&batch, &mut cache).expect("a valid batch").values);
                }
            }
            assert_eq!(alone, batched, "{} in chunks of {chunk}", model.name);
        }
    }
}

#[test]
fn a_matrix_that_reads_back_as_another_is_named_and_no_self_test_is_written() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let (out, mut report) = quantized(&TINY_MODELS[0], parent.path(), Format::Gptq(GptqVersion::V1));
    report.layers[9].checksum = report.layers[8].checksum;
    let message = verify(|activations| Cpu::new(1).with_activations(activations), &out, &report)
        .expect_err("refused")
        .to_string();
    assert!(message.contains(&report.layers[9].name), "{message}");
    assert!(message.contains(&report.layers[8].checksum.to_string()), "{message}");
    report.layers[9].name = "model.norm".to_owned();
    let message = verify(|activations| Cpu::new(1).with_activations(activations), &out, &report)
        .expect_err("refused")
        .to_string();
    assert!(message.contains("model.norm") && message.contains("not quantized"), "{message}");
    assert!(!out.join(SELF_TEST_FILE).exists());
}

#[test]
fn logits_that_are_off_are_refused_and_those_within_the_tolerance_are_not() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let (out, report) = quantized(&TINY_MODELS[4], parent.path(), Format::CompressedTensors);
    let recorded = verify(|activations| Cpu::new(1).with_activations(activations), &out, &report)
        .expect("what was written reads back")
        .self_test;
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
