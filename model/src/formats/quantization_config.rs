//! How a checkpoint says it was quantized: `quantization_config` of config.json, and quantize_config.json.
//!
//! Read: `quant_method: gptq` as GPTQModel, AutoGPTQ and transformers write it, 2, 3, 4 and 8 bits.
//! Refused by name: other methods, `dynamic` overrides of single modules, packing in anything but int32.

use serde_json::{Value, json};

use crate::config::Fields;
use crate::error::CheckpointError;

/// How many consecutive inputs share a scale and a zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupSize {
    /// This many, at least one.
    Inputs(usize),
    /// All inputs of an output channel; `-1` in files.
    PerChannel,
}

impl GroupSize {
    /// The number of inputs in a group of a matrix with `in_features` inputs.
    pub fn inputs(self, in_features: usize) -> usize {
        match self {
            Self::Inputs(size) => size,
            Self::PerChannel => in_features,
        }
    }
}

/// What `qzeros` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptqVersion {
    /// `checkpoint_format: gptq`: the zero point minus one, modulo `2^bits`.
    V1,
    /// `checkpoint_format: gptq_v2`: the zero point itself.
    V2,
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

/// The quantization of a GPTQ checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizationConfig {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Inputs that share a scale.
    pub group_size: GroupSize,
    /// Whether columns were quantized in order of activation, so that `g_idx` may not be monotonic.
    pub desc_act: bool,
    /// Whether every zero point is the middle of the range.
    pub symmetric: bool,
    /// What `qzeros` holds, by the metadata.
    pub version: GptqVersion,
    /// Whether `lm_head` is quantized too.
    pub quantize_lm_head: bool,
    /// Fraction of the mean diagonal that was added to the Hessian, if the writer said so.
    pub damp_percent: Option<f64>,
    /// Program and version that wrote the checkpoint ("nibble:0.1.0"), if it said so.
    pub quantizer: Option<String>,
}

impl QuantizationConfig {
    /// Parses the object `quantization_config` of config.json, or all of quantize_config.json.
    pub(crate) fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        // quantize_config.json of AutoGPTQ has no quant_method.
        let method: String =
            fields.optional("quant_method", "a string")?.unwrap_or_else(|| "gptq".to_owned());
        if method != "gptq" {
            return Err(fields.unsupported("quant_method", method, "gptq"));
        }
        let bits = fields.required("bits", "a number of bits")?;
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(fields.unsupported("bits", bits, "2, 3, 4, 8"));
        }
        let group_size = match fields.required::<i64>("group_size", "-1 or a positive integer")? {
            -1 => GroupSize::PerChannel,
            size => match usize::try_from(size) {
                Ok(size @ 1..) => GroupSize::Inputs(size),
                _ => return Err(fields.mismatch("group_size", size, "-1 or a positive integer")),
            },
        };
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
        if let Some(dynamic) = fields.object("dynamic")? {
            // A rule "-:regex" leaves modules unquantized, which their tensors show; others change settings.
            if let Some((rule, _)) = dynamic.entries().find(|(rule, _)| !rule.starts_with("-:")) {
                return Err(fields.unsupported("dynamic", rule, "the same settings for every module"));
            }
        }
        let quantizer = match fields.object("meta")? {
            Some(meta) => match meta.value("quantizer") {
                Some(Value::Array(names)) => names.first().and_then(Value::as_str).map(str::to_owned),
                Some(name) => name.as_str().map(str::to_owned),
                None => None,
            },
            None => None,
        };
        Ok(Self {
            bits,
            group_size,
            desc_act: fields.flag("desc_act", false)?,
            symmetric: fields.flag("sym", true)?,
            version,
            quantize_lm_head: fields.flag("lm_head", false)?,
            damp_percent: fields.optional("damp_percent", "a number")?,
            quantizer,
        })
    }

    /// The object to write as `quantization_config` and as quantize_config.json.
    pub fn to_json(&self) -> Value {
        let group_size = match self.group_size {
            GroupSize::Inputs(size) => json!(size),
            GroupSize::PerChannel => json!(-1),
        };
        let mut object = json!({
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
            "lm_head": self.quantize_lm_head,
            "checkpoint_format": self.version.name(),
            "pack_dtype": "int32",
        });
        if let Some(damp_percent) = self.damp_percent {
            object["damp_percent"] = json!(damp_percent);
        }
        if let Some(quantizer) = &self.quantizer {
            object["meta"] = json!({ "quantizer": [quantizer] });
        }
        object
    }
}
