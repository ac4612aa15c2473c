//! Thoughts and answer in the text of a model: one state machine for streamed answers and whole ones.
//!
//! It takes the text in pieces of any size. What may yet become a tag is kept back. White space around thoughts belongs
//! neither to them nor to the answer.

use super::{CLOSING, OPENING, Thinking};

/// Reads the text of one answer.
#[derive(Debug)]
pub(crate) struct ReasoningParser {
    state: State,
    /// White space, then the beginning of a tag, kept back.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before an opening tag, or an answer without thoughts.
    Start,
    /// In the white space before a thought.
    BeforeReasoning,
    Reasoning,
    /// In the white space after the closing tag.
    AfterReasoning,
    Answer,
}

/// What a piece of text brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReasoningDelta {
    /// Text that follows the thoughts before.
    pub(crate) reasoning: String,
    /// Text that follows the answer before.
    pub(crate) answer: String,
}

impl ReasoningParser {
    /// A parser at the beginning of an answer.
    pub(crate) fn new(thinking: Thinking) -> Self {
        let state = match thinking {
            Thinking::Begun => State::BeforeReasoning,
            Thinking::Possible => State::Start,
            Thinking::Over => State::AfterReasoning,
        };
        Self { state, held: String::new() }
    }

    /// Takes the next piece of the text.
    pub(crate) fn push(&mut self, piece: &str) -> ReasoningDelta {
        let mut delta = ReasoningDelta::default();
        for (at, character) in piece.char_indices() {
            if self.state == State::Answer {
                delta.answer.push_str(&piece[at..]);
                break;
            }
            self.take(character, &mut delta);
        }
        delta
    }

    /// Ends the text. What was kept back was no tag.
    pub(crate) fn finish(&mut self) -> ReasoningDelta {
        let mut delta = ReasoningDelta::default();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Reasoning if !held.trim().is_empty() => delta.reasoning = held,
            State::BeforeReasoning => delta.reasoning = held,
            State::Start => delta.answer = held,
            State::Reasoning | State::AfterReasoning | State::Answer => {}
        }
        delta
    }

    fn take(&mut self, character: char, delta: &mut ReasoningDelta) {
        match self.state {
            State::Start => {
                if self.continues(OPENING, character) {
                    if self.held.trim_start() == OPENING {
                        self.held.clear();
                        self.state = State::BeforeReasoning;
                    }
                } else {
                    self.state = State::Answer;
                    delta.answer.push_str(&std::mem::take(&mut self.held));
                    delta.answer.push(character);
                }
            }
            State::BeforeReasoning | State::Reasoning => {
                if self.continues(CLOSING, character) {
                    if self.held.trim_start() == CLOSING {
                        self.held.clear();
                        self.state = State::AfterReasoning;
                    } else if self.state == State::BeforeReasoning && self.held.trim().is_empty() {
                        self.held.clear();
                    }
                    return;
                }
                self.state = State::Reasoning;
                delta.reasoning.push_str(&std::mem::take(&mut self.held));
                // The tag has its first character only once: another one begins here or later.
                if !self.continues(CLOSING, character) {
                    delta.reasoning.push(character);
                }
            }
            State::AfterReasoning => {
                if !character.is_whitespace() {
                    self.state = State::Answer;
                    delta.answer.push(character);
                }
            }
            State::Answer => delta.answer.push(character),
        }
    }

    /// Adds `character` to what is held, if that is white space and the beginning of `tag` then.
    fn continues(&mut self, tag: &str, character: char) -> bool {
        let begun = self.held.trim_start();
        let continues = (begun.is_empty() && character.is_whitespace())
            || tag.strip_prefix(begun).is_some_and(|rest| rest.starts_with(character));
        if continues {
            self.held.push(character);
        }
        continues
    }
}
