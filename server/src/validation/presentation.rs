//! The fields that say what of an answer is shown.

use nibble_engine::SamplingParameters;

use super::sampling::prompt_logprobs;
use crate::openai::error::ApiError;
use crate::openai::types::sampling::GenerationFields;

/// What of an answer is shown beside its text.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Presentation {
    /// This many log probabilities in the place of each token of the completion, and of the prompt with `echo`.
    pub(crate) logprobs: Option<usize>,
    /// The prompt is a part of the answer.
    pub(crate) echo: bool,
    /// This many log probabilities in the place of each token of the prompt.
    pub(crate) prompt_logprobs: Option<usize>,
    /// The ids of all tokens.
    pub(crate) token_ids: bool,
    /// Tokens in log probabilities go by their ids.
    pub(crate) tokens_as_ids: bool,
    /// What the model thinks.
    pub(crate) reasoning: bool,
}

impl Presentation {
    /// What the fields want to see, and what the engine must compute for it.
    pub(super) fn new(
        fields: &GenerationFields,
        echo: bool,
        sampling: &mut SamplingParameters,
        vocabulary_size: usize,
    ) -> Result<Self, ApiError> {
        let prompt_logprobs = prompt_logprobs(fields, vocabulary_size)?;
        sampling.prompt_logprobs = prompt_logprobs.max(sampling.logprobs.filter(|_| echo));
        Ok(Self {
            logprobs: sampling.logprobs,
            echo,
            prompt_logprobs,
            token_ids: fields.return_token_ids,
            tokens_as_ids: fields.return_tokens_as_token_ids,
            reasoning: true,
        })
    }

    /// Whether anything of the prompt's tokens is shown.
    pub(crate) fn shows_prompt(&self) -> bool {
        self.token_ids || self.prompt_logprobs.is_some() || (self.echo && self.logprobs.is_some())
    }
}
