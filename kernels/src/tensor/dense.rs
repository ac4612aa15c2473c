//! A dense weight matrix on the host, in the element type it was stored in.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::error::KernelError;

/// The floating-point element types a checkpoint may store weights in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        })
    }
}

/// The elements of a [`DenseMatrix`]: borrowed from a mapped file or owned.
#[derive(Clone, Debug, PartialEq)]
pub enum DenseValues<'a> {
    /// Binary32 elements.
    F32(Cow<'a, [f32]>),
    /// Binary16 elements.
    F16(Cow<'a, [f16]>),
    /// bfloat16 elements.
    BF16(Cow<'a, [bf16]>),
}

impl DenseValues<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn float_type(&self) -> FloatType {
        match self {
            Self::F32(_) => FloatType::F32,
            Self::F16(_) => FloatType::F16,
            Self::BF16(_) => FloatType::BF16,
        }
    }

    /// Element `index`, widened to binary32 (exact for all three types).
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(values) => values[index],
            Self::F16(values) => values[index].to_f32(),
            Self::BF16(values) => values[index].to_f32(),
        }
    }

    /// All elements, widened to binary32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::F16(values) => {
                use half::slice::HalfFloatSliceExt;
                values.to_f32_vec()
            }
            Self::BF16(values) => {
                use half::slice::HalfFloatSliceExt;
                values.to_f32_vec()
            }
        }
    }
}

/// A weight matrix `[out_features, in_features]`, row-major: row `n` holds the weights of output `n`.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseMatrix<'a> {
    out_features: usize,
    in_features: usize,
    values: DenseValues<'a>,
}

impl<'a> DenseMatrix<'a> {
    /// Wraps `values`, row-major `[out_features, in_features]`.
    ///
    /// # Errors
    /// When the number of values is not `out_features * in_features`.
    pub fn new(
        out_features: usize,
        in_features: usize,
        values: DenseValues<'a>,
    ) -> Result<Self, KernelError> {
        KernelError::check("dense matrix", "values", values.len(), out_features * in_features)?;
        Ok(Self { out_features, in_features, values })
    }

    /// Rows: the number of outputs.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns: the number of inputs.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The elements, row-major.
    pub fn values(&self) -> &DenseValues<'a> {
        &self.values
    }

    /// The elements widened to binary32, row-major `[out_features, in_features]`.
    pub fn to_f32(&self) -> Vec<f32> {
        self.values.to_f32()
    }
}
