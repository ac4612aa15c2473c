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
