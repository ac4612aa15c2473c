//! How a model is to be quantized, and whether that fits the model.

use std::num::NonZeroUsize;

use nibble_model::config::ModelConfig;
use nibble_model::error::CheckpointError;
use nibble_model::formats::{
    ActivationOrder, Format, GroupSize, Misfit, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use nibble_model::forward::LinearRole;
use serde::Serialize;

use crate::error::QuantizeError;
use crate::plan::{Override, Plan, specs};

/// Group sizes to suggest where the one asked for does not fit.
const USUAL_GROUP_SIZES: [usize; 4] = [128, 64, 32, 16];

/// What the parts that tensor parallelism gives each rank are a multiple of: the kernels named Marlin, which vLLM and
/// SGLang run, take no fewer inputs at once.
const MARLIN_MULTIPLE: usize = 128;
/// How many times the intermediate size may become what it was: enough for small models, no more than memory holds.
const LARGEST_PADDING: usize = 16;

/// How a model is to be quantized.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// How codes are chosen.
    pub method: Method,
    /// Whether weights move, before they are rounded, to those that make up for the errors of the layers before.
    /// Needs calibration data.
    pub correction: bool,
    /// Fraction of the Hessian's mean diagonal that is added to its diagonal, for GPTQ and for correction.
    pub damping: f64,
    /// Bits of a code: 3, 4 or 8.
    pub bits: u32,
    /// Inputs that share a scale and a zero point.
    pub group_size: GroupSize,
    /// Whether every zero point is the middle of the range.
    pub symmetric: bool,
    /// How the range of a group is found.
    pub range: RangeSearch,
    /// Other settings for single linear layers; the first that matches decides.
    pub overrides: Vec<Override>,
    /// Bits for each weight, scales and zero points included, up to which the most sensitive linear layers get smaller
    /// groups or 8 bits.
    pub target_bits: Option<f64>,
    /// Whether the output head is quantized too.
    pub quantize_lm_head: bool,
    /// Ranks of tensor parallelism whose parts of the feed-forward layers are to be whole groups: the intermediate size
    /// is padded with zeros until they are.
    pub pad_for_tensor_parallel: Option<NonZeroUsize>,
    /// The format of the written checkpoint.
    pub format: Format,
    /// Threads of the linear algebra. The result does not depend on it.
    pub threads: usize,
}

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Each weight is rounded to the nearest value of its group's grid.
    RoundToNearest,
    /// The same, after inputs with large activations were given finer steps (AWQ).
    Awq,
    /// Each input's rounding error is made up for by the inputs that come after it (GPTQ).
    Gptq(GptqSettings),
    /// GPTQ after the scaling of AWQ.
    AwqGptq(GptqSettings),
}

/// Settings of GPTQ alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GptqSettings {
    /// Whether inputs are quantized in order of falling activation. Groups stay consecutive inputs, so that
    /// no permutation is needed at run time; their grids are then fixed before the first input.
    pub activation_order: bool,
}

impl Method {
    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundToNearest => "rtn",
            Self::Awq => "awq",
            Self::Gptq(_) => "gptq",
            Self::AwqGptq(_) => "awq-gptq",
        }
    }

    /// The settings of GPTQ, where it is part of the method.
    pub fn gptq(self) -> Option<GptqSettings> {
        match self {
            Self::RoundToNearest | Self::Awq => None,
            Self::Gptq(settings) | Self::AwqGptq(settings) => Some(settings),
        }
    }

    /// Whether inputs are scaled before weights are rounded.
    pub fn scales_inputs(self) -> bool {
        matches!(self, Self::Awq | Self::AwqGptq(_))
    }
}

/// How the range of a group is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RangeSearch {
    /// The smallest range that clips nothing.
    MinMax,
    /// The range of least squared error.
    MeanSquare,
}

impl Settings {
    /// Checks that every linear layer of the model can be quantized so.
    ///
    /// # Errors
    /// Names the matrix that does not fit and group sizes that do.
    pub fn check(&self, config: &ModelConfig) -> Result<(), QuantizeError> {
        if !matches!(self.bits, 3 | 4 | 8) {
            return refuse("--bits", self.bits.to_string(), "3, 4 or 8", "4 is usual");
        }
        let damping = self.damping;
        if self.factors() && !(damping > 0.0 && damping.is_finite()) {
            return refuse("--damp", damping.to_string(), "a positive number", "0.05 is the default");
        }
        if config.quantization.is_some() {
            let help = "quantize the original checkpoint";
            return refuse("the model", "quantized already".to_owned(), "an unquantized checkpoint", help);
        }
        if self.quantize_lm_head && config.tie_word_embeddings {
            let expected = "a model with an lm_head of its own; this one's is its embedding table \
                            (tie_word_embeddings), which is looked up row by row";
            return refuse("--quantize-lm-head", "given".to_owned(), expected, "leave the option out");
        }
        let matches = |item: &Override, lm_head: bool| {
            specs(config, lm_head).any(|spec| item.modules.matches(&spec.name))
        };
        if let Some(unmatched) = self.overrides.iter().find(|item| !matches(item, self.quantize_lm_head)) {
            let found =
                format!("\"{}\", which no linear layer's name begins with", unmatched.modules.source());
            let expected = "a name such as model.layers.0.mlp.down_proj";
            let help = match matches(unmatched, true) {
                true => "lm_head is only quantized with --quantize-lm-head",
                false => "see nibble inspect",
            };
            return refuse("--override", found, expected, help);
        }
        let padded = self.padded(config)?;
        self.check_matrices(&padded).map_err(|error| self.with_padding_as_help(error, config))?;
        if let Some(target) = self.target_bits {
            if self.format == Format::Awq {
                let help = "choose --format gptq or compressed-tensors";
                return refuse("--target-bits", target.to_string(), "a format that mixes group sizes", help);
            }
            let least = self.plan(&padded).bits_per_weight(&padded);
            if !(target >= least && target <= 8.0) {
                let expected = format!("from {least:.3}, what these settings take, to 8");
                let help = "give more bits, or settings that take fewer";
                return refuse("--target-bits", target.to_string(), &expected, help);
            }
        }
        Ok(())
    }

    /// Checks that every linear layer of a model of the shape `config` can be quantized so.
    fn check_matrices(&self, config: &ModelConfig) -> Result<(), QuantizeError> {
        let plan = self.plan(config);
        let specs = || specs(config, self.quantize_lm_head);
        for spec in specs() {
            let Some(module) = plan.settings_of(&spec.name) else { continue };
            if !matches!(module.bits, 3 | 4 | 8) {
                return refuse(&spec.name, format!("of {} bits", module.bits), "3, 4 or 8", "4 is usual");
            }
            let group_size = module.group_size.inputs(spec.in_features);
            if group_size == 0 || !spec.in_features.is_multiple_of(group_size) {
                let fits = |size: &usize| specs().all(|spec| spec.in_features.is_multiple_of(*size));
                let sizes: Vec<_> =
                    USUAL_GROUP_SIZES.iter().filter(|size| fits(size)).map(usize::to_string).collect();
                let help = match sizes.as_slice() {
                    [] => "use --group-size -1 (one group per output channel)".to_owned(),
                    sizes => format!("group sizes that fit every matrix of this model: {}", sizes.join(", ")),
                };
                let found = format!("{} inputs wide", spec.in_features);
                return refuse(&spec.name, found, &format!("a multiple of --group-size {group_size}"), &help);
            }
            let fits = self.format.check(module, spec.out_features, spec.in_features);
            if let Err(Misfit { found, expected }) = fits {
                let help = "choose another --format, --bits or --group-size";
                return refuse(&spec.name, found, &expected, help);
            }
        }
        Ok(())
    }

    /// `config` with the intermediate size that the quantized model is going to have: the smallest no smaller than that
    /// of the original that splits into whole groups, and into multiples of [`MARLIN_MULTIPLE`], over all ranks.
    ///
    /// # Errors
    /// When it is many times as large.
    pub(crate) fn padded(&self, config: &ModelConfig) -> Result<ModelConfig, QuantizeError> {
        let Some(ranks) = self.pad_for_tensor_parallel else { return Ok(config.clone()) };
        let plan = self.plan(config);
        let down = (0..config.layers).map(|layer| LinearRole::Down.spec(config, layer).name);
        let group_sizes = down.filter_map(|name| match plan.settings_of(&name)?.group_size {
            GroupSize::Inputs(group_size) => Some(group_size),
            GroupSize::PerChannel => None,
        });
        let mut group_sizes = group_sizes.chain([MARLIN_MULTIPLE]);
        let of_rank = group_sizes.try_fold(1, least_common_multiple);
        let old = config.intermediate_size;
        let new = of_rank
            .and_then(|of_rank| old.checked_next_multiple_of(of_rank.checked_mul(ranks.get())?))
            .filter(|new| new / LARGEST_PADDING <= old);
        match new {
            Some(intermediate_size) => Ok(ModelConfig { intermediate_size, ..config.clone() }),
            None => {
                let expected =
                    format!("fewer ranks, or smaller groups, for the model's intermediate size {old}");
                let help = "give the ranks that the model is going to be served by";
                refuse("--pad-for-tensor-parallel", ranks.to_string(), &expected, help)
            }
        }
    }

    /// `error`, with the advice to pad where that makes every linear layer of the model fit.
    fn with_padding_as_help(&self, mut error: QuantizeError, config: &ModelConfig) -> QuantizeError {
        if let (None, QuantizeError::Settings { help, .. }) = (self.pad_for_tensor_parallel, &mut error) {
            let settings = Self { pad_for_tensor_parallel: Some(NonZeroUsize::MIN), ..self.clone() };
            if let Ok(padded) = settings.padded(config)
                && settings.check_matrices(&padded).is_ok()
            {
                let size = padded.intermediate_size;
                *help += &format!(
                    "; or --pad-for-tensor-parallel 1, which pads the intermediate size to {size} with zeros"
                );
            }
        }
        error
    }

    /// The settings of every linear layer, before bits are spent on some.
    pub(crate) fn plan(&self, config: &ModelConfig) -> Plan {
        Plan::new(config, self.module_settings(), &self.overrides, self.quantize_lm_head)
    }

    /// Whether Hessians are factored.
    pub(crate) fn factors(&self) -> bool {
        self.correction || self.method.gptq().is_some()
    }

    /// Whether calibration data must be there.
    pub(crate) fn needs_calibration(&self) -> bool {
        self.factors() || self.method.scales_inputs() || self.target_bits.is_some()
    }

    /// What every linear layer is quantized by.
    fn module_settings(&self) -> ModuleSettings {
        let static_order = self.method.gptq().is_some_and(|gptq| gptq.activation_order);
        ModuleSettings {
            bits: self.bits,
            group_size: self.group_size,
            symmetric: self.symmetric,
            activation_order: if static_order { ActivationOrder::Static } else { ActivationOrder::None },
        }
    }

    /// The metadata of a checkpoint that is written by `plan`.
    ///
    /// # Errors
    /// When the format cannot express it.
    pub(crate) fn quantization_config(&self, plan: &Plan) -> Result<QuantizationConfig, CheckpointError> {
        let plan = QuantizationPlan {
            settings: plan.default(),
            exceptions: plan.exceptions().clone(),
            quantize_lm_head: plan.quantize_lm_head(),
            damp_percent: self.method.gptq().map(|_| self.damping),
            quantizer: concat!("nibble:", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        QuantizationConfig::plan(self.format, &plan)
    }
}

/// The error about the matrix or the option `name`.
fn refuse<T>(name: &str, found: String, expected: &str, help: &str) -> Result<T, QuantizeError> {
    let (name, expected, help) = (name.to_owned(), expected.to_owned(), help.to_owned());
    Err(QuantizeError::Settings { name, found, expected, help })
}

/// `None` when it is 0 or larger than any size.
fn least_common_multiple(a: usize, b: usize) -> Option<usize> {
    let (mut divisor, mut rest) = (a, b);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a.checked_div(divisor)?.checked_mul(b).filter(|&multiple| multiple > 0)
}
