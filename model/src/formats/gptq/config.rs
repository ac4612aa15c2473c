//! What GPTQModel, AutoGPTQ and transformers write as `quantization_config` of a GPTQ checkpoint.
//!
//! `dynamic` holds rules for single modules by regular expression; the first that matches a module decides:
//! `-:EXPRESSION` leaves it unquantized, `+:EXPRESSION` or `EXPRESSION` gives it other settings.
//!
//! Older readers know the projections of a layer only under the names of their fused forms (`qkv_proj`,
//! `gate_up_proj`), newer ones under their own. Where all parts of a fused form have the same settings, one written
//! rule matches either name.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::config::Fields;
use crate::error::CheckpointError;
use crate::formats::module_pattern::Expression;
use crate::formats::{ActivationOrder, GroupSize, ModuleSettings, QuantizationPlan};

/// Projections that readers fuse, and the name of the fused form.
const FUSED: [(&[&str], &str); 2] =
    [(&["q_proj", "k_proj", "v_proj"], "qkv_proj"), (&["gate_proj", "up_proj"], "gate_up_proj")];

/// What `qzeros` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GptqVersion {
    /// `checkpoint_format: gptq`: the zero point minus one, modulo `2^bits`.
    V1,
    /// `checkpoint_format: gptq_v2`: the zero point itself.
    V2,
}

/// The quantization of a GPTQ checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct GptqConfig {
    /// What holds for a module that no rule names.
    pub settings: ModuleSettings,
    /// What `qzeros` holds, by the metadata.
    pub version: GptqVersion,
    /// Whether `lm_head` is quantized too.
    pub quantize_lm_head: bool,
    /// Fraction of the mean diagonal that was added to the Hessian, if the writer said so.
    pub damp_percent: Option<f64>,
    /// Program and version that wrote the checkpoint ("nibble:0.1.0"), if it said so.
    pub quantizer: Option<String>,
    rules: Vec<Rule>,
}

/// An entry of `dynamic`.
#[derive(Clone, Debug, PartialEq)]
struct Rule {
    modules: Expression,
    /// `None` leaves the modules unquantized.
    settings: Option<ModuleSettings>,
}

impl GptqVersion {
    /// The value of `checkpoint_format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq_v2",
        }
    }
}

impl GptqConfig {
    pub(in crate::formats) fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        // GPTQModel once called the field `format`.
        let name = if fields.value("checkpoint_format").is_some() { "checkpoint_format" } else { "format" };
        let version = match fields.optional::<String>(name, "a string")?.as_deref() {
            None | Some("gptq") => GptqVersion::V1,
            Some("gptq_v2") => GptqVersion::V2,
            Some(other) => return Err(fields.unsupported(name, other, "gptq, gptq_v2")),
        };
        match fields.optional::<String>("pack_dtype", "a string")?.as_deref() {
            None | Some("int32") => {}
            Some(other) => return Err(fields.unsupported("pack_dtype", other, "int32")),
        }
        let settings = parse_settings(fields, None)?;
        let quantizer = match fields.object("meta")? {
            Some(meta) => match meta.value("quantizer") {
                Some(Value::Array(names)) => names.first().and_then(Value::as_str).map(str::to_owned),
                Some(name) => name.as_str().map(str::to_owned),
                None => None,
            },
            None => None,
        };
        Ok(Self {
            settings,
            version,
            quantize_lm_head: fields.flag("lm_head", false)?,
            damp_percent: fields.optional("damp_percent", "a number")?,
            quantizer,
            rules: match fields.object("dynamic")? {
                Some(dynamic) => parse_rules(&dynamic, settings)?,
                None => Vec::new(),
            },
        })
    }

    pub(in crate::formats) fn plan(plan: &QuantizationPlan, version: GptqVersion) -> Self {
        Self {
            settings: plan.settings,
            version,
            quantize_lm_head: plan.quantize_lm_head,
            damp_percent: plan.damp_percent,
            quantizer: Some(plan.quantizer.clone()),
            rules: rules(&plan.exceptions),
        }
    }

    /// How the linear layer `module` is quantized, if it is.
    pub fn settings_of(&self, module: &str) -> Option<ModuleSettings> {
        match self.rules.iter().find(|rule| rule.modules.matches(module)) {
            Some(rule) => rule.settings,
            None if module == "lm_head" && !self.quantize_lm_head => None,
            None => Some(self.settings),
        }
    }

    pub(in crate::formats) fn to_json(&self) -> Value {
        let mut object = json!({ "quant_method": "gptq" });
        write_settings(&mut object, self.settings);
        object["lm_head"] = json!(self.quantize_lm_head);
        object["checkpoint_format"] = json!(self.version.name());
        object["pack_dtype"] = json!("int32");
        if let Some(damp_percent) = self.damp_percent {
            object["damp_percent"] = json!(damp_percent);
        }
        if !self.rules.is_empty() {
            let dynamic: Map<String, Value> = self.rules.iter().map(Rule::to_json).collect();
            object["dynamic"] = Value::Object(dynamic);
        }
        if let Some(quantizer) = &self.quantizer {
            object["meta"] = json!({ "quantizer": [quantizer] });
        }
        object
    }
}

impl Rule {
    fn to_json(&self) -> (String, Value) {
        let source = self.modules.source();
        match self.settings {
            None => (format!("-:{source}"), json!({})),
            Some(settings) => {
                let mut object = json!({});
                write_settings(&mut object, settings);
                (format!("+:{source}"), object)
            }
        }
    }
}

fn write_settings(object: &mut Value, settings: ModuleSettings) {
    object["bits"] = json!(settings.bits);
    object["group_size"] = settings.group_size.to_json();
    object["desc_act"] = json!(settings.activation_order == ActivationOrder::Grouped);
    object["static_groups"] = json!(settings.activation_order == ActivationOrder::Static);
    object["sym"] = json!(settings.symmetric);
}

/// Bits, group size and so on of `fields`; what is absent is as in `default`.
fn parse_settings(
    fields: &Fields,
    default: Option<ModuleSettings>,
) -> Result<ModuleSettings, CheckpointError> {
    let bits = match (fields.optional("bits", "a number of bits")?, default) {
        (None, Some(default)) => default.bits,
        (None, None) => fields.required("bits", "a number of bits")?,
        (Some(bits), _) => bits,
    };
    if !matches!(bits, 2 | 3 | 4 | 8) {
        return Err(fields.unsupported("bits", bits, "2, 3, 4, 8"));
    }
    let group_size = match (fields.value("group_size"), default) {
        (None, Some(default)) => default.group_size,
        _ => GroupSize::parse(fields, "group_size")?,
    };
    let default_order = default.map_or(ActivationOrder::None, |default| default.activation_order);
    let activation_order = if fields.flag("desc_act", default_order == ActivationOrder::Grouped)? {
        ActivationOrder::Grouped
    } else if fields.flag("static_groups", default_order == ActivationOrder::Static)? {
        ActivationOrder::Static
    } else {
        ActivationOrder::None
    };
    let symmetric = fields.flag("sym", default.is_none_or(|default| default.symmetric))?;
    Ok(ModuleSettings { bits, group_size, symmetric, activation_order })
}

fn parse_rules(dynamic: &Fields, default: ModuleSettings) -> Result<Vec<Rule>, CheckpointError> {
    let mut rules = Vec::new();
    for (name, _) in dynamic.entries() {
        let (quantized, source) = match (name.strip_prefix("-:"), name.strip_prefix("+:")) {
            (Some(source), _) => (false, source),
            (None, Some(source)) => (true, source),
            (None, None) => (true, name.as_str()),
        };
        let settings = match (quantized, dynamic.object(name)?) {
            (false, _) => None,
            (true, Some(overrides)) => Some(parse_settings(&overrides, Some(default))?),
            (true, None) => Some(default),
        };
        rules.push(Rule { modules: Expression::parse(dynamic, name, source)?, settings });
    }
    Ok(rules)
}

/// One rule for each module that differs, or for the projections that readers fuse.
fn rules(exceptions: &BTreeMap<String, Option<ModuleSettings>>) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    for (module, &settings) in exceptions {
        if rules.iter().any(|rule| rule.modules.matches(module)) {
            continue;
        }
        let (parent, own) =
            module.rsplit_once('.').map_or(("", module.as_str()), |(parent, own)| (parent, own));
        let dot = if parent.is_empty() { "" } else { r"\." };
        let alike = |part: &&str| exceptions.get(&format!("{parent}.{part}")) == Some(&settings);
        let fused = FUSED.iter().find(|(parts, _)| parts.contains(&own) && parts.iter().all(alike));
        let names = match fused {
            Some((parts, fused)) => format!("(?:{}|{fused})", parts.join("|")),
            None => escape(own),
        };
        let source = format!("{}{dot}{names}$", escape(parent));
        let modules = Expression::new(&source).expect("an escaped name is a valid expression");
        rules.push(Rule { modules, settings });
    }
    rules
}

/// The expression that only `name` matches, in Python and here.
fn escape(name: &str) -> String {
    fancy_regex::escape(name).into_owned()
}
