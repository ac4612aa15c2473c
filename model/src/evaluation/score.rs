//! The sums that a perplexity and a comparison with a reference are made of: one row of logits after the other.

use super::{Evaluation, ReferenceComparison};

/// Sums over predictions, always added in the order of the text.
#[derive(Default)]
pub(super) struct Sums {
    predictions: usize,
    negative_log_likelihood: f64,
    reference_negative_log_likelihood: f64,
    kl_divergence: f64,
    agreements: usize,
    squared_probability_difference: f64,
}

impl Sums {
    /// Adds the prediction of `target` by one row of logits, and of the reference's where there is one.
    pub(super) fn add(&mut self, logits: &[f32], reference: Option<&[f32]>, target: u32) {
        let (normalizer, best) = log_sum_exp(logits);
        let log_probability = f64::from(logits[target as usize]) - normalizer;
        self.predictions += 1;
        self.negative_log_likelihood -= log_probability;
        let Some(reference) = reference else { return };
        let (reference_normalizer, reference_best) = log_sum_exp(reference);
        let reference_log_probability = f64::from(reference[target as usize]) - reference_normalizer;
        self.reference_negative_log_likelihood -= reference_log_probability;
        self.kl_divergence += divergence(reference, reference_normalizer, logits, normalizer);
        self.agreements += usize::from(best == reference_best);
        self.squared_probability_difference +=
            (log_probability.exp() - reference_log_probability.exp()).powi(2);
    }

    /// Perplexity so far.
    pub(super) fn perplexity(&self) -> f64 {
        (self.negative_log_likelihood / self.predictions as f64).exp()
    }

    /// What was measured; `compared` says that every prediction had a reference.
    pub(super) fn evaluation(&self, compared: bool) -> Evaluation {
        Evaluation {
            perplexity: self.perplexity(),
            predicted_tokens: self.predictions,
            reference: compared.then(|| self.comparison()),
        }
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

/// The Kullback-Leibler divergence of what `logits` predict from what `reference` predicts, in nats.
pub fn kl_divergence(reference: &[f32], logits: &[f32]) -> f64 {
    divergence(reference, log_sum_exp(reference).0, logits, log_sum_exp(logits).0)
}

fn divergence(reference: &[f32], reference_normalizer: f64, logits: &[f32], normalizer: f64) -> f64 {
    let term = |(&reference, &logit): (&f32, &f32)| {
        let reference = f64::from(reference) - reference_normalizer;
        reference.exp() * (reference - (f64::from(logit) - normalizer))
    };
    reference.iter().zip(logits).map(term).sum()
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
