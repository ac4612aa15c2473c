//! A constraint that begins where the thoughts end.

use nibble_engine::{ConstraintError, TokenConstraint, TokenMask};

use super::{CLOSING, Reasoning, Thinking};

/// Lets a model think freely, then holds its answer to another constraint. Thoughts do not end the answer: the
/// end-of-sequence tokens come after it.
pub(super) struct AfterThinking {
    tags: Reasoning,
    state: State,
    answer: Box<dyn TokenConstraint>,
    /// Tokens of the completion that were looked at.
    seen: usize,
    /// The last bytes of the thoughts, as many as may be the beginning of the closing tag.
    tail: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first token may open the thoughts, or begin the answer.
    Start,
    Thinking,
    /// The answer begins with this token of the completion.
    Answer {
        from: usize,
    },
}

impl AfterThinking {
    /// A constraint at the beginning of a completion.
    pub(super) fn new(tags: Reasoning, thinking: Thinking, answer: Box<dyn TokenConstraint>) -> Self {
        let state = match thinking {
            Thinking::Begun => State::Thinking,
            Thinking::Possible => State::Start,
            Thinking::Over => State::Answer { from: 0 },
        };
        Self { tags, state, answer, seen: 0, tail: Vec::new() }
    }

    /// Takes the tokens of `completion` that are new.
    ///
    /// # Errors
    /// When a token ends the thoughts and begins the answer at once: nobody could say whether it may come.
    fn advance(&mut self, completion: &[u32]) -> Result<(), ConstraintError> {
        while self.seen < completion.len() {
            let token = completion[self.seen];
            self.seen += 1;
            match self.state {
                State::Start if Some(token) == self.tags.opening => self.state = State::Thinking,
                State::Start => self.state = State::Answer { from: 0 },
                State::Thinking => {
                    if self.closes(token)? {
                        self.state = State::Answer { from: self.seen };
                    }
                }
                State::Answer { .. } => {}
            }
        }
        Ok(())
    }

    /// Whether the thoughts end with `token`.
    fn closes(&mut self, token: u32) -> Result<bool, ConstraintError> {
        let closing = CLOSING.as_bytes();
        self.tail.extend(self.tags.tokenizer.token_bytes(token));
        let place = self.tail.windows(closing.len()).position(|bytes| bytes == closing);
        let Some(place) = place else {
            let excess = self.tail.len().saturating_sub(closing.len() - 1);
            self.tail.drain(..excess);
            return Ok(false);
        };
        if self.tail[place + closing.len()..].trim_ascii().is_empty() {
            return Ok(true);
        }
        let message = format!("a token of the model holds {CLOSING} and the beginning of the answer");
        Err(ConstraintError { message })
    }
}

impl TokenConstraint for AfterThinking {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        self.advance(completion)?;
        match self.state {
            State::Start => {
                let mut allowed = self.answer.allowed_after(&[])?;
                if let Some(opening) = self.tags.opening {
                    allowed.allow(opening);
                }
                Ok(allowed)
            }
            State::Thinking => Ok(TokenMask::all_but(self.tags.vocabulary_size, &self.tags.eos_token_ids)),
            State::Answer { from } => self.answer.allowed_after(completion.get(from..).unwrap_or_default()),
        }
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(Self {
            tags: self.tags.clone(),
            state: self.state,
            answer: self.answer.clone(),
            seen: self.seen,
            tail: self.tail.clone(),
        })
    }
}
