//! Rotary position embedding of queries and keys, and the write of keys and values to the paged cache.
//!
//! ```text
//! x[m, h, i]              <- x[m, h, i] * cos - x[m, h, i + half] * sin
//! x[m, h, i + half]       <- x[m, h, i + half] * cos + x[m, h, i] * sin      i < half = head_dim / 2
//! key_cache[slot(m), h]   <- rotated key,  value_cache[slot(m), h] <- value
//! ```
//!
//! with `cos = cosines[positions[m], i]` and `sin` likewise (the half-split order of Hugging Face
//! checkpoints). Shapes: `query [rows, heads, head_dim]`, `key, value [rows, kv_heads, head_dim]`, `cosines,
//! sines [positions, head_dim / 2]`, `positions, slots [rows]`; a slot is `block * BLOCK_SIZE + offset`.
//! The layout of the cache is drawn in [`super::paged_attention`].
//!
//! Refuses an odd head size and buffers that are too short. Positions and slots are the caller's to check.
//!
//! Source: Su et al., "RoFormer", 2021, section 3.2.

pub(crate) mod cases;
mod cpu;
pub mod cuda;
#[cfg(test)]
mod tests;

use super::holds;
use crate::backend::{Device, Length};
use crate::error::KernelError;

/// Arguments of [`RotaryEmbedding::rotary_embedding`].
pub struct Args<'a, Buffer, Indices, Cache> {
    /// `[rows, heads, head_dim]`, rotated in place.
    pub query: &'a mut Buffer,
    /// `[rows, kv_heads, head_dim]`, rotated in place and written to the cache.
    pub key: &'a mut Buffer,
    /// `[rows, kv_heads, head_dim]`, written to the cache.
    pub value: &'a Buffer,
    /// `[positions, head_dim / 2]`.
    pub cosines: &'a Buffer,
    /// `[positions, head_dim / 2]`.
    pub sines: &'a Buffer,
    /// Position of each row.
    pub positions: &'a Indices,
    /// Cache slot of each row, none twice.
    pub slots: &'a Indices,
    /// Keys of one layer.
    pub key_cache: &'a mut Cache,
    /// Values of one layer.
    pub value_cache: &'a mut Cache,
    /// Number of rows.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl<Buffer: Length, Indices: Length, Cache> Args<'_, Buffer, Indices, Cache> {
    /// Checks that the buffers hold the rows.
    ///
    /// # Errors
    /// Names the argument that is wrong.
    pub fn check(&self) -> Result<(), KernelError> {
        const NAME: &str = "rotary_embedding";
        let key_elements = self.rows * self.kv_heads * self.head_dim;
        KernelError::require(
            self.head_dim.is_multiple_of(2),
            NAME,
            "head_dim",
            self.head_dim,
            "must be even",
        )?;
        holds(NAME, "query", self.query, self.rows * self.heads * self.head_dim)?;
        holds(NAME, "key", self.key, key_elements)?;
        holds(NAME, "value", self.value, key_elements)?;
        holds(NAME, "positions", self.positions, self.rows)?;
        holds(NAME, "slots", self.slots, self.rows)
    }
}

/// The operation of this module.
pub trait RotaryEmbedding: Device {
    /// Rotates queries and keys and writes keys and values to the cache.
    ///
    /// # Errors
    /// When [`Args::check`] fails.
    fn rotary_embedding(
        &self,
        args: Args<'_, Self::Buffer, Self::Indices, Self::Cache>,
    ) -> Result<(), KernelError>;
}
