//! Attention of query rows over a paged KV cache, prefill and decode alike.

/// Tokens a KV block holds.
pub const BLOCK_SIZE: usize = 16;
