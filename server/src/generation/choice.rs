//! One sequence of a request: its tokens, and the text and the end that they make.

use std::time::Instant;

use nibble_engine::{FinishReason, RequestId, TokenLogprobs};
use nibble_model::detokenizer::Detokenizer;
use nibble_model::error::CheckpointError;
use serde_json::Value;

use super::{Delivery, Finish, TokenOutput};
use crate::metrics::Outcome;
use crate::openai::error::ApiError;
use crate::stop_strings::{Found, StopStrings};

/// One sequence and its text so far.
pub(super) struct Choice {
    /// Absent where the first choice of the prompt is run for all of them.
    pub(super) id: Option<RequestId>,
    /// Absent once the choice has ended.
    pub(super) text: Option<TextState>,
    /// Text that is certain and was not handed out yet.
    pub(super) ready: String,
    /// Tokens that were not handed out yet.
    pub(super) tokens: Vec<TokenOutput>,
    /// The prompt, if somebody wants to see its tokens, until it was handed out.
    pub(super) prompt: Vec<TokenOutput>,
    /// Tokens of it that still get their log probabilities, the last ones.
    pub(super) unscored: usize,
    /// What came before them: they are computed once, for the first choice of the prompt.
    pub(super) held: Vec<Delivery>,
    /// The embedding, once it is there.
    pub(super) embedding: Option<Vec<f32>>,
    pub(super) include_stop: bool,
    pub(super) generated_tokens: usize,
    /// Characters of all text that the detokenizer gave.
    pub(super) characters: usize,
    pub(super) last_token_at: Option<Instant>,
}

/// What turns tokens into text.
pub(super) struct TextState {
    pub(super) detokenizer: Detokenizer,
    pub(super) stop: StopStrings,
    pub(super) min_tokens: usize,
}

impl Choice {
    /// Takes a token; tells how the choice ended if that completed a stop string.
    pub(super) fn push(
        &mut self,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<Option<Finish>, CheckpointError> {
        self.tokens.push(TokenOutput { token_id, logprobs, text_offset: self.characters });
        self.generated_tokens += 1;
        let Some(state) = &mut self.text else { return Ok(None) };
        let piece = state.detokenizer.push(token_id)?;
        Ok(self.push_text(&piece))
    }

    /// Takes the token that ends the choice, which belongs to the text if the request says so; then it may complete a
    /// stop string.
    pub(super) fn push_stop(
        &mut self,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<Option<Finish>, CheckpointError> {
        self.tokens.push(TokenOutput { token_id, logprobs, text_offset: self.characters });
        let Some(state) = self.text.as_mut().filter(|_| self.include_stop) else { return Ok(None) };
        let piece = state.detokenizer.push(token_id)?;
        Ok(self.push_text(&piece))
    }

    fn push_text(&mut self, piece: &str) -> Option<Finish> {
        self.characters += piece.chars().count();
        let state = self.text.as_mut()?;
        if self.generated_tokens < state.min_tokens {
            self.ready.push_str(piece);
            return None;
        }
        match state.stop.push(piece) {
            Found::Text(text) => {
                self.ready.push_str(&text);
                None
            }
            Found::Stop(text, stop) => {
                self.ready.push_str(&text);
                Some(Finish { outcome: Outcome::Stop, stop_reason: Some(stop.into()) })
            }
        }
    }

    /// Ends the choice as the engine says, unless the last of the text holds a stop string.
    pub(super) fn end(&mut self, reason: FinishReason, stop_token: Option<u32>) -> Result<Finish, ApiError> {
        let finish = match reason {
            FinishReason::Stop => Finish { outcome: Outcome::Stop, stop_reason: stop_token.map(Value::from) },
            FinishReason::Length => Finish { outcome: Outcome::Length, stop_reason: None },
            FinishReason::Aborted => {
                let message = "the server stopped before the request was finished".to_owned();
                return Err(ApiError::Unavailable { message });
            }
        };
        let rest = match &mut self.text {
            Some(state) => state.detokenizer.finish()?,
            None => String::new(),
        };
        if let Some(stopped) = self.push_text(&rest) {
            return Ok(stopped);
        }
        let held = self.text.as_mut().map(|state| state.stop.finish()).unwrap_or_default();
        self.ready.push_str(&held);
        Ok(finish)
    }
}
