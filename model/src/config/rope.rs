//! Rotary position embedding: base frequency and how it is stretched for long contexts.
//!
//! Two generations of config.json: `rope_theta` beside `rope_scaling {rope_type | type, factor, ...}`,
//! and since transformers 5 one object `rope_parameters {rope_theta, rope_type, factor, ...}`.
//! Scaled frequencies follow `_compute_*_parameters` of transformers' `modeling_rope_utils`.
//! Refused by name: dynamic, yarn, longrope, parameters per layer type, partial rotation.

use super::fields::Fields;
use crate::error::CheckpointError;

/// The rotary embedding of a model: pair `i` of a head turns by `position * theta^(-2i / head_dim)`,
/// with that frequency changed by `scaling`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParameters {
    /// The base of the frequencies.
    pub theta: f32,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f32,
        /// Wavelengths above `original_max_position_embeddings / low_frequency_factor` are stretched.
        low_frequency_factor: f32,
        /// Wavelengths below `original_max_position_embeddings / high_frequency_factor` are kept.
        high_frequency_factor: f32,
        /// Context length of the unscaled model, in tokens.
        original_max_position_embeddings: usize,
    },
}

const DEFAULT_THETA: f32 = 10_000.0;

/// Reads the rotary embedding from either generation of config.json.
pub(super) fn parse(config: &Fields) -> Result<RopeParameters, CheckpointError> {
    require_whole_rotation(config)?;
    let top_level_theta = config.positive("rope_theta", DEFAULT_THETA)?;
    if let Some(parameters) = config.object("rope_parameters")? {
        require_whole_rotation(&parameters)?;
        if let Some((layer_type, _)) = parameters.entries().find(|(_, value)| value.is_object()) {
            return Err(parameters.unsupported(layer_type, "{...}", "one set of parameters for all layers"));
        }
        let theta = parameters.positive("rope_theta", top_level_theta)?;
        return Ok(RopeParameters { theta, scaling: parse_scaling(&parameters, config)? });
    }
    let scaling = match config.object("rope_scaling")? {
        Some(scaling) => parse_scaling(&scaling, config)?,
        None => RopeScaling::None,
    };
    Ok(RopeParameters { theta: top_level_theta, scaling })
}

fn parse_scaling(scaling: &Fields, config: &Fields) -> Result<RopeScaling, CheckpointError> {
    // `type` is the older spelling; files that carry both agree.
    let name = if scaling.value("rope_type").is_some() { "rope_type" } else { "type" };
    let kind: Option<String> = scaling.optional(name, "a string")?;
    match kind.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: scaling.required_positive("factor")? }),
        Some("llama3") => {
            const ORIGINAL: &str = "original_max_position_embeddings";
            let (low, high) = (
                scaling.required_positive("low_freq_factor")?,
                scaling.required_positive("high_freq_factor")?,
            );
            if high <= low {
                return Err(scaling.mismatch(
                    "high_freq_factor",
                    high,
                    format!("above low_freq_factor {low}"),
                ));
            }
            Ok(RopeScaling::Llama3 {
                factor: scaling.required_positive("factor")?,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_max_position_embeddings: match scaling.value(ORIGINAL) {
                    Some(_) => scaling.size(ORIGINAL)?,
                    None => config.size(ORIGINAL)?,
                },
            })
        }
        Some(other) => Err(scaling.unsupported(name, other, "default, linear, llama3")),
    }
}

fn require_whole_rotation(fields: &Fields) -> Result<(), CheckpointError> {
    let factor = fields.positive("partial_rotary_factor", 1.0)?;
    if factor == 1.0 { Ok(()) } else { Err(fields.unsupported("partial_rotary_factor", factor, "1.0")) }
}
