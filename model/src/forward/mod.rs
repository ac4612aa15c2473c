//! The forward pass, written once over the `Backend` trait.

mod batch;

pub use batch::{BLOCK_SIZE, Batch, Logits, SequenceRows};
