//! `nibble quantize`: an INT4 checkpoint from a floating-point one.

mod calibration;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use nibble_model::checkpoint::Checkpoint;
use nibble_model::evaluation::{WindowOptions, evaluate};
use nibble_model::formats::{Format, GptqVersion, GroupSize};
use nibble_model::tokenizer::Tokenizer;
use nibble_quantizer::{GptqSettings, Method, RangeSearch, Report, RunOptions, Settings, quantize};
use serde_json::json;

use self::calibration::CalibrationArguments;
use crate::device::{DeviceArguments, load, open_checkpoint};
use crate::output::{Progress, print_json, start_logging};

/// Arguments of `nibble quantize`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble quantize ./SmolLM2-135M ./SmolLM2-135M-int4 --method gptq \
    --group-size 64 --calibration valid.txt --samples 64 --sequence-length 512")]
pub(crate) struct QuantizeArguments {
    /// A model directory.
    model: String,
    /// The directory to write, which must not exist.
    out: PathBuf,
    /// How codes are chosen: rtn rounds each weight, gptq makes up for each rounding error.
    #[arg(long, value_enum, default_value_t = MethodArgument::Gptq)]
    method: MethodArgument,
    /// Bits of a weight: 3, 4 or 8; awq files have 4.
    #[arg(long, default_value_t = 4)]
    bits: u32,
    /// Consecutive inputs that share a scale; -1 for all inputs of an output channel.
    #[arg(long, default_value = "128", allow_negative_numbers = true, value_parser = parse_group_size)]
    group_size: GroupSize,
    /// Put every zero point in the middle of the range.
    #[arg(long)]
    sym: bool,
    /// Quantize inputs in order of falling activation; groups stay consecutive inputs, so that readers need
    /// no permutation (gptq).
    #[arg(long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    #[arg(action = clap::ArgAction::Set)]
    desc_act: bool,
    /// How often each code and scale is set again to its best value while all others stay (gptq).
    #[arg(long, value_name = "SWEEPS", default_value_t = 4)]
    refine: usize,
    /// Let the weights of each layer make up for the errors of the layers before it (gptq).
    #[arg(long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    #[arg(action = clap::ArgAction::Set)]
    correct: bool,
    /// Calibration states larger than this are kept in a file beside OUT, such as 4GB.
    #[arg(long, value_name = "BYTES", default_value = "4GB", value_parser = crate::memory::parse_bytes)]
    memory_limit: u64,
    /// Go on with a run of the same arguments that did not finish. What it had done is in OUT.resume; the result
    /// has the same bytes as that of a run that was never stopped.
    #[arg(long)]
    resume: bool,
    /// Seconds between two points that a run can be resumed from, at the ends of layers.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    journal_interval: u64,
    /// How the range of a group is found: min-max clips nothing (default of rtn), mse has the least squared
    /// error (default of gptq).
    #[arg(long, value_enum)]
    range: Option<RangeArgument>,
    #[command(flatten)]
    calibration: CalibrationArguments,
    /// Fraction of the mean Hessian diagonal added to the diagonal (gptq).
    #[arg(long, default_value_t = 0.01)]
    damp: f64,
    /// The format of the checkpoint.
    #[arg(long, value_enum, default_value_t = FormatArgument::Gptq)]
    format: FormatArgument,
    /// What gptq files store: v1 the zero point minus one, as every reader expects; v2 the zero point.
    #[arg(long, value_enum, default_value_t = VersionArgument::V1)]
    gptq_version: VersionArgument,
    /// A UTF-8 text to measure perplexity on, before and after.
    #[arg(long, value_name = "FILE")]
    eval_text: Option<PathBuf>,
    /// Tokens of an evaluation window.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    eval_window: usize,
    /// Score the first N evaluation windows only.
    #[arg(long, value_name = "N")]
    eval_windows: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    Rtn,
    Gptq,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RangeArgument {
    MinMax,
    Mse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArgument {
    Gptq,
    Awq,
    CompressedTensors,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum VersionArgument {
    V1,
    V2,
}

fn parse_group_size(text: &str) -> Result<GroupSize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(GroupSize::PerChannel),
        Ok(size) if size > 0 => {
            usize::try_from(size).map(GroupSize::Inputs).map_err(|error| error.to_string())
        }
        _ => Err("a group size is a positive number, or -1 for one group per output channel".to_owned()),
    }
}

impl QuantizeArguments {
    fn settings(&self) -> Settings {
        Settings {
            method: match self.method {
                MethodArgument::Rtn => Method::RoundToNearest,
                MethodArgument::Gptq => Method::Gptq(GptqSettings {
                    damping: self.damp,
                    activation_order: self.desc_act,
                    refinement_sweeps: self.refine,
                    correction: self.correct,
                }),
            },
            bits: self.bits,
            group_size: self.group_size,
            symmetric: self.sym,
            // Measured: without GPTQ to make up for them, clipped weights cost more than the finer steps gain.
            range: match (self.range, self.method) {
                (Some(RangeArgument::MinMax), _) | (None, MethodArgument::Rtn) => RangeSearch::MinMax,
                (Some(RangeArgument::Mse), _) | (None, MethodArgument::Gptq) => RangeSearch::MeanSquare,
            },
            format: match (self.format, self.gptq_version) {
                (FormatArgument::Gptq, VersionArgument::V1) => Format::Gptq(GptqVersion::V1),
                (FormatArgument::Gptq, VersionArgument::V2) => Format::Gptq(GptqVersion::V2),
                (FormatArgument::Awq, _) => Format::Awq,
                (FormatArgument::CompressedTensors, _) => Format::CompressedTensors,
            },
            threads: self.device.threads(),
        }
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &QuantizeArguments) -> anyhow::Result<()> {
    start_logging("warn");
    let started = Instant::now();
    let checkpoint = open_checkpoint(&arguments.model)?;
    let settings = arguments.settings();
    // A text that cannot be scored must not be found out after the work.
    let eval_tokens = match &arguments.eval_text {
        Some(text) => Some(read_tokens(&checkpoint, text, arguments.eval_window)?),
        None => None,
    };
    let calibration = arguments.calibration.read(&checkpoint, &settings, &arguments.device)?;
    let mut bar = Progress::new(format!("quantizing {}", arguments.model));
    let cpu = arguments.device.cpu();
    let options = RunOptions {
        resume: arguments.resume,
        journal_interval: Duration::from_secs(arguments.journal_interval),
        memory_limit: arguments.memory_limit,
    };
    let mut show = |progress: nibble_quantizer::Progress<'_>| {
        let matrix = progress.matrix;
        let message = format!("{} error {:.3} %", matrix.name, 100.0 * matrix.relative_error);
        bar.update(progress.matrices_done as u64, progress.matrices as u64, &message);
    };
    let report =
        quantize(cpu, &checkpoint, &arguments.out, &settings, calibration.as_ref(), options, &mut show)?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    let peak_memory_bytes = peak_memory_bytes();
    let perplexities = match &eval_tokens {
        Some(tokens) => {
            let before = perplexity(arguments, &checkpoint, tokens, "before")?;
            let written = Checkpoint::open(&arguments.out)?;
            Some((before, perplexity(arguments, &written, tokens, "after")?))
        }
        None => None,
    };
    if arguments.json {
        let mut document = serde_json::to_value(&report)?;
        document["seconds"] = json!(seconds);
        if let Some(bytes) = peak_memory_bytes {
            document["peak_memory_bytes"] = json!(bytes);
        }
        if let Some((before, after)) = perplexities {
            document["perplexity_before"] = json!(before);
            document["perplexity_after"] = json!(after);
        }
        return print_json(&document);
    }
    print_summary(&report);
    println!("{:.3} bits per weight, {seconds:.1} s", report.bits_per_weight);
    if let Some(bytes) = peak_memory_bytes {
        println!("peak memory {:.2} GB", bytes as f64 / 1e9);
    }
    if let Some((before, after)) = perplexities {
        let change = 100.0 * (after / before - 1.0);
        println!("perplexity {before:.4} before, {after:.4} after ({change:+.2} %)");
    }
    println!("wrote {}", arguments.out.display());
    Ok(())
}

/// The mean and the largest relative error of each kind of matrix.
fn print_summary(report: &Report) {
    let measure = if report.errors_are_of_outputs { "output error" } else { "weight error" };
    println!("{:<12} {:>8} {:>18} {:>18}", "matrix", "count", format!("mean {measure}"), "largest, in layer");
    let mut kinds: Vec<&str> = Vec::new();
    for matrix in &report.layers {
        let kind = kind(&matrix.name);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    for wanted in kinds {
        let of_kind = || report.layers.iter().filter(|matrix| kind(&matrix.name) == wanted);
        let count = of_kind().count();
        let mean = of_kind().map(|matrix| matrix.relative_error).sum::<f64>() / count as f64;
        let largest = of_kind().enumerate().max_by(|a, b| a.1.relative_error.total_cmp(&b.1.relative_error));
        if let Some((layer, matrix)) = largest {
            let largest = format!("{:.3} % ({layer})", 100.0 * matrix.relative_error);
            println!("{wanted:<12} {count:>8} {:>16.3} % {largest:>18}", 100.0 * mean);
        }
    }
}

/// The last part of a matrix's name, such as `up_proj`.
fn kind(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The tokens of `text`, at least one window of them.
fn read_tokens(checkpoint: &Checkpoint, text: &Path, window: usize) -> anyhow::Result<Vec<u32>> {
    let contents =
        std::fs::read_to_string(text).with_context(|| format!("cannot read the text {}", text.display()))?;
    let tokenizer = Tokenizer::open(checkpoint.directory(), checkpoint.config())?;
    let tokens = tokenizer.encode(&contents, false)?;
    ensure!(
        (2..=tokens.len()).contains(&window),
        "{} has {} tokens and --eval-window is {window}; it must be from 2 to the number of tokens",
        text.display(),
        tokens.len()
    );
    Ok(tokens)
}

fn perplexity(
    arguments: &QuantizeArguments,
    checkpoint: &Checkpoint,
    tokens: &[u32],
    when: &str,
) -> anyhow::Result<f64> {
    let options = WindowOptions { window: arguments.eval_window, windows: arguments.eval_windows };
    let mut model = load(checkpoint, &arguments.device, arguments.eval_window)?;
    let mut bar = Progress::new(format!("perplexity {when}"));
    let result = evaluate(&mut model, None, tokens, options, &mut |progress| {
        let message = format!("perplexity {:.3}", progress.perplexity);
        bar.update(progress.windows_done as u64, progress.windows as u64, &message);
    })?;
    Ok(result.perplexity)
}

/// The largest resident set of this process so far, where the system tells.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}
