//! From a row of logits to a token, on the host.

mod parameters;

pub(crate) use parameters::in_vocabulary;
pub use parameters::{InvalidParameter, SamplingParameters, TokenLogprob, TokenLogprobs};
