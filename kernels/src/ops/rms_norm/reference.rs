//! Equation 4 of the paper, in `f64`.

/// Normalizes one row: `residual[h] / sqrt(mean(residual^2) + epsilon) * weight[h]`.
pub fn rms_norm(residual: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let square_sum: f64 = residual.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    let mean = square_sum / residual.len() as f64;
    let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
    residual
        .iter()
        .zip(weight)
        .map(|(&value, &weight)| (f64::from(value) * factor * f64::from(weight)) as f32)
        .collect()
}
