//! What AutoAWQ and transformers write as `quantization_config` of an AWQ checkpoint.
//!
//! A module is left unquantized when its name contains an entry of `modules_to_not_convert`. All others have the
//! same settings.

use serde_json::{Value, json};

use super::BITS;
use crate::config::Fields;
use crate::error::CheckpointError;
use crate::formats::{ActivationOrder, GroupSize, ModuleSettings};

/// The quantization of an AWQ checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct AwqConfig {
    /// Inputs that share a scale.
    pub group_size: GroupSize,
    /// Parts of the names of modules that are not quantized.
    pub modules_to_not_convert: Vec<String>,
}

impl AwqConfig {
    pub(in crate::formats) fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        // AutoAWQ's own quant_config.json and config.json differ in the names.
        let name = |usual, other| if fields.value(usual).is_some() { usual } else { other };
        let bits_name = name("bits", "w_bit");
        let bits: u32 = fields.required(bits_name, "a number of bits")?;
        if bits != BITS {
            return Err(fields.unsupported(bits_name, bits, BITS));
        }
        // GEMM in files of AutoAWQ's first versions.
        let version = fields.optional::<String>("version", "a string")?;
        match version.map(|version| version.to_lowercase()).as_deref() {
            None | Some("gemm") => {}
            Some(other) => return Err(fields.unsupported("version", other, "gemm")),
        }
        if !fields.flag("zero_point", true)? {
            return Err(fields.unsupported("zero_point", false, "true, which version gemm needs"));
        }
        Ok(Self {
            group_size: GroupSize::parse(fields, name("group_size", "q_group_size"))?,
            modules_to_not_convert: fields
                .optional("modules_to_not_convert", "a list of names")?
                .unwrap_or_default(),
        })
    }

    /// How the linear layer `module` is quantized, if it is.
    pub fn settings_of(&self, module: &str) -> Option<ModuleSettings> {
        let skipped = self.modules_to_not_convert.iter().any(|part| module.contains(part.as_str()));
        (!skipped).then_some(ModuleSettings {
            bits: BITS,
            group_size: self.group_size,
            symmetric: false,
            activation_order: ActivationOrder::None,
        })
    }

    pub(in crate::formats) fn to_json(&self) -> Value {
        json!({
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.group_size.to_json(),
            "zero_point": true,
            "version": "gemm",
            "modules_to_not_convert": self.modules_to_not_convert,
        })
    }
}
