//! Evaluation one decoder layer at a time gives the bits of evaluation with whole models in memory.

use std::path::Path;

use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::evaluation::{
    Evaluation, EvaluationError, StreamedProgress, WindowOptions, evaluate, evaluate_streamed,
};
use nibble_model::forward::{Batch, Model, Spill, streamed_logits};
use nibble_tests::tiny_model::{TINY_MODELS, TinyModel, VOCABULARY, tokens};

const WINDOWS: WindowOptions = WindowOptions { window: 40, windows: Some(3), context: 0 };

fn write(model: &TinyModel, parent: &Path, name: &str) -> Checkpoint {
    let directory = parent.join(name);
    std::fs::create_dir(&directory).expect("a new directory");
    model.write(&directory);
    Checkpoint::open(&directory).expect("a valid checkpoint")
}

/// A copy of `model` whose layer 1 differs a little; with `head`, its output head does too.
fn perturbed(model: &TinyModel, parent: &Path, head: bool) -> Checkpoint {
    let original = parent.join("original");
    let bytes = std::fs::read(original.join("model.safetensors")).expect("the original");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("valid tensors");
    let edited: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let mut data = view.data().to_vec();
            let output = if model.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
            if name == "model.layers.1.mlp.up_proj.weight" || (head && name == output) {
                for value in data.chunks_exact_mut(4).step_by(3) {
                    value[2] ^= 0x10;
                }
            }
            (name, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let directory = parent.join(if head { "head" } else { "body" });
    std::fs::create_dir(&directory).expect("a new directory");
    let views = edited.iter().map(|(name, dtype, shape, data)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (name.clone(), view.expect("shape and bytes agree"))
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("written");
    std::fs::copy(original.join("config.json"), directory.join("config.json")).expect("copied");
    Checkpoint::open(&directory).expect("a valid checkpoint")
}

fn loaded(model: &Checkpoint, reference: Option<&Checkpoint>, text: &[u32]) -> Evaluation {
    let load = |checkpoint| Model::load(Cpu::new(2), checkpoint, WINDOWS.window).expect("a valid model");
    let mut reference = reference.map(load);
    evaluate(&mut load(model), reference.as_mut(), text, WINDOWS, &mut |_| ()).expect("scored")
}

fn streamed(
    model: &Checkpoint,
    reference: Option<&Checkpoint>,
    text: &[u32],
    memory_bytes: u64,
) -> (Evaluation, Vec<StreamedProgress>) {
    let spill = Spill { memory_bytes, directory: model.path().to_owned() };
    let mut steps = Vec::new();
    let mut progress = |step| steps.push(step);
    let result = evaluate_streamed(Cpu::new(2), model, reference, text, WINDOWS, &spill, &mut progress);
    (result.expect("scored"), steps)
}

#[test]
fn streamed_evaluation_has_the_bits_of_evaluation_with_loaded_models() {
    let text = tokens(170, 3);
    for tiny in &TINY_MODELS {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let original = write(tiny, parent.path(), "original");
        let alone = loaded(&original, None, &text);
        assert_eq!(alone.predicted_tokens, 3 * 39);
        assert_eq!(streamed(&original, None, &text, u64::MAX).0, alone, "{}", tiny.name);
        for head in [false, true] {
            let model = perturbed(tiny, parent.path(), head);
            let both = loaded(&model, Some(&original), &text);
            let divergence = both.reference.expect("a reference").mean_kl_divergence;
            assert!(divergence > 1e-6, "{}: the models differ", tiny.name);
            for memory_bytes in [u64::MAX, 100] {
                let (result, steps) = streamed(&model, Some(&original), &text, memory_bytes);
                assert_eq!(result, both, "{}, memory {memory_bytes}, other head: {head}", tiny.name);
                // Two models of two layers, and their output heads together.
                assert_eq!(steps.len(), 3 * 5);
                assert!(steps.iter().enumerate().all(|(at, step)| step.steps_done == at + 1));
                assert!(steps.iter().all(|step| step.steps == 15));
            }
        }
        let left = std::fs::read_dir(original.path()).expect("a directory").count();
        assert_eq!(left, 2, "no spill file is left beside config.json and the weights");
    }
}

#[test]
fn what_is_context_only_is_not_scored() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let checkpoint = write(&TINY_MODELS[0], parent.path(), "original");
    let text = tokens(30, 4);
    let options = WindowOptions { window: 30, windows: None, context: 12 };
    let mut model = Model::load(Cpu::new(1), &checkpoint, 30).expect("a valid model");
    let found = evaluate(&mut model, None, &text, options, &mut |_| ()).expect("scored");
    let mut cache = model.kv_cache(2).unwrap();
    let logits = model.forward(&Batch::single(&text, 0, vec![0, 1]), &mut cache).expect("a valid batch");
    let negative_log_likelihood = |row: usize| {
        let row_logits = logits.row(row);
        let total: f64 = row_logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        total.ln() - f64::from(row_logits[text[row + 1] as usize])
    };
    let mean = (12..29).map(negative_log_likelihood).sum::<f64>() / 17.0;
    assert_eq!(found.predicted_tokens, 17);
    assert!((found.perplexity / mean.exp() - 1.0).abs() < 1e-9, "{} {}", found.perplexity, mean.exp());
    let spill = Spill { memory_bytes: u64::MAX, directory: parent.path().to_owned() };
    let streamed = evaluate_streamed(Cpu::new(1), &checkpoint, None, &text, options, &spill, &mut |_| ());
    assert_eq!(streamed.expect("scored"), found);
    let nothing = WindowOptions { context: 29, ..options };
    let error = evaluate(&mut model, None, &text, nothing, &mut |_| ()).expect_err("refused").to_string();
    assert!(error.contains("29") && error.contains("30"), "{error}");
}

#[test]
fn streamed_logits_have_the_bits_of_a_step_of_the_loaded_model() {
    for tiny in &TINY_MODELS {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let checkpoint = write(tiny, parent.path(), "original");
        let tokens = tokens(37, 8);
        let mut model = Model::load(Cpu::new(2), &checkpoint, 64).expect("a valid model");
        let mut cache = model.kv_cache(4).unwrap();
        let batch = Batch::single(&tokens, 0, vec![0, 1, 2, 3]);
        let whole = model.forward(&batch, &mut cache).expect("a valid batch");
        let streamed = streamed_logits(Cpu::new(1), &checkpoint, &tokens).expect("a valid model");
        assert_eq!(streamed, whole, "{}", tiny.name);
    }
}

#[test]
fn what_cannot_be_scored_is_refused_as_with_loaded_models() {
    let parent = tempfile::tempdir().expect("a temporary directory");
    let checkpoint = write(&TINY_MODELS[0], parent.path(), "original");
    let spill = Spill { memory_bytes: 0, directory: parent.path().join("missing") };
    let refusal = |text: &[u32], window| -> EvaluationError {
        let options = WindowOptions { window, windows: None, context: 0 };
        evaluate_streamed(Cpu::new(1), &checkpoint, None, text, options, &spill, &mut |_| ())
            .expect_err("refused")
    };
    assert!(matches!(refusal(&[1; 9], 10), EvaluationError::TextTooShort { tokens: 9, window: 10 }));
    assert!(matches!(refusal(&[1; 9], 1), EvaluationError::WindowTooSmall(1)));
    let message = refusal(&[1; 9], 4).to_string();
    assert!(message.contains("cannot create a file for hidden states in"), "{message}");
    assert!(message.contains("missing"), "{message}");
    let spill = Spill { memory_bytes: u64::MAX, ..spill };
    let options = WindowOptions { window: 4, windows: None, context: 0 };
    let text = [VOCABULARY as u32; 4];
    let error = evaluate_streamed(Cpu::new(1), &checkpoint, None, &text, options, &spill, &mut |_| ());
    let message = error.expect_err("refused").to_string();
    assert!(message.contains("token 90 is not below 90"), "{message}");
}
