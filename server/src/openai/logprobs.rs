//! Log probabilities in the shapes of both endpoints.

use nibble_model::tokenizer::Tokenizer;

use super::types::chat::{ChatLogprobs, ChatTokenLogprob, TokenEntry};
use super::types::common::{PromptLogprobs, RankedToken, RankedTokens, finite};
use super::types::completions::{CompletionLogprobs, TopLogprobs};
use crate::generation::TokenOutput;
use crate::validation::Presentation;

/// Writes log probabilities as a request wants them.
pub(super) struct LogprobWriter<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) presentation: Presentation,
}

impl LogprobWriter<'_> {
    /// What a token goes by.
    fn name(&self, token_id: u32) -> String {
        if self.presentation.tokens_as_ids {
            return format!("token_id:{token_id}");
        }
        self.text(token_id)
    }

    fn text(&self, token_id: u32) -> String {
        String::from_utf8_lossy(&self.tokenizer.token_bytes(token_id)).into_owned()
    }

    /// The log probabilities of `tokens`, absent when the request did not ask for them.
    pub(super) fn chat(&self, tokens: &[TokenOutput]) -> Option<ChatLogprobs> {
        self.presentation.logprobs?;
        let entry = |token_id: u32, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(token_id);
            TokenEntry { token: self.name(token_id), logprob, bytes }
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

    /// The log probabilities of `tokens`, after those of the `prompt` if it is a part of the answer; absent when the
    /// request did not ask for them.
    pub(super) fn completion(
        &self,
        prompt: &[TokenOutput],
        tokens: &[TokenOutput],
    ) -> Option<CompletionLogprobs> {
        let count = self.presentation.logprobs?;
        let prompt = if self.presentation.echo { prompt } else { &[] };
        let mut columns = CompletionLogprobs::default();
        for token in prompt.iter().chain(tokens) {
            let name = self.name(token.token_id);
            let logprob = token.logprobs.as_ref().map(|logprobs| finite(logprobs.logprob));
            let top = token.logprobs.as_ref().map(|logprobs| {
                let top = logprobs.top.iter().take(count);
                let top = top.map(|top| (self.name(top.token_id), finite(top.logprob)));
                let mut by_name: Vec<(String, f32)> = Vec::new();
                for (name, logprob) in top.chain([(name.clone(), finite(logprobs.logprob))]) {
                    // Parts of characters have one text: the most likely of them counts.
                    if by_name.iter().all(|(known, _)| *known != name) {
                        by_name.push((name, logprob));
                    }
                }
                TopLogprobs(by_name)
            });
            columns.text_offset.push(token.text_offset);
            columns.tokens.push(name);
            columns.token_logprobs.push(logprob);
            columns.top_logprobs.push(top);
        }
        (!columns.tokens.is_empty()).then_some(columns)
    }

    /// vLLM's `prompt_logprobs`, absent when the request did not ask for them.
    pub(super) fn prompt(&self, prompt: &[TokenOutput]) -> Option<PromptLogprobs> {
        let count = self.presentation.prompt_logprobs?;
        let of_token = |token: &TokenOutput| {
            let logprobs = token.logprobs.as_ref()?;
            let own = (token.token_id, logprobs.rank, logprobs.logprob);
            let top = logprobs.top.iter().take(count).enumerate();
            let top = top.map(|(before, top)| (top.token_id, before + 1, top.logprob));
            let others = top.filter(|&(token_id, ..)| token_id != token.token_id);
            let entries = [own].into_iter().chain(others).map(|(token_id, rank, logprob)| {
                (token_id, RankedToken { logprob, rank, decoded_token: self.text(token_id) })
            });
            Some(RankedTokens(entries.collect()))
        };
        Some(PromptLogprobs(prompt.iter().map(of_token).collect()))
    }

    /// The ids of `tokens`, absent when the request did not ask for them.
    pub(super) fn ids(&self, tokens: &[TokenOutput]) -> Option<Vec<u32>> {
        self.presentation.token_ids.then(|| tokens.iter().map(|token| token.token_id).collect())
    }

    /// The ids of a prompt that is there, absent when the request did not ask for them.
    pub(super) fn prompt_ids(&self, prompt: &[TokenOutput]) -> Option<Vec<u32>> {
        self.ids(prompt).filter(|ids| !ids.is_empty())
    }
}
