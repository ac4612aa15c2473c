//! Perplexity of a model on a text, and how far it lies from a reference model.
//!
//! The protocol, so that figures compare with others: the whole text is tokenized without special tokens and
//! cut into windows of `window` tokens that do not overlap; a last partial window is dropped; each window is
//! scored alone, `window - 1` predictions each, or those behind the first `context` tokens of it: llama.cpp's perplexity
//! tool scores the second half of each window.
//!
//! ```text
//! perplexity = exp(mean over predictions of -ln p(token))
//! ```
//!
//! [`evaluate`] scores models that are loaded, [`evaluate_streamed`] models larger than memory, one decoder layer
//! at a time; both give the same bits.
//!
//! Against a reference model, as llama.cpp's perplexity tool reports: the mean of KL(reference || model), how
//! often both put the same token first, and the root mean square of the difference in the probability of
//! the token that came.

mod score;
mod streamed;

use nibble_kernels::backend::Backend;
use score::Sums;
pub use score::kl_divergence;
pub use streamed::{StreamedProgress, evaluate_streamed};

use crate::config::ModelConfig;
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
    /// Tokens at the start of each window whose predictions are not scored, at most `window - 2`.
    pub context: usize,
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
    /// Nothing of a window is scored.
    #[error(
        "a context of {context} tokens leaves nothing to score in a window of {window}; choose a smaller one"
    )]
    ContextTooLarge {
        /// Tokens that are not scored.
        context: usize,
        /// Tokens of a window.
        window: usize,
    },
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
    let windows = options.cut(tokens)?;
    if let Some(reference) = &reference {
        check_vocabularies(model.config(), reference.config())?;
    }
    let blocks = options.window.div_ceil(BLOCK_SIZE);
    let mut cache = model.kv_cache(blocks)?;
    let mut reference_cache = reference.as_ref().map(|reference| reference.kv_cache(blocks)).transpose()?;
    let mut sums = Sums::default();
    for (index, window) in windows.iter().enumerate() {
        for first in (0..window.len() - 1).step_by(CHUNK_ROWS) {
            let rows = CHUNK_ROWS.min(window.len() - 1 - first);
            let logits = run(model, &mut cache, window, first, rows)?;
            let targets = &window[first + 1..=first + rows];
            let reference_logits = match (&mut reference, &mut reference_cache) {
                (Some(reference), Some(cache)) => Some(run(reference, cache, window, first, rows)?),
                _ => None,
            };
            for (row, &target) in targets.iter().enumerate().skip(options.context.saturating_sub(first)) {
                sums.add(logits.row(row), reference_logits.as_ref().map(|logits| logits.row(row)), target);
            }
        }
        progress(EvaluationProgress {
            windows_done: index + 1,
            windows: windows.len(),
            perplexity: sums.perplexity(),
        });
    }
    Ok(sums.evaluation(reference.is_some()))
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
        hidden_rows: Vec::new(),
    };
    model.forward(&batch, cache)
}

impl WindowOptions {
    /// The windows of `tokens` that are scored, at least one.
    fn cut(self, tokens: &[u32]) -> Result<Vec<&[u32]>, EvaluationError> {
        let Self { window, windows, context } = self;
        if window < 2 {
            return Err(EvaluationError::WindowTooSmall(window));
        }
        if context > window - 2 {
            return Err(EvaluationError::ContextTooLarge { context, window });
        }
        let cut: Vec<_> = tokens.chunks_exact(window).take(windows.unwrap_or(usize::MAX)).collect();
        if cut.is_empty() {
            return Err(EvaluationError::TextTooShort { tokens: tokens.len(), window });
        }
        Ok(cut)
    }
}

fn check_vocabularies(model: &ModelConfig, reference: &ModelConfig) -> Result<(), EvaluationError> {
    let (model, reference) = (model.vocabulary_size, reference.vocabulary_size);
    if model == reference { Ok(()) } else { Err(EvaluationError::VocabularyMismatch { model, reference }) }
}
