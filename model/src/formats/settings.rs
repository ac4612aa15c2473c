//! How one linear layer is quantized, in the terms all formats share.

use serde::{Serialize, Serializer};
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

impl Serialize for GroupSize {
    /// As files write it: a number of inputs, or -1.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Inputs(inputs) => serializer.serialize_u64(*inputs as u64),
            Self::PerChannel => serializer.serialize_i64(-1),
        }
    }
}

/// In which order the inputs of a linear layer were quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationOrder {
    /// As they come.
    None,
    /// By activation, in groups of consecutive inputs that were fixed before: readers need not know.
    Static,
    /// By activation, and groups were made in that order: an index tensor says which group an input belongs to.
    Grouped,
}

/// How one linear layer is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleSettings {
    /// Bits of a code.
    pub bits: u32,
    /// Inputs that share a scale.
    pub group_size: GroupSize,
    /// Whether every zero point is the middle of the range.
    pub symmetric: bool,
    /// The order of quantization.
    pub activation_order: ActivationOrder,
}

impl GroupSize {
    /// The number of inputs in a group of a matrix with `in_features` inputs.
    pub fn inputs(self, in_features: usize) -> usize {
        match self {
            Self::Inputs(size) => size,
            Self::PerChannel => in_features,
        }
    }

    /// The field `name`: -1 or a positive integer.
    pub(super) fn parse(fields: &Fields, name: &str) -> Result<Self, CheckpointError> {
        const EXPECTED: &str = "-1 or a positive integer";
        match fields.required::<i64>(name, EXPECTED)? {
            -1 => Ok(Self::PerChannel),
            size => match usize::try_from(size) {
                Ok(size @ 1..) => Ok(Self::Inputs(size)),
                _ => Err(fields.mismatch(name, size, EXPECTED)),
            },
        }
    }

    pub(super) fn to_json(self) -> Value {
        match self {
            Self::Inputs(size) => json!(size),
            Self::PerChannel => json!(-1),
        }
    }
}
