//! A compiled grammar as the engine's constraint.

use std::sync::Arc;

use llguidance::Matcher;
use nibble_engine::{ConstraintError, TokenConstraint, TokenMask};
use nibble_model::tokenizer::Tokenizer;

use super::first_line;

/// The parser of one sequence.
pub(super) struct GrammarConstraint {
    matcher: Matcher,
    /// Tokens of the completion that the parser has consumed.
    consumed: usize,
    tokenizer: Arc<Tokenizer>,
}

impl GrammarConstraint {
    /// A constraint at the beginning of a completion of tokens of `tokenizer`.
    pub(super) fn new(matcher: Matcher, tokenizer: Arc<Tokenizer>) -> Self {
        Self { matcher, consumed: 0, tokenizer }
    }

    /// Consumes the tokens of `completion` that are new.
    fn advance(&mut self, completion: &[u32]) -> Result<(), ConstraintError> {
        let new = completion.get(self.consumed..).unwrap_or_default();
        self.matcher.consume_tokens(new).map_err(failed)?;
        self.consumed = completion.len();
        Ok(())
    }
}

/// The tokens that may come where `matcher` stands.
fn mask(matcher: &mut Matcher) -> Result<TokenMask, ConstraintError> {
    let mask = matcher.compute_mask_or_eos().map_err(failed)?;
    Ok(TokenMask::from_words(mask.as_slice().to_vec()))
}

fn failed(error: impl std::fmt::Display) -> ConstraintError {
    ConstraintError { message: first_line(&error) }
}

impl TokenConstraint for GrammarConstraint {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        self.advance(completion)?;
        mask(&mut self.matcher)
    }

    fn allowed_along(
        &mut self,
        completion: &[u32],
        draft: &[u32],
    ) -> Vec<Result<TokenMask, ConstraintError>> {
        let mut masks = vec![self.allowed_after(completion)];
        // A shallow copy, with the same caches: what it does leaves the parser where it stands, also when it fails.
        let mut ahead: Option<Matcher> = None;
        for &token in draft {
            if !matches!(masks.last(), Some(Ok(mask)) if mask.allows(token)) {
                break;
            }
            let ahead = ahead.get_or_insert_with(|| self.matcher.clone());
            masks.push(ahead.consume_token(token).map_err(failed).and_then(|()| mask(ahead)));
        }
        masks
    }

    fn forced_after(&mut self, completion: &[u32]) -> Vec<u32> {
        // What does not go on fails when the mask is asked for.
        if self.advance(completion).is_err() || self.matcher.is_stopped() {
            return Vec::new();
        }
        let bytes = self.matcher.clone().compute_ff_bytes();
        let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        self.tokenizer.encode(text, false).unwrap_or_default()
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        let tokenizer = Arc::clone(&self.tokenizer);
        Box::new(Self { matcher: self.matcher.deep_clone(), consumed: self.consumed, tokenizer })
    }
}
