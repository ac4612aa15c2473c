//! The formula of the module, in `f64`.

/// `output[m, n] = sum over k of input[m, k] * weight[n, k] + bias[n]`, all row-major.
pub fn matmul(input: &[f32], weight: &[f32], bias: Option<&[f32]>, in_features: usize) -> Vec<f32> {
    let mut output = Vec::new();
    for row in input.chunks_exact(in_features) {
        for (n, weights) in weight.chunks_exact(in_features).enumerate() {
            let products = row.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w));
            output.push((products.sum::<f64>() + bias.map_or(0.0, |bias| f64::from(bias[n]))) as f32);
        }
    }
    output
}
