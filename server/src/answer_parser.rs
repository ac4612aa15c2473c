//! The text of a chat's answer, taken apart: first what the model thinks, then content and calls of tools.

use crate::reasoning::{ReasoningDelta, ReasoningParser};
use crate::tools::{CallDelta, ToolCallParser, Tools};
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
            calls: request.tools().map(Tools::parser),
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reasoning::Thinking;
    use crate::testing::pieces;
    use crate::tools::ToolCallFormat;

    fn parse(pieces: &[&str]) -> AnswerDelta {
        let calls = ToolCallParser::new(ToolCallFormat::Hermes, vec!["f".to_owned()], true);
        let reasoning = Some(ReasoningParser::new(Thinking::Possible));
        let mut parser = AnswerParser { reasoning, calls: Some(calls) };
        let mut whole = AnswerDelta::default();
        for (at, piece) in pieces.iter().enumerate() {
            let delta = parser.push(piece, at + 1 == pieces.len());
            whole.reasoning.push_str(&delta.reasoning);
            whole.content.push_str(&delta.content);
            for (index, call) in delta.calls {
                if index == whole.calls.len() {
                    whole.calls.push((index, call));
                } else {
                    assert_eq!(call.name, None);
                    whole.calls[index].1.arguments.push_str(&call.arguments);
                }
            }
        }
        assert_eq!(parser.has_calls(), !whole.calls.is_empty());
        whole
    }

    const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"ß\"}}\n</tool_call>";

    #[test]
    fn calls_are_found_behind_thoughts_and_not_in_them() {
        let delta = parse(&[&format!("<think>{CALL} or not</think>\n\nSo: {CALL}\n{CALL}")]);
        assert_eq!((delta.reasoning, delta.content.as_str()), (format!("{CALL} or not"), "So:"));
        let arguments: Vec<&str> = delta.calls.iter().map(|(_, call)| call.arguments.as_str()).collect();
        assert_eq!(arguments, ["{\"a\": \"ß\"}"; 2]);
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            parts in prop::collection::vec(
                prop::sample::select(vec!["<think>", "</think>", "<thi", "\n", "a b", CALL, "<tool_call>", "{"]),
                0..9,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let text = parts.concat();
            let pieces = pieces(&text, &cuts);
            prop_assert_eq!(parse(&pieces), parse(&[&text]));
        }
    }
}
