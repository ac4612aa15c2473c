//! Every format of quantized weights: what other programs packed, what is written and read back, what is refused.

mod contradictions;
mod metadata;
mod support;
mod tensors;
