//! `nibble quantize`: an INT4 checkpoint from a floating-point one.

mod arguments;
mod calibration;
mod evaluation;
mod run_report;
mod summary;

use std::time::Instant;

use anyhow::bail;
use nibble_model::checkpoint::Checkpoint;
use nibble_quantizer::quality_gate::{GateStatus, QualityGate, explain_failure};
use nibble_quantizer::report::Quality;
use nibble_quantizer::{quantize, verify};

pub(crate) use self::arguments::QuantizeArguments;
use self::evaluation::{evaluate_both, read_tokens};
use self::run_report::{peak_memory_bytes, start_report};
use self::summary::print_summary;
use crate::hub::model_directory;
use crate::output::{Progress, print_json, start_logging};

/// Runs the command.
pub(crate) fn run(arguments: &QuantizeArguments) -> anyhow::Result<()> {
    start_logging("warn");
    let started = Instant::now();
    let checkpoint = Checkpoint::open(&model_directory(&arguments.model)?)?;
    let settings = arguments.settings();
    // A text that cannot be scored must not be found out after the work.
    let eval_tokens = match &arguments.eval_text {
        Some(text) => Some(read_tokens(&checkpoint, text, arguments.eval_window)?),
        None => None,
    };
    let calibration = arguments.calibration.read(&checkpoint, &settings, &arguments.device)?;
    let mut bar = Progress::new(format!("quantizing {}", arguments.model));
    let mut show = |progress: nibble_quantizer::Progress<'_>| match progress {
        nibble_quantizer::Progress::Surveyed { layers_done, layers } => {
            bar.update(layers_done as u64, layers as u64, "layers measured");
        }
        nibble_quantizer::Progress::Quantized { matrices_done, matrices, matrix } => {
            let message = format!("{} error {:.3} %", matrix.name, 100.0 * matrix.relative_error);
            bar.update(matrices_done as u64, matrices as u64, &message);
        }
    };
    let (cpu, options) = (arguments.device.cpu(), arguments.options());
    let report =
        quantize(cpu, &checkpoint, &arguments.out, &settings, calibration.as_ref(), options, &mut show)?;
    drop(bar);
    let mut run = start_report(arguments, checkpoint.path(), settings, calibration.as_ref(), report);
    run.seconds = started.elapsed().as_secs_f64();
    run.peak_memory_bytes = peak_memory_bytes();
    // Complete as it is: an evaluation that is cut off leaves a report without perplexity and a gate not passed.
    run.quality_gate = arguments.max_perplexity_increase.map(QualityGate::pending);
    run.write(checkpoint.path(), &arguments.out)?;

    eprintln!("reading {} back", arguments.out.display());
    let verification = verify(
        |activations| arguments.device.cpu().with_activations(activations),
        &arguments.out,
        &run.report,
    )?;
    if let Some(difference) = verification.largest_logit_difference {
        eprintln!("its weights are those that were computed, its logits differ by {difference} at most");
    }

    if let (Some(tokens), Some(text)) = (&eval_tokens, &arguments.eval_text) {
        let written = Checkpoint::open(&arguments.out)?;
        let evaluation = evaluate_both(arguments, &checkpoint, &written, tokens)?;
        run.quality = Quality::new(&evaluation, text, arguments.eval_window);
        if let (Some(gate), Some(quality)) = (arguments.max_perplexity_increase, &run.quality) {
            run.quality_gate = Some(gate.judge(quality.perplexity_before, quality.perplexity_after));
        }
        run.write(checkpoint.path(), &arguments.out)?;
    }
    if arguments.json {
        print_json(&run)?;
    } else {
        print_summary(&run);
        println!("wrote {}; its report is nibble_report.html", arguments.out.display());
    }
    if let Some(outcome) = run.quality_gate.filter(|outcome| outcome.status != GateStatus::Passed) {
        let tokens = run.calibration.as_ref().map(|data| data.tokens);
        let explanation = explain_failure(outcome, &run.report, &run.settings, tokens);
        bail!("{explanation}\n  {} is kept, marked as failed", arguments.out.display());
    }
    Ok(())
}
