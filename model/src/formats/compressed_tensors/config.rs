//! What compressed-tensors and llm-compressor write as `quantization_config`.
//!
//! `config_groups` are schemes with the modules they are for: by name, by `re:EXPRESSION` from the start of the name,
//! or by class (`Linear`). A module that several name takes the scheme that names it most closely: by its name, then by
//! the alphabetically first expression, then by its class, as the package does. `ignore`, in the same terms, leaves
//! modules unquantized.
//!
//! Refused by name: whatever changes the numbers of the forward pass beyond the weights (quantized activations,
//! outputs or KV cache, rotations, sparsity), floating-point codes, one scale for a whole tensor.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config::Fields;
use crate::error::CheckpointError;
use crate::formats::module_pattern::{Closeness, LINEAR_CLASS, ModulePattern};
use crate::formats::{ActivationOrder, GroupSize, ModuleSettings, QuantizationPlan};

const FORMAT: &str = "pack-quantized";
/// The version of the package whose layout is written.
const LAYOUT_VERSION: &str = "0.20.0";

/// The quantization of a compressed-tensors checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CompressedTensorsConfig {
    groups: Vec<ConfigGroup>,
    ignore: Vec<ModulePattern>,
}

/// Modules and the scheme of their weights.
#[derive(Clone, Debug, PartialEq)]
struct ConfigGroup {
    targets: Vec<ModulePattern>,
    settings: ModuleSettings,
}

impl CompressedTensorsConfig {
    pub(in crate::formats) fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        let format: String = fields.optional("format", "a string")?.unwrap_or_else(|| FORMAT.to_owned());
        // Which formats are mixed the groups say.
        if format != FORMAT && format != "mixed-precision" {
            return Err(fields.unsupported("format", format, FORMAT));
        }
        refuse_present(fields, "kv_cache_scheme", "an unquantized KV cache")?;
        if let Some(transforms) = fields.object("transform_config")?
            && transforms.entries().next().is_some()
        {
            return Err(fields.unsupported("transform_config", "a list of rotations", "none"));
        }
        if let Some(sparsity) = fields.object("sparsity_config")?
            && let Some(format) = sparsity.optional::<String>("format", "a string")?
            && format != "dense"
        {
            return Err(sparsity.unsupported("format", format, "dense"));
        }
        let config_groups = fields.object("config_groups")?;
        let config_groups =
            config_groups.ok_or_else(|| fields.mismatch("config_groups", "missing", "an object"))?;
        let mut groups = Vec::new();
        for (name, _) in config_groups.entries() {
            let group = config_groups.object(name)?;
            let group = group.ok_or_else(|| config_groups.mismatch(name, "null", "an object"))?;
            groups.push(ConfigGroup::parse(&group)?);
        }
        Ok(Self { groups, ignore: patterns(fields, "ignore")? })
    }

    pub(in crate::formats) fn plan(plan: &QuantizationPlan) -> Self {
        let linear = ModulePattern::Name(LINEAR_CLASS.to_owned());
        let mut groups = vec![ConfigGroup { targets: vec![linear], settings: plan.settings }];
        let mut ignore = Vec::new();
        for (module, settings) in &plan.exceptions {
            let module = ModulePattern::Name(module.clone());
            match settings {
                None => ignore.push(module),
                Some(settings) => match groups.iter_mut().find(|group| group.settings == *settings) {
                    Some(group) => group.targets.push(module),
                    None => groups.push(ConfigGroup { targets: vec![module], settings: *settings }),
                },
            }
        }
        if !plan.quantize_lm_head {
            ignore.push(ModulePattern::Name("lm_head".to_owned()));
        }
        Self { groups, ignore }
    }

    /// How the linear layer `module` is quantized, if it is.
    pub fn settings_of(&self, module: &str) -> Option<ModuleSettings> {
        if self.ignore.iter().any(|pattern| pattern.find(module).is_some()) {
            return None;
        }
        // A target that two groups name belongs to the later one.
        let mut schemes: BTreeMap<(Closeness, String), ModuleSettings> = BTreeMap::new();
        for group in &self.groups {
            for target in &group.targets {
                if let Some(closeness) = target.find(module) {
                    schemes.insert((closeness, target.text()), group.settings);
                }
            }
        }
        schemes.into_values().next()
    }

    pub(in crate::formats) fn to_json(&self) -> Value {
        let groups = self.groups.iter().enumerate();
        let groups: Map<String, Value> =
            groups.map(|(number, group)| (format!("group_{number}"), group.to_json())).collect();
        json!({
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self.ignore.iter().map(ModulePattern::text).collect::<Vec<_>>(),
            "kv_cache_scheme": null,
            "version": LAYOUT_VERSION,
        })
    }
}

impl ConfigGroup {
    fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        refuse_present(fields, "input_activations", "unquantized activations")?;
        refuse_present(fields, "output_activations", "unquantized activations")?;
        match fields.optional::<String>("format", "a string")?.as_deref() {
            None | Some(FORMAT) => {}
            Some(other) => return Err(fields.unsupported("format", other, FORMAT)),
        }
        let weights = fields.object("weights")?;
        let weights = weights.ok_or_else(|| fields.mismatch("weights", "missing", "an object"))?;
        Ok(Self { targets: patterns(fields, "targets")?, settings: parse_settings(&weights)? })
    }

    fn to_json(&self) -> Value {
        let settings = self.settings;
        let (strategy, group_size) = match settings.group_size {
            GroupSize::Inputs(size) => ("group", json!(size)),
            GroupSize::PerChannel => ("channel", Value::Null),
        };
        let actorder = match settings.activation_order {
            ActivationOrder::None => Value::Null,
            ActivationOrder::Static => json!("static"),
            ActivationOrder::Grouped => json!("group"),
        };
        json!({
            "targets": self.targets.iter().map(ModulePattern::text).collect::<Vec<_>>(),
            "weights": {
                "num_bits": settings.bits, "type": "int", "symmetric": settings.symmetric,
                "strategy": strategy, "group_size": group_size, "actorder": actorder, "dynamic": false,
            },
            "input_activations": null,
            "output_activations": null,
            "format": FORMAT,
        })
    }
}

fn parse_settings(weights: &Fields) -> Result<ModuleSettings, CheckpointError> {
    let bits = weights.required("num_bits", "a number of bits")?;
    if !(2..=8).contains(&bits) {
        return Err(weights.unsupported("num_bits", bits, "2 to 8"));
    }
    if let Some(other) = weights.optional::<String>("type", "a string")?.filter(|kind| kind != "int") {
        return Err(weights.unsupported("type", other, "int"));
    }
    match weights.value("dynamic") {
        None | Some(Value::Bool(false)) => {}
        Some(other) => return Err(weights.unsupported("dynamic", other, false)),
    }
    // The package derives a strategy that is not named from the group size.
    let strategy: Option<String> = weights.optional("strategy", "a string")?;
    let group_size = match strategy.as_deref() {
        Some("channel") => GroupSize::PerChannel,
        None if weights.value("group_size").is_none() => {
            return Err(weights.unsupported("strategy", "tensor", "group, channel"));
        }
        None => GroupSize::parse(weights, "group_size")?,
        Some("group") => match GroupSize::parse(weights, "group_size")? {
            GroupSize::PerChannel => return Err(weights.mismatch("group_size", -1, "a positive integer")),
            group_size => group_size,
        },
        Some(other) => return Err(weights.unsupported("strategy", other, "group, channel")),
    };
    let activation_order = match weights.value("actorder") {
        None | Some(Value::Bool(false)) => ActivationOrder::None,
        Some(Value::Bool(true)) => ActivationOrder::Grouped,
        Some(Value::String(order)) => match order.to_lowercase().as_str() {
            "static" | "weight" => ActivationOrder::Static,
            "group" | "dynamic" => ActivationOrder::Grouped,
            other => return Err(weights.unsupported("actorder", other, "static, weight, group, dynamic")),
        },
        Some(other) => return Err(weights.mismatch("actorder", other, "a string")),
    };
    let symmetric = weights.flag("symmetric", true)?;
    Ok(ModuleSettings { bits, group_size, symmetric, activation_order })
}

fn patterns(fields: &Fields, name: &str) -> Result<Vec<ModulePattern>, CheckpointError> {
    let texts: Vec<String> = fields.optional(name, "a list of names")?.unwrap_or_default();
    texts.iter().map(|text| ModulePattern::parse(fields, name, text)).collect()
}

fn refuse_present(fields: &Fields, name: &str, supported: &str) -> Result<(), CheckpointError> {
    match fields.value(name) {
        Some(_) => Err(fields.unsupported(name, "a quantization scheme", supported)),
        None => Ok(()),
    }
}
