//! The formula of the module: the dequantized matrix in `f64`, input for input.

use crate::ops::dense_matmul::reference::matmul;
use crate::tensor::QuantizedMatrix;

/// `output[m, n] = sum over k of input[m, k] * dequantized[n, k] + bias[n]`, all row-major.
pub fn w4a16_matmul(input: &[f32], weight: &QuantizedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    matmul(input, &weight.dequantize(), bias, weight.in_features())
}
