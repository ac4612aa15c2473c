//! What a request may bring to restrict its tokens beyond its sampling parameters: a grammar, say.
//!
//! A constraint says which tokens may follow the completion so far. That is known before the step that computes
//! the logits begins, so the engine asks while the device works.

use std::fmt;

/// Tokens that may come next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

/// A constraint cannot say what may come next; the sequence fails with this message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the structured output cannot go on: {message}")]
pub struct ConstraintError {
    /// What is wrong.
    pub message: String,
}

/// Restricts the tokens of one sequence.
pub trait TokenConstraint: Send {
    /// The tokens that may follow `completion`: all that was generated so far. From one call to the next it
    /// grows at its end only; it may also stay the same, when the sequence was preempted in between. Must
    /// depend on nothing else, and allow an end-of-sequence token where the completion may end.
    ///
    /// # Errors
    /// When `completion` is not one that the constraint allows, or the work exceeds its budget.
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError>;

    /// What [`TokenConstraint::allowed_after`] says of `completion`, then of `completion` and the first token of `draft`,
    /// and so on, until a token of the draft may not come or the constraint cannot say: at most one more than the draft
    /// has tokens. Leaves the constraint where `completion` ends.
    fn allowed_along(
        &mut self,
        completion: &[u32],
        draft: &[u32],
    ) -> Vec<Result<TokenMask, ConstraintError>> {
        let mut masks = vec![self.allowed_after(completion)];
        let mut ahead: Option<Box<dyn TokenConstraint>> = None;
        let mut tokens = completion.to_vec();
        for &token in draft {
            if !matches!(masks.last(), Some(Ok(mask)) if mask.allows(token)) {
                break;
            }
            tokens.push(token);
            masks.push(ahead.get_or_insert_with(|| self.boxed_clone()).allowed_after(&tokens));
        }
        masks
    }

    /// A guess at tokens that must follow `completion`, because the constraint leaves no other text; none if it leaves
    /// any, or does not know. They are tried as a draft, so that a wrong guess costs time but changes no token.
    fn forced_after(&mut self, completion: &[u32]) -> Vec<u32> {
        let _ = completion;
        Vec::new()
    }

    /// The same constraint for another sequence, independent of this one.
    fn boxed_clone(&self) -> Box<dyn TokenConstraint>;
}

impl Clone for Box<dyn TokenConstraint> {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

impl fmt::Debug for dyn TokenConstraint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("TokenConstraint")
    }
}

impl TokenMask {
    /// A mask of bits: bit `i % 32` of word `i / 32` says whether token `i` may come. Tokens beyond the last
    /// word may not.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// A mask of all tokens below `vocabulary_size` but `excluded`.
    pub fn all_but(vocabulary_size: usize, excluded: &[u32]) -> Self {
        let mut words = vec![u32::MAX; vocabulary_size.div_ceil(u32::BITS as usize)];
        for &token_id in excluded {
            if let Some(word) = words.get_mut(token_id as usize / u32::BITS as usize) {
                *word &= !(1 << (token_id % u32::BITS));
            }
        }
        Self { words }
    }

    /// The bits, as [`Self::from_words`] takes them.
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Lets `token_id` come as well.
    pub fn allow(&mut self, token_id: u32) {
        let index = token_id as usize / u32::BITS as usize;
        if index >= self.words.len() {
            self.words.resize(index + 1, 0);
        }
        self.words[index] |= 1 << (token_id % u32::BITS);
    }

    /// Whether `token_id` may come next.
    pub fn allows(&self, token_id: u32) -> bool {
        let word = self.words.get(token_id as usize / u32::BITS as usize);
        word.is_some_and(|word| word >> (token_id % u32::BITS) & 1 == 1)
    }

    /// Whether a token may come next that is none of `tokens`.
    pub(crate) fn allows_others_than(&self, tokens: &[u32]) -> bool {
        let allowed: usize = self.words.iter().map(|word| word.count_ones() as usize).sum();
        allowed > tokens.iter().filter(|&&token| self.allows(token)).count()
    }

    /// Makes the logits of tokens that may not come minus infinity.
    pub(crate) fn apply(&self, logits: &mut [f32]) {
        for (logits, word) in
            logits.chunks_mut(u32::BITS as usize).zip(self.words.iter().chain(std::iter::repeat(&0)))
        {
            if *word != u32::MAX {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_keeps_the_tokens_of_its_bits_and_none_beyond() {
        let mask = TokenMask::from_words(vec![0b101, 1 << 31]);
        let mut logits = vec![1.0; 100];
        mask.apply(&mut logits);
        let kept: Vec<usize> = (0..100).filter(|&token| logits[token] == 1.0).collect();
        assert_eq!(kept, [0, 2, 63]);
        assert!((0..200).all(|token| mask.allows(token) == kept.contains(&(token as usize))));
        assert!(mask.allows_others_than(&[0, 2]) && !mask.allows_others_than(&[0, 2, 63]));
    }

    #[test]
    fn masks_are_made_of_single_tokens() {
        let mut mask = TokenMask::all_but(70, &[0, 33, 1000]);
        assert!((0..70).all(|token| mask.allows(token) != [0, 33].contains(&token)));
        mask.allow(33);
        mask.allow(200);
        assert!(mask.allows(33) && mask.allows(200) && !mask.allows(199) && !mask.allows(0));
    }
}
