//! Log probabilities in the shapes of both endpoints.

use nibble_model::tokenizer::Tokenizer;

use super::types::chat::{ChatLogprobs, ChatTokenLogprob, TokenEntry};
use super::types::common::finite;
use super::types::completions::{CompletionLogprobs, TopLogprobs};
use crate::generation::TokenOutput;

/// The log probabilities of `tokens`, absent when the request did not ask for them.
pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[TokenOutput]) -> Option<ChatLogprobs> {
    let entry = |token_id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token_id);
        TokenEntry { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    };
    let content: Vec<_> = tokens
        .iter()
        .filter_map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            let top_logprobs = logprobs.top.iter().map(|top| entry(top.token_id, top.logprob)).collect();
            Some(ChatTokenLogprob { token: entry(token.token_id, logprobs.logprob), top_logprobs })
        })
        .collect();
    (!content.is_empty()).then_some(ChatLogprobs { content })
}

/// The log probabilities of `tokens`, absent when the request did not ask for them.
pub(super) fn completion(tokenizer: &Tokenizer, tokens: &[TokenOutput]) -> Option<CompletionLogprobs> {
    let text = |token_id: u32| String::from_utf8_lossy(&tokenizer.token_bytes(token_id)).into_owned();
    let mut columns = CompletionLogprobs::default();
    for token in tokens {
        let Some(logprobs) = &token.logprobs else { continue };
        let sampled = (text(token.token_id), finite(logprobs.logprob));
        let top = logprobs.top.iter().map(|top| (text(top.token_id), finite(top.logprob)));
        let mut by_text: Vec<(String, f32)> = Vec::new();
        for (token, logprob) in top.chain([sampled.clone()]) {
            // Parts of characters have one text: the most likely of them counts.
            if by_text.iter().all(|(known, _)| *known != token) {
                by_text.push((token, logprob));
            }
        }
        columns.text_offset.push(token.text_offset);
        columns.tokens.push(sampled.0);
        columns.token_logprobs.push(sampled.1);
        columns.top_logprobs.push(TopLogprobs(by_text));
    }
    (!columns.tokens.is_empty()).then_some(columns)
}
