//! Which linear layer is quantized how.

use std::collections::BTreeMap;

use nibble_model::config::ModelConfig;
use nibble_model::formats::{GroupSize, ModuleExpression, ModuleSettings};
use nibble_model::forward::{LinearRole, LinearSpec};
use serde::Serialize;

use crate::report::UnitSensitivity;

/// Other settings for the linear layers whose names begin as an expression says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Override {
    /// The linear layers.
    pub modules: ModuleExpression,
    /// What is different.
    pub change: Change,
}

/// What is different about a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It is not quantized.
    Keep,
    /// It has other bits or another group size.
    Quantize {
        /// Bits of a code, where they differ.
        bits: Option<u32>,
        /// Inputs that share a scale, where they differ.
        group_size: Option<GroupSize>,
    },
}

/// The settings of every linear layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    quantize_lm_head: bool,
    default: ModuleSettings,
    exceptions: BTreeMap<String, Option<ModuleSettings>>,
}

impl Plan {
    /// `default`, and what `overrides` say otherwise; the first that matches a linear layer decides.
    pub(crate) fn new(
        config: &ModelConfig,
        default: ModuleSettings,
        overrides: &[Override],
        quantize_lm_head: bool,
    ) -> Self {
        let mut exceptions = BTreeMap::new();
        for spec in specs(config, quantize_lm_head) {
            if let Some(found) = overrides.iter().find(|item| item.modules.matches(&spec.name)) {
                let settings = match found.change {
                    Change::Keep => None,
                    Change::Quantize { bits, group_size } => Some(ModuleSettings {
                        bits: bits.unwrap_or(default.bits),
                        group_size: group_size.unwrap_or(default.group_size),
                        ..default
                    }),
                };
                exceptions.insert(spec.name, settings);
            }
        }
        Self { quantize_lm_head, default, exceptions }
    }

    /// Gives the linear layers that `sensitivities` spend bits on those bits.
    pub(crate) fn spend(&mut self, sensitivities: &[UnitSensitivity]) {
        for unit in sensitivities.iter().filter(|unit| unit.raised) {
            let group_size = GroupSize::Inputs(unit.group_size);
            let settings = ModuleSettings { bits: unit.bits, group_size, ..self.default };
            for name in &unit.linear_layers {
                self.exceptions.insert(name.clone(), Some(settings));
            }
        }
    }

    /// Whether the output head is one of the linear layers.
    pub(crate) fn quantize_lm_head(&self) -> bool {
        self.quantize_lm_head
    }

    /// How the linear layer `name`, one of [`specs`], is quantized, if it is.
    pub(crate) fn settings_of(&self, name: &str) -> Option<ModuleSettings> {
        self.exceptions.get(name).copied().unwrap_or(Some(self.default))
    }

    /// Whether an override is about the linear layer `name`; known until bits are spent.
    pub(crate) fn is_fixed(&self, name: &str) -> bool {
        self.exceptions.contains_key(name)
    }

    /// Bits stored for each weight that is quantized, scales and zero points included.
    pub(crate) fn bits_per_weight(&self, config: &ModelConfig) -> f64 {
        let (mut bits, mut weights) = (0.0, 0.0);
        for spec in specs(config, self.quantize_lm_head) {
            if let Some(settings) = self.settings_of(&spec.name) {
                let of_matrix = (spec.out_features * spec.in_features) as f64;
                bits += of_matrix * stored_bits(settings.bits, settings.group_size, spec.in_features);
                weights += of_matrix;
            }
        }
        bits / f64::max(weights, 1.0)
    }

    /// What holds for linear layers that are no exception.
    pub(crate) fn default(&self) -> ModuleSettings {
        self.default
    }

    /// Linear layers by name that have other settings, or `None`: are left unquantized.
    pub(crate) fn exceptions(&self) -> &BTreeMap<String, Option<ModuleSettings>> {
        &self.exceptions
    }
}

/// The linear layers of all decoder layers, in the order of the model, and behind them the output head where it is to be
/// quantized.
pub(crate) fn specs(config: &ModelConfig, quantize_lm_head: bool) -> impl Iterator<Item = LinearSpec> {
    let layers = (0..config.layers).flat_map(|layer| LinearRole::ALL.map(|role| role.spec(config, layer)));
    layers.chain(quantize_lm_head.then(|| LinearSpec::output_head(config)))
}

/// Bits stored for each weight of a matrix with `inputs` inputs, scales and zero points included.
pub(crate) fn stored_bits(bits: u32, group_size: GroupSize, inputs: usize) -> f64 {
    nibble_kernels::tensor::stored_bits(bits, inputs.div_ceil(group_size.inputs(inputs).max(1)), inputs)
}
