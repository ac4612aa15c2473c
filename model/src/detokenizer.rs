//! Token ids to text, one token at a time.
//!
//! The pieces, put together, are exactly what [`Tokenizer::decode`] makes of all tokens at once. To hold
//! that, text is kept back while a later token can still change it:
//! - A text that ends in U+FFFD: its last bytes may be the beginning of a character.
//! - A run of byte tokens (`<0xE4>`): tokenizers with byte fallback decode the run as a whole, as characters
//!   when all of it is UTF-8 and as one U+FFFD for each byte otherwise.
//!
//! What was emitted never changes. A window of tokens is decoded for each new one: those kept back and,
//! before them, the last that were emitted, because the first token of a text may be decoded differently
//! from the same token later (its leading space is dropped).

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::error::CheckpointError;
use crate::tokenizer::Tokenizer;

/// Tokens kept back after which the window is cut, so that a long run of bytes that are no characters costs
/// time linear in its length.
const LONG_WINDOW: usize = 64;
/// Tokens that stay when it is cut: more than the bytes of a character.
const SHORT_WINDOW: usize = 8;

/// Turns the tokens of one completion into text as they come.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// Tokens emitted last, then tokens kept back.
    window: Vec<u32>,
    /// How many of `window` were emitted.
    emitted_tokens: usize,
    /// The text of the emitted tokens of `window`, or less while the end of it is kept back.
    emitted: String,
}

impl Detokenizer {
    /// A detokenizer at the beginning of a text; `skip_special_tokens` leaves out tokens such as
    /// end-of-sequence marks.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, window: Vec::new(), emitted_tokens: 0, emitted: String::new() }
    }

    /// Takes the next token and returns the text that is certain now and was not returned before; often the
    /// token's own text, empty while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the token.
    pub fn push(&mut self, token_id: u32) -> Result<String, CheckpointError> {
        if self.tokenizer.leaves_out(token_id, self.skip_special_tokens) {
            return Ok(String::new());
        }
        self.window.push(token_id);
        if self.tokenizer.is_byte_token(token_id) {
            return Ok(String::new());
        }
        let text = self.decode(&self.window)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return self.keep_back(&text);
        }
        let piece = new_text(&self.emitted, &text);
        if !piece.is_empty() {
            self.window.drain(..self.emitted_tokens);
            self.emitted_tokens = self.window.len();
            self.emitted = self.decode(&self.window)?;
        }
        Ok(piece)
    }

    /// Ends the text and returns what was kept back: an incomplete character is U+FFFD. A new text begins
    /// after it.
    ///
    /// # Errors
    /// When the tokenizer cannot decode it.
    pub fn finish(&mut self) -> Result<String, CheckpointError> {
        let rest = new_text(&self.emitted, &self.decode(&self.window)?);
        self.window.clear();
        self.emitted_tokens = 0;
        self.emitted.clear();
        Ok(rest)
    }

    /// Emits all of `text` but its last character, which a later token may complete.
    fn keep_back(&mut self, text: &str) -> Result<String, CheckpointError> {
        let certain = &text[..text.len() - char::REPLACEMENT_CHARACTER.len_utf8()];
        let piece = new_text(&self.emitted, certain);
        if self.window.len() < LONG_WINDOW {
            self.emitted.push_str(&piece);
            return Ok(piece);
        }
        let (before, after) = self.window.split_at(self.window.len() - SHORT_WINDOW);
        let rest = self.decode(after)?;
        // Whatever follows, the texts of both sides can be put together: then the first is not needed.
        match rest.strip_suffix(char::REPLACEMENT_CHARACTER) {
            Some(certain_rest) if self.decode(before)? + &rest == text => {
                self.emitted = certain_rest.to_owned();
                self.window.drain(..self.window.len() - SHORT_WINDOW);
                self.emitted_tokens = 0;
            }
            _ => self.emitted.push_str(&piece),
        }
        Ok(piece)
    }

    fn decode(&self, ids: &[u32]) -> Result<String, CheckpointError> {
        self.tokenizer.decode(ids, self.skip_special_tokens)
    }
}

/// What `text` has after its beginning `emitted`.
fn new_text(emitted: &str, text: &str) -> String {
    text.strip_prefix(emitted).unwrap_or_default().to_owned()
}
