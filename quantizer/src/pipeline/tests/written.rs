//! What is written computes what the run had in memory.

use std::num::NonZeroUsize;

use super::*;

#[test]
fn the_written_model_has_the_logits_of_the_one_in_memory_whatever_was_folded_padded_or_kept() {
    for (class, method) in CLASSES.into_iter().zip([
        GPTQ,
        Method::Awq,
        Method::AwqGptq(GptqSettings { activation_order: true }),
        GPTQ,
    ]) {
        let parent = tempfile::tempdir().unwrap();
        let model = write_model(parent.path(), class, |_, _| {});
        let checkpoint = Checkpoint::open(&model).unwrap();
        let calibration = calibration(&checkpoint, &write_text(parent.path(), 900)).unwrap();
        let kept = Override { modules: ModuleExpression::new(r".*o_proj").unwrap(), change: Change::Keep };
        let settings = Settings {
            overrides: vec![kept],
            pad_for_tensor_parallel: NonZeroUsize::new(3),
            ..settings(method)
        };
        let out = parent.path().join("out");
        let mut report = run(&checkpoint, &out, &settings, Some(&calibration)).unwrap();
        let largest = crate::verify(|activations| Cpu::new(2).with_activations(activations), &out, &report)
            .unwrap()
            .largest_logit_difference
            .unwrap();
        assert_eq!(largest, 0.0, "{class}");

        let logits = &mut report.logits.as_mut().unwrap().logits;
        logits[5] += 1.0;
        let refused = crate::verify(|activations| Cpu::new(2).with_activations(activations), &out, &report)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("token 5"), "{refused}");
    }
}
