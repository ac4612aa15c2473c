//! The text of a chat's answer, taken apart: first what the model thinks, then content and calls of tools.

use crate::reasoning::{ReasoningDelta, ReasoningParser};
use crate::tools::{CallDelta, ToolCallParser};
use crate::validation::ValidRequest;

/// Reads the text of one answer, in pieces of any size.
#[derive(Debug)]
pub(crate) struct AnswerParser {
    /// If the model may think.
    reasoning: Option<ReasoningParser>,
    /// If there are tools.
    calls: Option<ToolCallParser>,
}

/// What a piece of text brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AnswerDelta {
    /// Text that follows the thoughts before.
    pub(crate) reasoning: String,
    /// Text that follows the content before.
    pub(crate) content: String,
    /// What calls have got, by their index; ascending.
    pub(crate) calls: Vec<(usize, CallDelta)>,
}

impl AnswerDelta {
    /// Whether it brings nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }
}

impl AnswerParser {
    /// A parser of an answer to `request`.
    pub(crate) fn new(request: &ValidRequest) -> Self {
        Self {
            reasoning: request.thinking().map(ReasoningParser::new),
            calls: request.tools().map(|tools| tools.parser()),
        }
    }

    /// Whether the answer calls a tool.
    pub(crate) fn has_calls(&self) -> bool {
        self.calls.as_ref().is_some_and(ToolCallParser::has_calls)
    }

    /// Takes the next piece of the text; the end of it too if it is the `last`.
    pub(crate) fn push(&mut self, piece: &str, last: bool) -> AnswerDelta {
        let mut delta = AnswerDelta::default();
        match &mut self.reasoning {
            None => self.push_answer(piece, &mut delta),
            Some(parser) => {
                let mut parts = vec![parser.push(piece)];
                if last {
                    parts.push(parser.finish());
                }
                for ReasoningDelta { reasoning, answer } in parts {
                    delta.reasoning.push_str(&reasoning);
                    self.push_answer(&answer, &mut delta);
                }
            }
        }
        if last && let Some(parser) = &mut self.calls {
            delta.content.push_str(&parser.finish().content);
        }
        delta
    }

    fn push_answer(&mut self, answer: &str, delta: &mut AnswerDelta) {
        let Some(parser) = &mut self.calls else {
            delta.content.push_str(answer);
            return;
        };
        let brought = parser.push(answer);
        delta.content.push_str(&brought.content);
        for (index, call) in brought.calls {
            match delta.calls.last_mut() {
                Some((last, known)) if *last == index => known.arguments.push_str(&call.arguments),
                _ => delta.calls.push((index, call)),
            }
        }
    }
}
