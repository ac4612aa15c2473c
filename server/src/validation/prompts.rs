//! From texts and conversations to the tokens that the model continues.

use std::sync::Arc;

use nibble_model::chat_template::{ChatInputs, ChatTemplate};
use nibble_model::detokenizer::Detokenizer;
use nibble_model::error::CheckpointError;
use nibble_model::tokenizer::Tokenizer;
use serde_json::{Map, Value};

use crate::app::AppState;
use crate::messages::normalized;
use crate::openai::error::ApiError;
use crate::openai::types::chat::ChatRequest;

/// One prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Its tokens.
    pub(crate) token_ids: Vec<u32>,
    /// What the answer shall begin with: the prompt's text for `echo`, else nothing.
    pub(crate) echo: String,
    /// Where each token begins in `echo`, in characters; empty unless somebody looks at it.
    pub(crate) text_offsets: Vec<usize>,
    /// Most tokens of each completion; 0 if the prompt alone is of interest.
    pub(crate) max_tokens: usize,
}

/// Where a prompt is cut at its beginning.
#[derive(Clone, Copy)]
pub(super) struct Truncation {
    /// The tokens that stay, the last ones; all of them if absent.
    tokens: Option<usize>,
}

impl Truncation {
    /// The field `truncate_prompt_tokens`: a number of tokens, or -1 for what fits beside `max_tokens`.
    pub(super) fn new(
        field: Option<i64>,
        maximum_tokens: usize,
        max_tokens: usize,
    ) -> Result<Self, ApiError> {
        let tokens = match field {
            None => None,
            Some(-1) => Some(maximum_tokens.saturating_sub(max_tokens.max(1)).max(1)),
            Some(tokens) => {
                let fitting =
                    usize::try_from(tokens).ok().filter(|tokens| (1..=maximum_tokens).contains(tokens));
                let expected = format!("from 1 to {maximum_tokens}, or -1 for what fits");
                Some(fitting.ok_or_else(|| ApiError::invalid("truncate_prompt_tokens", tokens, expected))?)
            }
        };
        Ok(Self { tokens })
    }

    /// Drops tokens from the beginning; whether there were any to drop.
    pub(super) fn apply(self, token_ids: &mut Vec<u32>) -> bool {
        let excess = self.tokens.map_or(0, |tokens| token_ids.len().saturating_sub(tokens));
        token_ids.drain(..excess);
        excess > 0
    }
}

/// Where the text of each token begins, in characters.
pub(super) fn text_offsets(
    tokenizer: &Arc<Tokenizer>,
    token_ids: &[u32],
    skip_special_tokens: bool,
) -> Result<Vec<usize>, CheckpointError> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip_special_tokens);
    let mut characters = 0;
    let offset = |&token_id: &u32| {
        let begins_at = characters;
        characters += detokenizer.push(token_id)?.chars().count();
        Ok(begins_at)
    };
    token_ids.iter().map(offset).collect()
}

/// What a conversation became.
pub(super) struct Conversation {
    /// In the model's form.
    pub(super) text: String,
    /// The content of the last message, if it is the assistant's.
    pub(super) last_of_assistant: Option<String>,
}

/// Puts the messages of `request` into the model's form, with its tools if the model shall see them.
pub(super) fn conversation(
    state: &AppState,
    request: &mut ChatRequest,
    with_tools: bool,
) -> Result<Conversation, ApiError> {
    const CONTINUE: &str = "continue_final_message";
    let model = &state.model;
    let own_template = request_template(state, request)?;
    let Some(template) = own_template.as_ref().or(model.chat_template.as_deref()) else {
        return Err(ApiError::NoChatTemplate { model: model.name.clone() });
    };
    let messages = std::mem::take(&mut request.messages)
        .into_iter()
        .enumerate()
        .map(|(at, message)| normalized(at, message))
        .collect::<Result<Vec<_>, _>>()?;
    let Some(last) = messages.last() else {
        return Err(ApiError::invalid("messages", "[]", "at least one message"));
    };
    let content = |message: &Value| message.get("content").and_then(Value::as_str).map(str::to_owned);
    let last_of_assistant = if last["role"] == "assistant" { content(last) } else { None };
    let continued = match (request.continue_final_message, request.add_generation_prompt) {
        (true, Some(true)) => {
            return Err(ApiError::invalid(CONTINUE, true, "add_generation_prompt to be false beside it"));
        }
        (true, _) => Some(content(last).filter(|content| !content.trim().is_empty()).ok_or_else(|| {
            ApiError::invalid(CONTINUE, true, "a last message with a text that can be continued")
        })?),
        (false, _) => None,
    };
    let mut text = template.render(&ChatInputs {
        messages,
        tools: with_tools.then(|| std::mem::take(&mut request.tools)),
        documents: request.documents.take(),
        add_generation_prompt: request.add_generation_prompt.unwrap_or(continued.is_none()),
        variables: template_variables(request),
    })?;
    if let Some(content) = continued {
        cut_after(&mut text, &content).ok_or_else(|| {
            let expected = "a chat template that prints the last message as it is";
            ApiError::invalid(CONTINUE, true, expected)
        })?;
    }
    Ok(Conversation { text, last_of_assistant })
}

/// The template that the request brings, if the server allows it to.
fn request_template(state: &AppState, request: &mut ChatRequest) -> Result<Option<ChatTemplate>, ApiError> {
    const FIELD: &str = "chat_template";
    let in_variables = request.chat_template_kwargs.contains_key(FIELD);
    let Some(source) = request.chat_template.take() else {
        return if in_variables {
            let expected = "the template in the field chat_template";
            Err(ApiError::invalid("chat_template_kwargs.chat_template", "given", expected))
        } else {
            Ok(None)
        };
    };
    if !state.options.trust_request_chat_template {
        let message = "chat_template is given, but this server does not take templates from requests; leave it out, or \
                       start the server with --trust-request-chat-template"
            .to_owned();
        return Err(ApiError::InvalidField { param: FIELD.to_owned(), message });
    }
    let template = ChatTemplate::from_source(source, state.model.chat_template.as_deref());
    template.map(Some).map_err(|error| ApiError::invalid(FIELD, error, "a Jinja template"))
}

/// The further variables of the template.
fn template_variables(request: &mut ChatRequest) -> Map<String, Value> {
    let mut variables = std::mem::take(&mut request.chat_template_kwargs);
    if let Some(effort) = &request.reasoning_effort {
        // What the request says itself is more exact.
        variables.entry("reasoning_effort").or_insert_with(|| effort.name().into());
    }
    variables
}

/// Cuts a text behind the last place where it has `content`, as transformers does: white space at the end of the content
/// stays if the template prints it.
fn cut_after(text: &mut String, content: &str) -> Option<()> {
    let start = text.rfind(content.trim())?;
    let from_start = content.trim_start();
    let length = if text[start..].starts_with(from_start) { from_start.len() } else { content.trim().len() };
    text.truncate(start + length);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_with_the_message_that_is_continued() {
        for (content, expected) in [
            ("b c", "<a>b c</a><a>b c"),
            (" b c", "<a>b c</a><a>b c"),
            ("b c ", "<a>b c</a><a>b c"),
            ("x", "x"),
        ] {
            let mut text = "<a>b c</a><a>b c</a>".to_owned();
            let cut = cut_after(&mut text, content);
            assert_eq!(cut.is_some(), content != "x");
            assert!(cut.is_none() || text == expected, "{text}");
        }
        let mut text = "<a>b \n</a>".to_owned();
        assert_eq!(cut_after(&mut text, "b \n"), Some(()));
        assert_eq!(text, "<a>b \n");
    }
}
