//! Perplexity of a model on a text, and how far it lies from a reference model.
//!
//! The protocol, so that figures compare with others: the whole text is tokenized without special tokens and
//! cut into windows of `window` tokens that do not overlap; a last partial window is dropped; each window is
//! scored alone, `window - 1` predictions each.
//!
//! ```text
//! perplexity = exp(mean over predictions of -ln p(token))
//! ```
//!
//! Against a reference model, as llama.cpp's perplexity tool reports: the mean of KL(reference || model), how
//! often both put the same token first, and the root mean square of the difference in the probability of
//! the token that came.

use nibble_kernels::backend::Backend;

use crate::forward::{BLOCK_SIZE, Batch, KvCache, Logits, Model, ModelError, SequenceRows};

/// Rows of a window that are run at once: bounds the memory for logits.
const CHUNK_ROWS: usize = 256;

/// Which windows of a text are scored.
#[derive(Clone, Copy, Debug)]
pub struct WindowOptions {
    /// Tokens of a window, at least 2.
    pub window: usize,
    /// Score the first so many windows only.
    pub windows: Option<usize>,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Predictions scored.
    pub predicted_tokens: usize,
    /// Comparison with the reference model, where there was one.
    pub reference: Option<ReferenceComparison>,
}

/// How far a model lies from a reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReferenceComparison {
    /// The reference's own perplexity on the same predictions.
    pub reference_perplexity: f64,
    /// Mean over predictions of KL(reference || model), in nats.
    pub mean_kl_divergence: f64,
    /// Fraction of predictions where both models put the same token first.
    pub top1_agreement: f64,
    /// Root mean square of the difference in the probability of the token that came.
    pub rms_probability_difference: f64,
}

/// How far an evaluation has come.
#[derive(Clone, Copy, Debug)]
pub struct EvaluationProgress {
    /// Windows scored.
    pub windows_done: usize,
    /// Windows in all.
    pub windows: usize,
    /// Perplexity so far.
    pub perplexity: f64,
}

/// A text could not be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError {
    /// The model refused a step.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There is nothing to score.
    #[error(
        "the text has {tokens} tokens, fewer than one window of {window}; give a longer text or a smaller --window"
    )]
    TextTooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// A window without a prediction.
    #[error("a window of {0} tokens has nothing to predict; it must be at least 2")]
    WindowTooSmall(usize),
    /// The reference cannot be compared with.
    #[error(
        "the reference has a vocabulary of {reference}, the model one of {model}; they cannot be compared"
    )]
    VocabularyMismatch {
        /// Vocabulary of the model.
        model: usize,
        /// Vocabulary of the reference.
        reference: usize,
    },
}

#[derive(Default)]
struct Sums {
    predictions: usize,
    negative_log_likelihood: f64,
    reference_negative_log_likelihood: f64,
    kl_divergence: f64,
    agreements: usize,
    squared_probability_difference: f64,
}

/// Scores `tokens` with `model`, and compares with `reference` where there is one.
///
/// # Errors
/// When the text is shorter than a window, the vocabularies differ, or a model refuses a step (a window
/// longer than it was loaded for).
pub fn evaluate<B: Backend>(
    model: &mut Model<B>,
    mut reference: Option<&mut Model<B>>,
    tokens: &[u32],
    options: WindowOptions,
    progress: &mut dyn FnMut(EvaluationProgress),
) -> Result<Evaluation, EvaluationError> {
    let window = options.window;
    if window < 2 {
        return Err(EvaluationError::WindowTooSmall(window));
    }
    let windows = (tokens.len() / window).min(options.windows.unwrap_or(usize::MAX));
    if windows == 0 {
        return Err(EvaluationError::TextTooShort { tokens: tokens.len(), window });
    }
    if let Some(reference) = &reference {
        let vocabularies = (model.config().vocabulary_size, reference.config().vocabulary_size);
        if vocabularies.0 != vocabularies.1 {
            let (model, reference) = vocabularies;
            return Err(EvaluationError::VocabularyMismatch { model, reference });
        }
    }
    let blocks = window.div_ceil(BLOCK_SIZE);
    let mut cache = model.kv_cache(blocks);
    let mut reference_cache = reference.as_ref().map(|reference| reference.kv_cache(blocks));
    let mut sums = Sums::default();
    for (index, window) in tokens.chunks_exact(window).take(windows).enumerate() {
        for first in (0..window.len() - 1).step_by(CHUNK_ROWS) {
            let rows = CHUNK_ROWS.min(window.len() - 1 - first);
            let logits = run(model, &mut cache, window, first, rows)?;
            let targets = &window[first + 1..=first + rows];
            let reference_logits = match (&mut reference, &mut reference_cache) {
                (Some(reference), Some(cache)) => Some(run(reference, cache, window, first, rows)?),
                _ => None,
            };
            for (row, &target) in targets.iter().enumerate() {
                sums.add(logits.row(row), reference_logits.as_ref().map(|logits| logits.row(row)), target);
            }
        }
        progress(EvaluationProgress { windows_done: index + 1, windows, perplexity: sums.perplexity() });
    }
    Ok(Evaluation {
        perplexity: sums.perplexity(),
        predicted_tokens: sums.predictions,
        reference: reference.is_some().then(|| sums.comparison()),
    })
}

fn run<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache<B>,
    window: &[u32],
    first: usize,
    rows: usize,
) -> Result<Logits, ModelError> {
    let block_table = (0..cache.blocks() as u32).collect();
    let batch = Batch {
        token_ids: window[first..first + rows].to_vec(),
        positions: (first..first + rows).map(|position| position as u32).collect(),
        sequences: vec![SequenceRows { first_row: 0, rows, first_position: first, block_table }],
        logit_rows: (0..rows).collect(),
    };
    model.forward(&batch, cache)
}

impl Sums {
    fn add(&mut self, logits: &[f32], reference: Option<&[f32]>, target: u32) {
        let (normalizer, best) = log_sum_exp(logits);
        let log_probability = f64::from(logits[target as usize]) - normalizer;
        self.predictions += 1;
        self.negative_log_likelihood -= log_probability;
        let Some(reference) = reference else { return };
        let (reference_normalizer, reference_best) = log_sum_exp(reference);
        let reference_log_probability = f64::from(reference[target as usize]) - reference_normalizer;
        self.reference_negative_log_likelihood -= reference_log_probability;
        let divergence = |(&reference, &logit): (&f32, &f32)| {
            let reference = f64::from(reference) - reference_normalizer;
            reference.exp() * (reference - (f64::from(logit) - normalizer))
        };
        self.kl_divergence += reference.iter().zip(logits).map(divergence).sum::<f64>();
        self.agreements += usize::from(best == reference_best);
        self.squared_probability_difference +=
            (log_probability.exp() - reference_log_probability.exp()).powi(2);
    }

    fn perplexity(&self) -> f64 {
        (self.negative_log_likelihood / self.predictions as f64).exp()
    }

    fn comparison(&self) -> ReferenceComparison {
        let predictions = self.predictions as f64;
        ReferenceComparison {
            reference_perplexity: (self.reference_negative_log_likelihood / predictions).exp(),
            mean_kl_divergence: self.kl_divergence / predictions,
            top1_agreement: self.agreements as f64 / predictions,
            rms_probability_difference: (self.squared_probability_difference / predictions).sqrt(),
        }
    }
}

/// `ln(sum of e^logit)` and the index of the largest logit.
fn log_sum_exp(logits: &[f32]) -> (f64, usize) {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (best, largest) = (index, logit);
        }
    }
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    (f64::from(largest) + total.ln(), best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_logits_have_the_perplexity_of_the_vocabulary() {
        let mut sums = Sums::default();
        sums.add(&[3.0; 50], Some(&[-1.0; 50]), 7);
        assert!((sums.perplexity() - 50.0).abs() < 1e-9);
        let comparison = sums.comparison();
        assert!(comparison.mean_kl_divergence.abs() < 1e-12);
        assert_eq!(comparison.top1_agreement, 1.0);
        assert!(comparison.rms_probability_difference < 1e-12);
    }

    #[test]
    fn divergence_is_that_of_the_two_distributions() {
        let mut sums = Sums::default();
        let (model, reference) = ([0.25f32, 0.75], [0.5f32, 0.5]);
        sums.add(&model.map(f32::ln), Some(&reference.map(f32::ln)), 0);
        let comparison = sums.comparison();
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((comparison.mean_kl_divergence - expected).abs() < 1e-6);
        assert!((comparison.rms_probability_difference - 0.25).abs() < 1e-6);
        assert!((comparison.reference_perplexity - 2.0).abs() < 1e-6);
    }
}
