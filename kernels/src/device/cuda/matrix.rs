//! Weight matrices in the memory of a CUDA device.

use std::sync::Arc;

use bytemuck::cast_slice;

use super::driver::{Address, Driver};
use super::element::Element;
use super::memory::Memory;
use crate::backend::MatrixShape;
use crate::error::KernelError;
use crate::ops::w4a16_matmul::layout::PackedParts;
use crate::tensor::{DenseMatrix, DenseValues, FloatType};

/// A dense weight matrix: elements row-major `[out_features, in_features]`.
#[derive(Debug)]
pub struct CudaDenseMatrix {
    elements: Memory,
    out_features: usize,
    in_features: usize,
}

impl CudaDenseMatrix {
    /// Copies `matrix` to the device, rounded to `element` where it is of another type.
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        element: Element,
        name: &str,
        matrix: &DenseMatrix<'_>,
    ) -> Result<Self, KernelError> {
        let (out_features, in_features) = (matrix.out_features(), matrix.in_features());
        let elements = Memory::new(driver, matrix.values().len() * element.bytes())?;
        let to = elements.address();
        match (matrix.values(), element) {
            (DenseValues::F16(values), Element::F16) => driver.write(cast_slice(values), to)?,
            (DenseValues::BF16(values), Element::BF16) => driver.write(cast_slice(values), to)?,
            (DenseValues::F32(values), _) => {
                fits(element, name, values)?;
                element.write(&**driver, values, to)?;
            }
            (DenseValues::F16(_) | DenseValues::BF16(_), _) => {
                let values = matrix.to_f32();
                fits(element, name, &values)?;
                element.write(&**driver, &values, to)?;
            }
        }
        Ok(Self { elements, out_features, in_features })
    }

    /// A second matrix with the same values.
    pub(super) fn copy(&self) -> Result<Self, KernelError> {
        let elements = self.elements.copy()?;
        Ok(Self { elements, out_features: self.out_features, in_features: self.in_features })
    }

    /// Where the first element lies.
    pub fn address(&self) -> Address {
        self.elements.address()
    }
}

/// Refuses finite weights that would become infinite in `element`.
fn fits(element: Element, name: &str, values: &[f32]) -> Result<(), KernelError> {
    let limit = f32::from(half::f16::MAX);
    let overflow = values.iter().find(|value| value.is_finite() && value.abs() > limit);
    match (element.float_type(), overflow) {
        (FloatType::F16, Some(value)) => Err(KernelError::Value {
            operation: "dense matrix",
            argument: "weights",
            found: format!("{value} in {name}"),
            requirement: "must be at most 65504 in F16; take BF16",
        }),
        _ => Ok(()),
    }
}

impl MatrixShape for CudaDenseMatrix {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn bytes(&self) -> usize {
        self.elements.bytes()
    }
}

/// A quantized weight matrix, its parts laid out as [`crate::ops::w4a16_matmul`] reads them.
#[derive(Debug)]
pub struct CudaPackedMatrix {
    pub(crate) codes: Memory,
    pub(crate) scales: Memory,
    pub(crate) zero_points: Memory,
    /// The input of each stored position, where the groups are not made of consecutive inputs.
    pub(crate) permutation: Option<Memory>,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    pub(crate) group_size: usize,
}

impl CudaPackedMatrix {
    /// Copies `parts` to the device.
    pub(super) fn new(driver: &Arc<dyn Driver>, parts: &PackedParts) -> Result<Self, KernelError> {
        let permutation = parts.permutation.as_deref();
        Ok(Self {
            codes: Memory::with(driver, &parts.words)?,
            scales: Memory::with(driver, &parts.scales)?,
            zero_points: Memory::with(driver, &parts.zero_points)?,
            permutation: permutation.map(|words| Memory::with(driver, words)).transpose()?,
            out_features: parts.out_features,
            in_features: parts.in_features,
            group_size: parts.group_size,
        })
    }

    /// A second matrix with the same values.
    pub(super) fn copy(&self) -> Result<Self, KernelError> {
        Ok(Self {
            codes: self.codes.copy()?,
            scales: self.scales.copy()?,
            zero_points: self.zero_points.copy()?,
            permutation: self.permutation.as_ref().map(Memory::copy).transpose()?,
            out_features: self.out_features,
            in_features: self.in_features,
            group_size: self.group_size,
        })
    }
}

impl MatrixShape for CudaPackedMatrix {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn bytes(&self) -> usize {
        let permutation = self.permutation.as_ref().map_or(0, Memory::bytes);
        self.codes.bytes() + self.scales.bytes() + self.zero_points.bytes() + permutation
    }
}
