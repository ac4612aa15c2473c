//! A compiled grammar as the engine's constraint.

use llguidance::Matcher;
use nibble_engine::{ConstraintError, TokenConstraint, TokenMask};

use super::first_line;

/// The parser of one sequence.
pub(super) struct GrammarConstraint {
    matcher: Matcher,
    /// Tokens of the completion that the parser has consumed.
    consumed: usize,
}

impl GrammarConstraint {
    /// A constraint at the beginning of a completion.
    pub(super) fn new(matcher: Matcher) -> Self {
        Self { matcher, consumed: 0 }
    }
}

impl TokenConstraint for GrammarConstraint {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        let failed = |error| ConstraintError { message: first_line(&error) };
        let new = completion.get(self.consumed..).unwrap_or_default();
        self.matcher.consume_tokens(new).map_err(failed)?;
        self.consumed = completion.len();
        let mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        Ok(TokenMask::from_words(mask.as_slice().to_vec()))
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(Self { matcher: self.matcher.deep_clone(), consumed: self.consumed })
    }
}
