//! How a model is to be quantized, and whether that fits the model.

use nibble_model::config::ModelConfig;
use nibble_model::error::CheckpointError;
use nibble_model::formats::{
    ActivationOrder, Format, GroupSize, Misfit, ModuleSettings, QuantizationConfig, QuantizationPlan,
};
use serde::Serialize;

use crate::error::QuantizeError;
use crate::plan::{Override, Plan, specs};

/// Group sizes to suggest where the one asked for does not fit.
const USUAL_GROUP_SIZES: [usize; 4] = [128, 64, 32, 16];

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
        let refuse = |name: &str, found: String, expected: &str, help: &str| {
            let (name, expected, help) = (name.to_owned(), expected.to_owned(), help.to_owned());
            Err(QuantizeError::Settings { name, found, expected, help })
        };
        if !matches!(self.bits, 3 | 4 | 8) {
            return refuse("--bits", self.bits.to_string(), "3, 4 or 8", "4 is usual");
        }
        let damping = self.damping;
        if self.factors() && !(damping > 0.0 && damping.is_finite()) {
            return refuse("--damp", damping.to_string(), "a positive number", "0.01 is usual");
        }
        if config.quantization.is_some() {
            let help = "quantize the original checkpoint";
            return refuse("the model", "quantized already".to_owned(), "an unquantized checkpoint", help);
        }
        if let Some(unmatched) = Plan::unmatched(config, &self.overrides) {
            let found =
                format!("\"{}\", which no linear layer's name begins with", unmatched.modules.source());
            return refuse(
                "--override",
                found,
                "a name such as model.layers.0.mlp.down_proj",
                "see nibble inspect",
            );
        }
        let plan = self.plan(config);
        for spec in specs(config) {
            let Some(module) = plan.settings_of(&spec.name) else { continue };
            if !matches!(module.bits, 3 | 4 | 8) {
                return refuse(&spec.name, format!("of {} bits", module.bits), "3, 4 or 8", "4 is usual");
            }
            let group_size = module.group_size.inputs(spec.in_features);
            if group_size == 0 || !spec.in_features.is_multiple_of(group_size) {
                let fits = |size: &usize| specs(config).all(|spec| spec.in_features.is_multiple_of(*size));
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
        if let Some(target) = self.target_bits {
            if self.format == Format::Awq {
                let help = "choose --format gptq or compressed-tensors";
                return refuse("--target-bits", target.to_string(), "a format that mixes group sizes", help);
            }
            let least = plan.bits_per_weight(config);
            if !(target >= least && target <= 8.0) {
                let expected = format!("from {least:.3}, what these settings take, to 8");
                let help = "give more bits, or settings that take fewer";
                return refuse("--target-bits", target.to_string(), &expected, help);
            }
        }
        Ok(())
    }

    /// The settings of every linear layer, before bits are spent on some.
    pub(crate) fn plan(&self, config: &ModelConfig) -> Plan {
        Plan::new(config, self.module_settings(), &self.overrides)
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
            quantize_lm_head: false,
            damp_percent: self.method.gptq().map(|_| self.damping),
            quantizer: concat!("nibble:", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        QuantizationConfig::plan(self.format, &plan)
    }
}
