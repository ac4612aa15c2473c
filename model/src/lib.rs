//! Checkpoints, tokenizer, chat template, architectures and the forward pass. Knows models, not requests.

pub mod forward;
