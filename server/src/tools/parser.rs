//! Tool calls in the text of a model: one state machine for streamed answers and whole ones.
//!
//! It takes the text in pieces of any size and says what of it is content and what belongs to calls. What may yet
//! become a call is kept back, and comes out as content when it does not: a `<tool_call>` with something else than a
//! call in it, or an object that has other keys. White space around calls is no content.
//!
//! Small models forget the tags of their format. An answer that begins with the object of a call, in a fence of JSON
//! or bare, is one too, if it names a function that there is.

use super::ToolCallFormat;
use super::call::{CallDelta, CallReader, Progress};

/// What models write around calls where they were taught other tags, and its end.
const FENCE: &str = "```json";
const FENCE_END: &str = "```";

/// Reads the text of one answer.
#[derive(Debug)]
pub(crate) struct ToolCallParser {
    format: ToolCallFormat,
    /// Names of the functions that there are.
    functions: Vec<String>,
    /// Whether calls after the first one count.
    parallel: bool,
    state: State,
    /// White space and the beginning of a tag, kept back; in a call whose name is not known, all of it.
    held: String,
    /// Calls so far.
    calls: usize,
    has_content: bool,
}

#[derive(Debug)]
enum State {
    /// Content, or what comes before it.
    Text,
    /// In a call, up to a closing tag, if there must be one. What is not `certain` to be a call is one only if it
    /// names a function that there is.
    Call { call: CallReader, closing: Option<&'static str>, certain: bool },
    /// After the object of a call: up to the closing tag, if there must be one.
    AfterCall { closing: Option<&'static str> },
}

/// What a piece of text brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta {
    /// Text that follows the content before.
    pub(crate) content: String,
    /// What calls have got, by their index; ascending.
    pub(crate) calls: Vec<(usize, CallDelta)>,
}

impl ToolCallParser {
    /// A parser at the beginning of an answer to a request with these `functions`. Without `parallel`, calls after
    /// the first are dropped.
    pub(crate) fn new(format: ToolCallFormat, functions: Vec<String>, parallel: bool) -> Self {
        Self {
            format,
            functions,
            parallel,
            state: State::Text,
            held: String::new(),
            calls: 0,
            has_content: false,
        }
    }

    /// Whether the answer calls a tool.
    pub(crate) fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Takes the next piece of the text.
    pub(crate) fn push(&mut self, piece: &str) -> Delta {
        let mut delta = Delta::default();
        piece.chars().for_each(|character| self.take(character, &mut delta));
        delta
    }

    /// Ends the text. What was kept back is content, unless calls came before: then it is one more that was cut.
    /// A call whose name is known stays one, even if it is cut.
    pub(crate) fn finish(&mut self) -> Delta {
        let mut delta = Delta::default();
        let is_content = !self.has_calls() && !matches!(self.state, State::AfterCall { .. });
        if is_content {
            delta.content = std::mem::take(&mut self.held);
        }
        self.held.clear();
        delta
    }

    fn take(&mut self, character: char, delta: &mut Delta) {
        match &self.state {
            State::Text => self.take_text(character, delta),
            State::Call { .. } => self.take_call(character, delta),
            State::AfterCall { closing: Some(closing) } => self.take_until(closing, character),
            State::AfterCall { closing: None } => self.take_between(character, delta),
        }
    }

    /// Content: `held` is white space, then the beginning of an opening tag.
    fn take_text(&mut self, character: char, delta: &mut Delta) {
        let opening = self.format.opening_tag();
        let begun = self.held.trim_start();
        let may_continue =
            |tag: &str| tag.strip_prefix(begun).is_some_and(|rest| rest.starts_with(character));
        if may_continue(opening) || (!self.has_content && may_continue(FENCE)) {
            self.held.push(character);
            let begun = self.held.trim_start();
            if begun == opening {
                self.begin_call(self.format.closing_tag(), true);
            } else if begun == FENCE {
                self.begin_call(Some(FENCE_END), false);
            }
        } else if begun.is_empty() && character == '{' && !self.has_content {
            self.begin_call(None, false);
            self.take_call(character, delta);
        } else if begun.is_empty() {
            self.held.push(character);
            if !character.is_whitespace() {
                self.release(delta);
            }
        } else {
            // No tag after all. None has its first character a second time: another one begins now or never.
            self.release(delta);
            self.take_text(character, delta);
        }
    }

    fn begin_call(&mut self, closing: Option<&'static str>, certain: bool) {
        // Llama's tag says no more than that code follows.
        let certain = certain && self.format != ToolCallFormat::Llama3Json;
        self.state = State::Call { call: CallReader::new(), closing, certain };
    }

    fn take_call(&mut self, character: char, delta: &mut Delta) {
        let State::Call { call, closing, certain } = &mut self.state else { return };
        let (closing, certain) = (*closing, *certain);
        let was_known = call.name_is_known();
        if !was_known {
            self.held.push(character);
        }
        let mut brought = CallDelta::default();
        let mut progress = call.push(character, &mut brought);
        // Without tags around it, an object with a name may be any answer.
        if brought.name.as_ref().is_some_and(|name| !certain && !self.functions.contains(name)) {
            brought = CallDelta::default();
            progress = Progress::Malformed;
        } else if call.name_is_known() && !was_known {
            self.calls += 1;
            self.held.clear();
        }
        self.report(brought, delta);
        match progress {
            Progress::Inside => {}
            Progress::Ended => self.state = State::AfterCall { closing },
            Progress::Malformed if self.held.is_empty() => {
                // The character may begin the closing tag.
                self.state = State::AfterCall { closing };
                self.take(character, delta);
            }
            Progress::Malformed => {
                self.state = State::Text;
                self.release(delta);
            }
        }
    }

    /// Adds what a call has got to `delta`.
    fn report(&self, brought: CallDelta, delta: &mut Delta) {
        if brought == CallDelta::default() || (self.calls > 1 && !self.parallel) {
            return;
        }
        let index = self.calls - 1;
        match delta.calls.last_mut() {
            Some((last, call)) if *last == index => call.arguments.push_str(&brought.arguments),
            _ => delta.calls.push((index, brought)),
        }
    }

    /// After a call without a closing tag: another call, or content.
    fn take_between(&mut self, character: char, delta: &mut Delta) {
        if character != ';' && !character.is_whitespace() {
            self.state = State::Text;
            if character == '{' {
                self.begin_call(None, false);
            }
            self.take(character, delta);
        }
    }

    /// Drops everything up to a closing tag, or to an opening one, where the closing one was forgotten.
    fn take_until(&mut self, closing: &'static str, character: char) {
        let opening = self.format.opening_tag();
        self.held.push(character);
        if self.held.ends_with(closing) {
            self.held.clear();
            self.state = State::Text;
        } else if self.held.ends_with(opening) {
            self.held = opening.to_owned();
            self.begin_call(self.format.closing_tag(), true);
        } else if self.held.len() > opening.len().max(closing.len()) {
            // As much as may be the beginning of a tag stays.
            self.held.remove(0);
        }
    }

    /// What was kept back is content.
    fn release(&mut self, delta: &mut Delta) {
        self.has_content |= !self.held.trim().is_empty();
        delta.content.push_str(&self.held);
        self.held.clear();
    }
}
