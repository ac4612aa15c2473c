//! From rows of logits to tokens, where the logits are, so that only tokens leave the device.
//!
//! ```text
//! value[t]  = penalize(logit[t] + bias[t]) - subtrahend[t]       negative infinity for tokens that are not allowed
//! penalize(x) = x / penalty[t] where x > 0, else x * penalty[t]
//! weight[t] = exp((value[t] - largest value) / temperature)
//! ```
//!
//! Tokens are in order of their value, larger first, and of their id, lower first, among equals. At temperature 0 the
//! first token is taken. Else `min_p` keeps the tokens whose weight is at least that, `top_k` the first so many, `top_p`
//! the shortest prefix of what these keep that has this part of its weight. Of the kept tokens, now in order of their ids,
//! the first is taken at which the weights, added up, exceed `uniform` times their sum.
//!
//! Log probabilities are those of the model's own distribution, at temperature 1, whatever the row asks for:
//! `logit[t] - ln(sum of exp(logit))`.
//!
//! Shapes: `logits [rows, vocabulary]`. A row's token depends on nothing but the row. The order of penalties and filters is
//! that of vLLM.

pub mod cases;
pub mod cuda;
pub mod reference;

use super::holds;
use crate::backend::Length;
use crate::error::KernelError;

/// Most tokens whose log probabilities a row can ask for.
pub const MOST_TOP: usize = 32;

/// Arguments of [`Sample::sample`].
pub struct Args<'a, Buffer> {
    /// `[rows, vocabulary]`.
    pub logits: &'a Buffer,
    /// Logits of a row.
    pub vocabulary: usize,
    /// What is wanted of each row, in their order.
    pub rows: &'a [Row],
}

/// What is wanted of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// A token, or what is known of one.
    pub wanted: Wanted,
    /// How many of the most likely tokens come with their log probabilities, besides the row's own token, at most
    /// [`MOST_TOP`]; none at all without.
    pub logprobs: Option<usize>,
}

/// A token, or what is known of one.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// A token is to be chosen.
    Choice(Choice),
    /// This token is known; its log probability is wanted.
    Known(u32),
}

/// How a token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// 0: the most likely token.
    pub temperature: f32,
    /// How many tokens are kept; all if absent.
    pub top_k: Option<usize>,
    /// Part of the weight that is kept, in `(0, 1]`.
    pub top_p: f32,
    /// Least weight of a kept token, in `[0, 1]`.
    pub min_p: f32,
    /// In `[0, 1)`.
    pub uniform: f64,
    /// Logits that are changed, in the order of their tokens, each token once.
    pub adjustments: Vec<Adjustment>,
    /// Bit `t % 32` of word `t / 32` says whether token `t` is allowed; all are if absent. One word for each 32 tokens of
    /// the vocabulary, or part of them.
    pub allowed: Option<Vec<u32>>,
}

/// A change of one logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adjustment {
    /// Which.
    pub token_id: u32,
    /// Added first; negative infinity forbids the token.
    pub bias: f32,
    /// Then divides what is above 0 and multiplies what is not; 1 changes nothing.
    pub penalty: f32,
    /// Subtracted last.
    pub subtrahend: f32,
}

/// The token of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token that was chosen, or that was known.
    pub token_id: u32,
    /// If the row asked for them.
    pub logprobs: Option<Logprobs>,
}

/// Log probabilities of a row's token and of the most likely ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token's own.
    pub logprob: f32,
    /// Its place in the order of tokens, from 1.
    pub rank: usize,
    /// The most likely tokens, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why a row has no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoToken {
    /// A logit that matters is not a number, or the largest is infinite.
    NotFinite,
    /// No token is left by masks and adjustments.
    NothingLeft,
}

impl<Buffer: Length> Args<'_, Buffer> {
    /// Checks the buffer and what the rows ask for.
    ///
    /// # Errors
    /// Names the argument that is wrong.
    pub fn check(&self) -> Result<(), KernelError> {
        const NAME: &str = "sample";
        holds(NAME, "logits", self.logits, self.rows.len() * self.vocabulary)?;
        let is_token = |token: u32| (token as usize) < self.vocabulary;
        for row in self.rows {
            let top = row.logprobs.unwrap_or(0);
            KernelError::require(
                top <= MOST_TOP.min(self.vocabulary),
                NAME,
                "logprobs",
                top,
                "must be at most 32",
            )?;
            match &row.wanted {
                Wanted::Known(token) => {
                    KernelError::require(
                        is_token(*token),
                        NAME,
                        "token",
                        token,
                        "must be in the vocabulary",
                    )?;
                }
                Wanted::Choice(choice) => {
                    if let Some(allowed) = &choice.allowed {
                        KernelError::check(NAME, "allowed", allowed.len(), self.vocabulary.div_ceil(32))?;
                    }
                    let changes = &choice.adjustments;
                    let in_order = changes.is_sorted_by(|a, b| a.token_id < b.token_id);
                    let fit = changes.last().is_none_or(|last| is_token(last.token_id));
                    let requirement = "must be in order and in the vocabulary";
                    KernelError::require(in_order && fit, NAME, "adjustments", changes.len(), requirement)?;
                }
            }
        }
        Ok(())
    }
}

/// The operation of this module, for devices that have it.
pub trait Sample<Buffer> {
    /// Waits for the logits and does what each row asks for.
    ///
    /// # Errors
    /// When [`Args::check`] fails, or the device does.
    fn sample(&self, args: Args<'_, Buffer>) -> Result<Vec<Result<Sampled, NoToken>>, KernelError>;
}
