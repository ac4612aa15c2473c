//! Causal attention of query rows over a paged KV cache, prefill and decode alike.
//!
//! ```text
//! s[m, j] = query[m, h] . key[j, h'] / sqrt(head_dim)         j <= position(m), and within the window
//! output[m, h] = sum over j of softmax_j(s[m, j]) * value[j, h']       h' = h / (heads / kv_heads)
//! ```
//!
//! Shapes: `query, output [rows, heads, head_dim]`; the cache of a layer, in blocks of 16 tokens:
//!
//! ```text
//! key_cache   [block][kv_head][head_dim][16]     one vector load gives one element of 16 keys
//! value_cache [block][kv_head][16][head_dim]
//! ```
//!
//! (On AMX the CPU's blocks hold pairs instead, for its tiles: `device/cpu/cache.rs`.)
//!
//! `sequences [sequences, 4]` holds first row, rows, first position and the start of the sequence's entries
//! in `block_tables`, for sequences whose rows lie one after the other.
//!
//! Reduction order: online softmax (running maximum and sum) over blocks in order of position, on the CPU over segments
//! of blocks that are merged in order; within a block in order of position. It depends on the key's position alone, so a row has the same bits in a
//! whole prompt, in chunks, in a decode step, alone and in a batch.
//!
//! Refuses a head size that is not a multiple of 16 or above 256, heads that the KV heads do not divide,
//! more than 48 query heads for a KV head, and buffers that are too short. Table entries are the caller's.
//!
//! Source: Dao, "FlashAttention-2", 2023, algorithm 1 (forward); Kwon et al., "PagedAttention", 2023.

pub(crate) mod cases;
mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

pub(crate) use cpu::AttentionScratch;

use super::holds;
use crate::backend::{Device, Length};
use crate::error::KernelError;

/// Tokens a KV block holds.
pub const BLOCK_SIZE: usize = 16;

/// Words of a sequence in [`Args::sequences`].
pub const SEQUENCE_WORDS: usize = 4;

/// Largest head size.
pub const MAX_HEAD_DIM: usize = 256;

/// Most query heads that share a KV head.
pub const MAX_HEADS_PER_KV_HEAD: usize = 48;

/// Elements of the key cache (and of the value cache) of one layer.
pub const fn cache_elements(blocks: usize, kv_heads: usize, head_dim: usize) -> usize {
    blocks * kv_heads * head_dim * BLOCK_SIZE
}

/// Where the keys of `block` and `head` start: element `d` of token `t` lies `d * BLOCK_SIZE + t` further.
pub const fn key_offset(block: usize, head: usize, kv_heads: usize, head_dim: usize) -> usize {
    (block * kv_heads + head) * head_dim * BLOCK_SIZE
}

/// Where the values of `block` and `head` start: element `d` of token `t` lies `t * head_dim + d` further.
pub const fn value_offset(block: usize, head: usize, kv_heads: usize, head_dim: usize) -> usize {
    key_offset(block, head, kv_heads, head_dim)
}

/// Arguments of [`PagedAttention::paged_attention`].
pub struct Args<'a, Buffer, Indices, Cache> {
    /// `[rows, heads, head_dim]`, rotated.
    pub query: &'a Buffer,
    /// Keys of one layer.
    pub key_cache: &'a Cache,
    /// Values of one layer.
    pub value_cache: &'a Cache,
    /// `[sequences, 4]`: first row, rows, first position, start in `block_tables`.
    pub sequences: &'a Indices,
    /// Block numbers of every sequence, in order of position.
    pub block_tables: &'a Indices,
    /// `[rows, heads, head_dim]`.
    pub output: &'a mut Buffer,
    /// Number of sequences.
    pub sequence_count: usize,
    /// Number of rows.
    pub rows: usize,
    /// Keys of the longest sequence, those of this step included: no sequence may have more.
    pub longest: usize,
    /// Most rows of a sequence: no sequence may have more.
    pub longest_rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Keys a query sees at most, itself included; `usize::MAX` for all.
    pub window: usize,
}

impl<Buffer: Length, Indices: Length, Cache> Args<'_, Buffer, Indices, Cache> {
    /// Checks sizes.
    ///
    /// # Errors
    /// Names the argument that is wrong.
    pub fn check(&self) -> Result<(), KernelError> {
        const NAME: &str = "paged_attention";
        check_heads(self.heads, self.kv_heads, self.head_dim)?;
        let elements = self.rows * self.heads * self.head_dim;
        holds(NAME, "query", self.query, elements)?;
        holds(NAME, "output", self.output, elements)?;
        holds(NAME, "sequences", self.sequences, self.sequence_count * SEQUENCE_WORDS)?;
        let rows_fit =
            self.rows <= self.sequence_count * self.longest_rows && self.longest_rows <= self.longest;
        KernelError::require(
            rows_fit,
            NAME,
            "longest_rows",
            self.longest_rows,
            "must bound the rows of a sequence",
        )?;
        KernelError::require(self.window > 0, NAME, "window", self.window, "must be positive")
    }
}

/// Checks that attention is defined for these heads; a loader asks before it reads any weight.
///
/// # Errors
/// Names the size that is not supported.
pub fn check_heads(heads: usize, kv_heads: usize, head_dim: usize) -> Result<(), KernelError> {
    const NAME: &str = "paged_attention";
    let size_fits = head_dim > 0 && head_dim.is_multiple_of(16) && head_dim <= MAX_HEAD_DIM;
    KernelError::require(size_fits, NAME, "head_dim", head_dim, "must be a multiple of 16 up to 256")?;
    let heads_fit = kv_heads > 0 && heads.is_multiple_of(kv_heads);
    KernelError::require(heads_fit, NAME, "heads", heads, "must be a multiple of the KV heads")?;
    let shared = heads / kv_heads;
    KernelError::require(shared <= MAX_HEADS_PER_KV_HEAD, NAME, "heads", heads, "at most 48 to a KV head")
}

/// The operation of this module.
pub trait PagedAttention: Device {
    /// Attends from every query row to the cached keys of its sequence.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn paged_attention(
        &self,
        args: Args<'_, Self::Buffer, Self::Indices, Self::Cache>,
    ) -> Result<(), KernelError>;
}
