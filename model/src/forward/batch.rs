//! The input and the output of one step of the forward pass, on the host.

/// Rows of one sequence in a [`Batch`]: consecutive tokens at consecutive positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    /// The first row of the batch that belongs to this sequence.
    pub first_row: usize,
    /// How many rows follow, at least 1.
    pub rows: usize,
    /// Position of the first row's token in its sequence, from 0.
    pub first_position: usize,
    /// KV blocks of the sequence in order of position, [`BLOCK_SIZE`] tokens each; must cover every
    /// position up to the last row's.
    pub block_table: Vec<u32>,
}

/// Tokens a KV block holds.
pub const BLOCK_SIZE: usize = nibble_kernels::ops::paged_attention::BLOCK_SIZE;

/// One step: tokens of several sequences, prefill chunks and decode steps alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token of each row.
    pub token_ids: Vec<u32>,
    /// Position of each row's token in its sequence.
    pub positions: Vec<u32>,
    /// The sequences, covering all rows in order without gaps.
    pub sequences: Vec<SequenceRows>,
    /// Rows whose logits are wanted, in the order they are returned.
    pub logit_rows: Vec<usize>,
    /// Rows whose hidden states behind the final norm are wanted, in the order they are returned.
    pub hidden_rows: Vec<usize>,
}

impl Batch {
    /// A batch of one sequence's rows that asks for the logits of every row.
    pub fn single(token_ids: &[u32], first_position: usize, block_table: Vec<u32>) -> Self {
        let rows = token_ids.len();
        Self {
            token_ids: token_ids.to_vec(),
            positions: (first_position..first_position + rows).map(|position| position as u32).collect(),
            sequences: vec![SequenceRows { first_row: 0, rows, first_position, block_table }],
            logit_rows: (0..rows).collect(),
            hidden_rows: Vec::new(),
        }
    }
}

/// Logits on the host, row-major `[rows, vocabulary]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    /// Number of rows: one for each of [`Batch::logit_rows`].
    pub rows: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// The values, row after row.
    pub values: Vec<f32>,
}

impl Logits {
    /// The logits of row `row`.
    ///
    /// # Panics
    /// When `row` is not below [`Logits::rows`].
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocabulary..(row + 1) * self.vocabulary]
    }
}
