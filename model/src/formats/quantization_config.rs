//! How a checkpoint says it was quantized, and what it says about each linear layer.
//!
//! `quantization_config` of config.json, or quantize_config.json beside it; `quant_method` names the format.

use std::collections::BTreeMap;
use std::path::Path;

use nibble_kernels::tensor::QuantizedMatrix;
use serde::Serialize;
use serde_json::Value;

use super::layer::{LayerReader, LayerWriter};
use super::{
    AwqConfig, CompressedTensorsConfig, GptqConfig, GptqVersion, ModuleSettings, awq, compressed_tensors,
    gptq,
};
use crate::checkpoint::{Checkpoint, CheckpointWriter, LinearWeight, TensorInfo};
use crate::config::Fields;
use crate::error::CheckpointError;

/// A format of quantized checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// GPTQ, with what its `qzeros` hold.
    Gptq(GptqVersion),
    /// AWQ, version gemm.
    Awq,
    /// compressed-tensors, pack-quantized.
    CompressedTensors,
}

/// The quantization of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum QuantizationConfig {
    /// `quant_method: gptq`.
    Gptq(GptqConfig),
    /// `quant_method: awq`.
    Awq(AwqConfig),
    /// `quant_method: compressed-tensors`.
    CompressedTensors(CompressedTensorsConfig),
}

/// How a checkpoint is going to be quantized.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizationPlan {
    /// What holds for every linear layer but the exceptions.
    pub settings: ModuleSettings,
    /// Linear layers by name that have other settings, or `None`: are left unquantized.
    pub exceptions: BTreeMap<String, Option<ModuleSettings>>,
    /// Whether `lm_head` is quantized too.
    pub quantize_lm_head: bool,
    /// Fraction of the mean diagonal that is added to the Hessian.
    pub damp_percent: Option<f64>,
    /// Program and version ("nibble:0.1.0").
    pub quantizer: String,
}

/// Why a format cannot store a linear layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// What was found.
    pub found: String,
    /// What the format can store.
    pub expected: String,
}

impl Format {
    /// Checks that a linear layer `[out_features, in_features]` can be stored with these settings.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(
        self,
        settings: ModuleSettings,
        out_features: usize,
        in_features: usize,
    ) -> Result<(), Misfit> {
        let misfit = match self {
            Self::Gptq(_) => gptq::misfit(settings, out_features, in_features),
            Self::Awq => awq::misfit(settings, out_features, in_features),
            Self::CompressedTensors => compressed_tensors::misfit(settings, out_features, in_features),
        };
        misfit.map_or(Ok(()), |(found, expected)| Err(Misfit { found, expected }))
    }
}

impl QuantizationConfig {
    /// Parses the object `quantization_config` of config.json, or all of quantize_config.json.
    pub(crate) fn parse(fields: &Fields) -> Result<Self, CheckpointError> {
        // quantize_config.json of AutoGPTQ has no quant_method.
        let method: Option<String> = fields.optional("quant_method", "a string")?;
        match method.as_deref() {
            None | Some("gptq") => GptqConfig::parse(fields).map(Self::Gptq),
            Some("awq") => AwqConfig::parse(fields).map(Self::Awq),
            Some("compressed-tensors") => CompressedTensorsConfig::parse(fields).map(Self::CompressedTensors),
            Some(other) => Err(fields.unsupported("quant_method", other, "gptq, awq, compressed-tensors")),
        }
    }

    /// The metadata of a checkpoint that is written in `format` by `plan`.
    ///
    /// # Errors
    /// When the format cannot express the plan.
    pub fn plan(format: Format, plan: &QuantizationPlan) -> Result<Self, CheckpointError> {
        match format {
            Format::Gptq(version) => Ok(Self::Gptq(GptqConfig::plan(plan, version))),
            Format::CompressedTensors => Ok(Self::CompressedTensors(CompressedTensorsConfig::plan(plan))),
            Format::Awq => {
                let mut skipped = Vec::new();
                for (module, settings) in &plan.exceptions {
                    if settings.is_some() {
                        let expected = "the same settings in every module of an AWQ checkpoint";
                        let (file, field) = (Path::new("config.json"), "quantization_config");
                        return Err(CheckpointError::unsupported(file, field, module, expected));
                    }
                    skipped.push(module.clone());
                }
                if !plan.quantize_lm_head {
                    skipped.push("lm_head".to_owned());
                }
                let group_size = plan.settings.group_size;
                Ok(Self::Awq(AwqConfig { group_size, modules_to_not_convert: skipped }))
            }
        }
    }

    /// The object to write as `quantization_config`.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Gptq(config) => config.to_json(),
            Self::Awq(config) => config.to_json(),
            Self::CompressedTensors(config) => config.to_json(),
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Gptq(config) => Format::Gptq(config.version),
            Self::Awq(_) => Format::Awq,
            Self::CompressedTensors(_) => Format::CompressedTensors,
        }
    }

    /// How the linear layer `module` is quantized, if it is.
    pub fn settings_of(&self, module: &str) -> Option<ModuleSettings> {
        match self {
            Self::Gptq(config) => config.settings_of(module),
            Self::Awq(config) => config.settings_of(module),
            Self::CompressedTensors(config) => config.settings_of(module),
        }
    }

    /// The last parts of the names of a quantized layer's tensors; the first holds its codes.
    pub fn parts(&self) -> &'static [&'static str] {
        match self {
            Self::Gptq(_) => &gptq::PARTS,
            Self::Awq(_) => &awq::PARTS,
            Self::CompressedTensors(_) => &compressed_tensors::PARTS,
        }
    }

    /// The name of a tensor that only a quantized layer `module` has, if there is one.
    pub(crate) fn tensor_of(&self, checkpoint: &Checkpoint, module: &str) -> Option<String> {
        self.parts().iter().map(|part| format!("{module}.{part}")).find(|name| checkpoint.has(name))
    }

    /// `[out_features, in_features]` of the quantized layer `module`, where its tensors tell.
    pub(crate) fn shape_of(&self, checkpoint: &Checkpoint, module: &str) -> Option<[usize; 2]> {
        let tensor = |part: &str| checkpoint.raw(&format!("{module}.{part}")).ok();
        let codes: TensorInfo<'_> = tensor(self.parts()[0])?;
        match self {
            Self::Gptq(config) => gptq::shape(&codes, config.settings_of(module)?),
            Self::Awq(_) => awq::shape(&codes),
            Self::CompressedTensors(_) => compressed_tensors::shape(&tensor("weight_shape")?),
        }
    }

    /// Reads the linear layer `module`, `[out_features, in_features]`. Whether it is quantized its tensors say; what
    /// they contradict is refused.
    ///
    /// # Errors
    /// Names the tensor that is missing, malformed, there twice or not what the metadata say.
    pub(crate) fn read_linear<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        module: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<LinearWeight<'a>, CheckpointError> {
        let dense = format!("{module}.weight");
        let quantized = self.tensor_of(checkpoint, module);
        let help = "the checkpoint is incomplete or contradicts itself; fetch or write it again";
        let refuse = |name: &str, expected: String| {
            Err(CheckpointError::tensor(checkpoint.raw(name)?.file, name, "there", expected, help))
        };
        let settings = match (quantized, self.settings_of(module)) {
            (Some(name), _) if checkpoint.has(&dense) => {
                return refuse(&name, format!("it or \"{dense}\", not both"));
            }
            (Some(name), None) => {
                return refuse(&name, format!("\"{dense}\": quantization_config leaves it unquantized"));
            }
            (None, Some(settings)) if !checkpoint.has(&dense) => settings,
            (Some(_), Some(settings)) => settings,
            (None, _) => {
                return checkpoint.dense(&dense, out_features, in_features).map(LinearWeight::Dense);
            }
        };
        let layer = LayerReader { checkpoint, prefix: module, out_features, in_features, settings };
        let matrix = match self {
            Self::Gptq(config) => gptq::read(layer, config.version),
            Self::Awq(_) => awq::read(layer),
            Self::CompressedTensors(_) => compressed_tensors::read(layer),
        };
        matrix.map(LinearWeight::Quantized)
    }

    /// Writes the linear layer `module`.
    ///
    /// # Errors
    /// When the matrix is not what this metadata say of the module, the format cannot express it, or the file cannot
    /// be written.
    pub fn write_linear(
        &self,
        writer: &mut CheckpointWriter,
        module: &str,
        matrix: &QuantizedMatrix,
    ) -> Result<(), CheckpointError> {
        let layer = LayerWriter { writer, prefix: module, matrix };
        let Some(settings) = self.settings_of(module) else {
            return Err(layer.refuse("quantized", "dense, as quantization_config says"));
        };
        let (out_features, in_features) = (matrix.out_features(), matrix.in_features());
        let (bits, group_size) = (settings.bits, settings.group_size.inputs(in_features));
        if (matrix.bits(), matrix.group_size()) != (bits, group_size) {
            let found = format!("of {} bits in groups of {}", matrix.bits(), matrix.group_size());
            return Err(layer.refuse(found, format!("{bits} bits in groups of {group_size}")));
        }
        if settings.symmetric && !matrix.is_symmetric() {
            return Err(layer.refuse("asymmetric", "symmetric, as quantization_config says"));
        }
        if matrix.input_permutation().is_some() {
            return Err(layer.refuse("permuted", "inputs in their original order"));
        }
        if let Err(Misfit { found, expected }) = self.format().check(settings, out_features, in_features) {
            return Err(layer.refuse(found, expected));
        }
        match self {
            Self::Gptq(config) => gptq::write(layer, config.version),
            Self::Awq(_) => awq::write(layer),
            Self::CompressedTensors(_) => compressed_tensors::write(layer, settings.symmetric),
        }
    }
}
