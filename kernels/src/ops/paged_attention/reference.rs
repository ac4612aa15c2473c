//! The formula of the module in `f64`, over contiguous keys and values.

/// Attention of one query head over `keys` and `values` (`[tokens, head_dim]`), all of them visible.
pub fn attention(query: &[f32], keys: &[f32], values: &[f32]) -> Vec<f32> {
    let head_dim = query.len();
    let dot = |key: &[f32]| -> f64 {
        query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
            / (head_dim as f64).sqrt()
    };
    let scores: Vec<f64> = keys.chunks_exact(head_dim).map(dot).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let element = |index: usize| {
        let values = values.iter().skip(index).step_by(head_dim);
        (weights.iter().zip(values).map(|(weight, &value)| weight * f64::from(value)).sum::<f64>() / total)
            as f32
    };
    (0..head_dim).map(element).collect()
}
