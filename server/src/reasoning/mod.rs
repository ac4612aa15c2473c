//! Models that think before they answer, between `<think>` and `</think>`: Qwen 3, DeepSeek R1 and their kin.
//!
//! Some templates write `<think>` themselves at the end of the prompt, so that the answer begins within; others leave it
//! to the model, which may do without; and some write an empty thought, so that there is none.

mod constraint;
mod parser;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use nibble_engine::TokenConstraint;
use nibble_model::chat_template::ChatTemplate;
use nibble_model::tokenizer::Tokenizer;

use constraint::AfterThinking;
pub(crate) use parser::{ReasoningDelta, ReasoningParser};

const OPENING: &str = "<think>";
const CLOSING: &str = "</think>";

/// How a model marks what it thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>...</think>`, then the answer.
    ThinkTags,
}

impl ReasoningFormat {
    /// The format that the model's chat template speaks of, if it is a known one.
    pub fn of_template(template: &ChatTemplate) -> Option<Self> {
        template.mentions(CLOSING).then_some(Self::ThinkTags)
    }
}

/// Whether the model thinks when its answer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// The prompt has begun it.
    Begun,
    /// The model may begin.
    Possible,
    /// The prompt has ended it.
    Over,
}

/// The tags as a model's tokenizer has them.
#[derive(Clone)]
pub(crate) struct Reasoning {
    tokenizer: Arc<Tokenizer>,
    vocabulary_size: usize,
    eos_token_ids: Vec<u32>,
    /// The opening tag, if it is one token.
    opening: Option<u32>,
    are_special: bool,
}

impl Reasoning {
    /// The tags of [`ReasoningFormat::ThinkTags`] in the tokens of `tokenizer`. The model has logits for
    /// `vocabulary_size` tokens, of which `eos_token_ids` end an answer.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, vocabulary_size: usize, eos_token_ids: Vec<u32>) -> Self {
        let encode = |tag| tokenizer.encode(tag, false).unwrap_or_default();
        let opening = encode(OPENING);
        let are_special = encode(CLOSING).iter().any(|&token| tokenizer.is_special(token));
        let opening = if let [opening] = opening[..] { Some(opening) } else { None };
        Self { tokenizer, vocabulary_size, eos_token_ids, opening, are_special }
    }

    /// Whether the tags are special tokens, which are left out of texts.
    pub(crate) fn are_special(&self) -> bool {
        self.are_special
    }

    /// Whether the model thinks when it continues `prompt`.
    pub(crate) fn after_prompt(&self, prompt: &str) -> Thinking {
        let end = prompt.trim_end();
        if end.ends_with(OPENING) {
            Thinking::Begun
        } else if end.ends_with(CLOSING) {
            Thinking::Over
        } else {
            Thinking::Possible
        }
    }

    /// `answer` for a completion that may think first.
    pub(crate) fn constraint(
        &self,
        thinking: Thinking,
        answer: Box<dyn TokenConstraint>,
    ) -> Box<dyn TokenConstraint> {
        if thinking == Thinking::Over {
            return answer;
        }
        Box::new(AfterThinking::new(self.clone(), thinking, answer))
    }
}
