//! A [`Batch`] on the device.

use nibble_kernels::KernelError;
use nibble_kernels::backend::{Backend, Length};
use nibble_kernels::ops::paged_attention::{BLOCK_SIZE, SEQUENCE_WORDS};

use super::batch::{Batch, SequenceRows};
use super::{BatchError, ModelError};

/// Limits that every batch is checked against before it reaches a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimits {
    pub(crate) vocabulary: usize,
    pub(crate) positions: usize,
    pub(crate) blocks: usize,
}

/// The indices of a step in device memory; grown when a larger step comes.
pub(crate) struct Step<B: Backend> {
    pub(crate) token_ids: B::Indices,
    pub(crate) positions: B::Indices,
    pub(crate) slots: B::Indices,
    pub(crate) sequences: B::Indices,
    pub(crate) block_tables: B::Indices,
    pub(crate) rows: usize,
    pub(crate) sequence_count: usize,
    /// Keys of the longest sequence, and most rows of one.
    pub(crate) longest: usize,
    pub(crate) longest_rows: usize,
}

impl<B: Backend> Step<B> {
    pub(crate) fn new(backend: &B) -> Result<Self, KernelError> {
        let empty = || backend.indices(0);
        Ok(Self {
            token_ids: empty()?,
            positions: empty()?,
            slots: empty()?,
            sequences: empty()?,
            block_tables: empty()?,
            rows: 0,
            sequence_count: 0,
            longest: 0,
            longest_rows: 0,
        })
    }

    /// Checks `batch` and copies it to the device.
    pub(crate) fn set(&mut self, backend: &B, batch: &Batch, limits: BatchLimits) -> Result<(), ModelError> {
        check(batch, limits)?;
        let mut slots = Vec::with_capacity(batch.token_ids.len());
        let mut sequences = Vec::with_capacity(batch.sequences.len() * SEQUENCE_WORDS);
        let mut block_tables = Vec::new();
        for sequence in &batch.sequences {
            let words = [sequence.first_row, sequence.rows, sequence.first_position, block_tables.len()];
            sequences.extend(words.map(|word| word as u32));
            block_tables.extend_from_slice(&sequence.block_table);
            slots.extend((sequence.first_position..sequence.first_position + sequence.rows).map(
                |position| {
                    sequence.block_table[position / BLOCK_SIZE] * BLOCK_SIZE as u32
                        + (position % BLOCK_SIZE) as u32
                },
            ));
        }
        put(backend, &mut self.token_ids, &batch.token_ids)?;
        put(backend, &mut self.positions, &batch.positions)?;
        put(backend, &mut self.slots, &slots)?;
        put(backend, &mut self.sequences, &sequences)?;
        put(backend, &mut self.block_tables, &block_tables)?;
        self.rows = batch.token_ids.len();
        self.sequence_count = batch.sequences.len();
        let largest = |of: fn(&SequenceRows) -> usize| batch.sequences.iter().map(of).max().unwrap_or(0);
        self.longest = largest(|sequence| sequence.first_position + sequence.rows);
        self.longest_rows = largest(|sequence| sequence.rows);
        Ok(())
    }
}

fn put<B: Backend>(backend: &B, to: &mut B::Indices, values: &[u32]) -> Result<(), KernelError> {
    if to.length() < values.len() {
        *to = backend.indices(values.len().next_power_of_two())?;
    }
    backend.write_indices(values, to)
}

fn check(batch: &Batch, limits: BatchLimits) -> Result<(), BatchError> {
    let rows = batch.token_ids.len();
    let require = |holds: bool, problem: &dyn Fn() -> String| {
        if holds { Ok(()) } else { Err(BatchError { problem: problem() }) }
    };
    require(batch.positions.len() == rows, &|| {
        format!("{} positions for {rows} tokens", batch.positions.len())
    })?;
    let token = batch.token_ids.iter().find(|&&token| token as usize >= limits.vocabulary);
    require(token.is_none(), &|| format!("token {token:?} is not below {}", limits.vocabulary))?;
    let logit_row = batch.logit_rows.iter().find(|&&row| row >= rows);
    require(logit_row.is_none(), &|| format!("logits of row {logit_row:?} wanted, of {rows} rows"))?;
    let hidden_row = batch.hidden_rows.iter().find(|&&row| row >= rows);
    require(hidden_row.is_none(), &|| format!("hidden states of row {hidden_row:?} wanted, of {rows} rows"))?;
    let mut next_row = 0;
    for sequence in &batch.sequences {
        let end = sequence.first_position + sequence.rows;
        require(sequence.first_row == next_row && sequence.rows > 0, &|| {
            format!(
                "a sequence has {} rows from {}, expected from {next_row}",
                sequence.rows, sequence.first_row
            )
        })?;
        next_row += sequence.rows;
        require(next_row <= rows && end <= limits.positions, &|| {
            format!("a sequence ends at position {end} in row {next_row}, of {} and {rows}", limits.positions)
        })?;
        require(sequence.block_table.len() * BLOCK_SIZE >= end, &|| {
            format!("{} blocks for {end} tokens of a sequence", sequence.block_table.len())
        })?;
        let block = sequence.block_table.iter().find(|&&block| block as usize >= limits.blocks);
        require(block.is_none(), &|| format!("block {block:?} is not below {}", limits.blocks))?;
        let positions = &batch.positions[sequence.first_row..next_row];
        let in_order =
            positions.iter().enumerate().all(|(row, &at)| at as usize == sequence.first_position + row);
        require(in_order, &|| format!("positions of row {} on are not consecutive", sequence.first_row))?;
    }
    require(next_row == rows, &|| format!("sequences cover {next_row} of {rows} rows"))
}
