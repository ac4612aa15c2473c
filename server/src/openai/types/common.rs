//! What several endpoints answer with.

use serde::{Serialize, Serializer};

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// Tokens of the prompts, each prompt once.
    pub(crate) prompt_tokens: usize,
    /// Tokens generated, in all choices.
    pub(crate) completion_tokens: usize,
    /// Their sum.
    pub(crate) total_tokens: usize,
}

/// What stands for minus infinity, which JSON cannot say; as vLLM has it.
const LOWEST_LOGPROB: f32 = -9999.0;

/// Writes a log probability with the digits of a 32-bit number, not those of its 64-bit neighbour.
pub(crate) fn as_float<S: Serializer>(logprob: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f32(finite(*logprob))
}

/// `logprob`, or the lowest number that stands for minus infinity.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(LOWEST_LOGPROB)
}

/// For each token of a prompt the log probabilities in its place, as vLLM has them: null for the first one, then an
/// object of token ids, that of the token itself first.
#[derive(Debug, Serialize)]
pub(crate) struct PromptLogprobs(pub(crate) Vec<Option<RankedTokens>>);

/// Token ids and what is known of each, as an object.
#[derive(Debug)]
pub(crate) struct RankedTokens(pub(crate) Vec<(u32, RankedToken)>);

/// A token in its place.
#[derive(Debug, Serialize)]
pub(crate) struct RankedToken {
    #[serde(serialize_with = "as_float")]
    pub(crate) logprob: f32,
    /// From 1, most likely first.
    pub(crate) rank: usize,
    pub(crate) decoded_token: String,
}

impl Serialize for RankedTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token_id, token)| (token_id, token)))
    }
}
