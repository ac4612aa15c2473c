//! A constraint that begins where the thoughts end.

use nibble_engine::{ConstraintError, TokenConstraint, TokenMask};

use super::{CLOSING, Reasoning, Thinking};

/// Lets a model think freely, then holds its answer to another constraint. Thoughts do not end the answer: the
/// end-of-sequence tokens come after it.
pub(super) struct AfterThinking {
    thoughts: Thoughts,
    answer: Box<dyn TokenConstraint>,
}

/// Where a completion is, in its thoughts or behind them.
#[derive(Clone)]
struct Thoughts {
    tags: Reasoning,
    state: State,
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

impl Thoughts {
    /// Takes a token.
    ///
    /// # Errors
    /// When it ends the thoughts and begins the answer at once: nobody could say whether it may come.
    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
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

impl AfterThinking {
    /// A constraint at the beginning of a completion.
    pub(super) fn new(tags: Reasoning, thinking: Thinking, answer: Box<dyn TokenConstraint>) -> Self {
        let state = match thinking {
            Thinking::Begun => State::Thinking,
            Thinking::Possible => State::Start,
            Thinking::Over => State::Answer { from: 0 },
        };
        Self { thoughts: Thoughts { tags, state, seen: 0, tail: Vec::new() }, answer }
    }

    /// Takes the tokens of `completion` that are new; says where the answer begins, if it has begun.
    fn advance(&mut self, completion: &[u32]) -> Result<Option<usize>, ConstraintError> {
        let new = completion.get(self.thoughts.seen..).unwrap_or_default();
        new.iter().try_for_each(|&token| self.thoughts.take(token))?;
        if let State::Answer { from } = self.thoughts.state { Ok(Some(from)) } else { Ok(None) }
    }

    /// What may come in `thoughts`; `None` when they are over.
    fn allowed_in(&mut self, thoughts: &Thoughts) -> Option<Result<TokenMask, ConstraintError>> {
        let Thoughts { tags, state, .. } = thoughts;
        match state {
            State::Start => Some(self.answer.allowed_after(&[]).map(|mut allowed| {
                if let Some(opening) = tags.opening {
                    allowed.allow(opening);
                }
                allowed
            })),
            State::Thinking => Some(Ok(TokenMask::all_but(tags.vocabulary_size, &tags.eos_token_ids))),
            State::Answer { .. } => None,
        }
    }
}

impl TokenConstraint for AfterThinking {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        self.allowed_along(completion, &[]).swap_remove(0)
    }

    fn allowed_along(
        &mut self,
        completion: &[u32],
        draft: &[u32],
    ) -> Vec<Result<TokenMask, ConstraintError>> {
        match self.advance(completion) {
            Ok(Some(from)) => return self.answer.allowed_along(&completion[from..], draft),
            Ok(None) => {}
            Err(error) => return vec![Err(error)],
        }
        let mut ahead = self.thoughts.clone();
        let mut masks: Vec<_> = self.allowed_in(&ahead).into_iter().collect();
        for &token in draft {
            if !matches!(masks.last(), Some(Ok(mask)) if mask.allows(token)) {
                break;
            }
            if let Err(error) = ahead.take(token) {
                masks.push(Err(error));
                break;
            }
            if let State::Answer { from } = ahead.state {
                // The draft holds the end of the thoughts, or there are none: the answer says the rest.
                let begun = &draft[from - completion.len()..];
                let of_answer = self.answer.allowed_along(&[], begun);
                masks.extend(of_answer.into_iter().skip(ahead.seen - from));
                break;
            }
            masks.extend(self.allowed_in(&ahead));
        }
        masks
    }

    fn forced_after(&mut self, completion: &[u32]) -> Vec<u32> {
        match self.advance(completion) {
            Ok(Some(from)) => self.answer.forced_after(&completion[from..]),
            // What cannot go on fails when the mask is asked for.
            Ok(None) | Err(_) => Vec::new(),
        }
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(Self { thoughts: self.thoughts.clone(), answer: self.answer.clone() })
    }
}
