//! The arguments of `nibble quantize`, and the settings they ask for.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use nibble_model::formats::{Format, GptqVersion, GroupSize, ModuleExpression};
use nibble_quantizer::quality_gate::QualityGate;
use nibble_quantizer::{Change, GptqSettings, Method, Override, RangeSearch, RunOptions, Settings};

use super::calibration::CalibrationArguments;
use crate::device::DeviceArguments;
use crate::memory::parse_bytes;

/// Arguments of `nibble quantize`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble quantize ./SmolLM2-135M ./SmolLM2-135M-int4 --method gptq \
    --group-size 64 --calibration valid.txt --samples 64 --sequence-length 512")]
pub(crate) struct QuantizeArguments {
    /// A model directory.
    pub(super) model: String,
    /// The directory to write, which must not exist.
    pub(super) out: PathBuf,
    /// How codes are chosen: rtn rounds each weight; awq gives inputs with large activations finer steps first;
    /// gptq makes up for each rounding error; awq-gptq does both.
    #[arg(long, value_enum, default_value_t = MethodArgument::Gptq)]
    pub(super) method: MethodArgument,
    /// Bits of a weight: 3, 4 or 8; awq files have 4.
    #[arg(long, default_value_t = 4)]
    pub(super) bits: u32,
    /// Consecutive inputs that share a scale; -1 for all inputs of an output channel.
    #[arg(long, default_value = "128", allow_negative_numbers = true, value_parser = parse_group_size)]
    pub(super) group_size: GroupSize,
    /// Put every zero point in the middle of the range.
    #[arg(long)]
    pub(super) sym: bool,
    /// Quantize inputs in order of falling activation; groups stay consecutive inputs, so that readers need
    /// no permutation (gptq).
    #[arg(long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    #[arg(action = clap::ArgAction::Set)]
    pub(super) desc_act: bool,
    /// How the range of a group is found: min-max clips nothing (default of rtn), mse has the least squared
    /// error (default of the others).
    #[arg(long, value_enum)]
    pub(super) range: Option<RangeArgument>,
    #[command(flatten)]
    pub(super) calibration: CalibrationArguments,
    /// Let the weights of each layer make up for the errors of the layers before it (all but rtn).
    #[arg(long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", value_name = "BOOL")]
    #[arg(action = clap::ArgAction::Set)]
    pub(super) correct: bool,
    /// Calibration states larger than this are kept in a file beside OUT.
    #[arg(long, value_name = "SIZE", default_value = "4GB", value_parser = parse_bytes)]
    memory_limit: u64,
    /// Go on with a run of the same arguments that did not finish. What it had done is in OUT.resume; the result
    /// has the same bytes as that of a run that was never stopped.
    #[arg(long)]
    resume: bool,
    /// Seconds between two points that a run can be resumed from, at the ends of layers.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    journal_interval: u64,
    /// Fraction of the mean Hessian diagonal added to the diagonal (all but rtn).
    #[arg(long, default_value_t = 0.05)]
    pub(super) damp: f64,
    /// Other settings for the linear layers whose names begin as a regular expression says:
    /// EXPRESSION=bits:8,group-size:32 or EXPRESSION=keep, which leaves them unquantized. The first that matches
    /// decides. Readers that fuse q, k, v and gate, up need the same settings for all parts.
    #[arg(long = "override", value_name = "EXPRESSION=CHANGE", value_parser = parse_override)]
    overrides: Vec<Override>,
    /// Measure how much each linear layer matters, and give the most sensitive ones smaller groups or 8 bits until
    /// weights take BITS in the mean, scales and zero points included.
    #[arg(long, value_name = "BITS")]
    target_bits: Option<f64>,
    /// Quantize lm_head too, the output head of a model that has one of its own; --override lm_head=bits:8 gives it more
    /// bits. Its inputs are not scaled (awq).
    #[arg(long)]
    quantize_lm_head: bool,
    /// Pad the intermediate size with zeros, which change nothing, to the next one that splits into whole groups, and
    /// into multiples of 64, over RANKS ranks of tensor parallelism.
    #[arg(long, value_name = "RANKS")]
    pad_for_tensor_parallel: Option<NonZeroUsize>,
    /// The format of the checkpoint.
    #[arg(long, value_enum, default_value_t = FormatArgument::Gptq)]
    pub(super) format: FormatArgument,
    /// What gptq files store: v1 the zero point minus one, which older readers expect; v2 the zero point, without which
    /// gptqmodel and transformers refuse asymmetric files of other programs.
    #[arg(long, value_enum, default_value_t = VersionArgument::V1)]
    pub(super) gptq_version: VersionArgument,
    /// A UTF-8 text to measure perplexity on, before and after.
    #[arg(long, value_name = "FILE")]
    pub(super) eval_text: Option<PathBuf>,
    /// Tokens of an evaluation window.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(super) eval_window: usize,
    /// Score the first N evaluation windows only.
    #[arg(long, value_name = "N")]
    pub(super) eval_windows: Option<usize>,
    /// Fail when perplexity on --eval-text rises by more than this percentage, such as 5%. The checkpoint is kept,
    /// marked as failed.
    #[arg(long, value_name = "PERCENT%", requires = "eval_text")]
    pub(super) max_perplexity_increase: Option<QualityGate>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) device: DeviceArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodArgument {
    Rtn,
    Awq,
    Gptq,
    AwqGptq,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum RangeArgument {
    MinMax,
    Mse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FormatArgument {
    Gptq,
    Awq,
    CompressedTensors,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum VersionArgument {
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

fn parse_override(text: &str) -> Result<Override, String> {
    let expected =
        "EXPRESSION=bits:N, EXPRESSION=group-size:N, both with a comma between, or EXPRESSION=keep";
    let (source, change) = text.rsplit_once('=').ok_or_else(|| format!("expected {expected}"))?;
    let modules = ModuleExpression::new(source).map_err(|error| error.to_string())?;
    if change == "keep" {
        return Ok(Override { modules, change: Change::Keep });
    }
    let (mut bits, mut group_size) = (None, None);
    for part in change.split(',') {
        match part.split_once(':') {
            Some(("bits", value)) => {
                bits = Some(value.parse().map_err(|_| format!("bits are \"{value}\", expected 3, 4 or 8"))?);
            }
            Some(("group-size", value)) => group_size = Some(parse_group_size(value)?),
            _ => return Err(format!("\"{part}\" is not known; expected {expected}")),
        }
    }
    Ok(Override { modules, change: Change::Quantize { bits, group_size } })
}

impl QuantizeArguments {
    /// What is asked for, not checked against a model.
    pub(super) fn settings(&self) -> Settings {
        let gptq = GptqSettings { activation_order: self.desc_act };
        Settings {
            method: match self.method {
                MethodArgument::Rtn => Method::RoundToNearest,
                MethodArgument::Awq => Method::Awq,
                MethodArgument::Gptq => Method::Gptq(gptq),
                MethodArgument::AwqGptq => Method::AwqGptq(gptq),
            },
            correction: self.correct && self.method != MethodArgument::Rtn,
            damping: self.damp,
            overrides: self.overrides.clone(),
            target_bits: self.target_bits,
            quantize_lm_head: self.quantize_lm_head,
            pad_for_tensor_parallel: self.pad_for_tensor_parallel,
            bits: self.bits,
            group_size: self.group_size,
            symmetric: self.sym,
            // Measured: without GPTQ to make up for them, clipped weights cost more than the finer steps gain.
            range: match (self.range, self.method) {
                (Some(RangeArgument::MinMax), _) | (None, MethodArgument::Rtn) => RangeSearch::MinMax,
                (Some(RangeArgument::Mse), _) | (None, _) => RangeSearch::MeanSquare,
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

    /// How the run is done.
    pub(super) fn options(&self) -> RunOptions {
        RunOptions {
            resume: self.resume,
            journal_interval: Duration::from_secs(self.journal_interval),
            memory_limit: self.memory_limit,
        }
    }
}
