//! What the scheduler hands out and takes back: plans of steps, their outcome, and effects.

use std::time::Duration;

use nibble_model::forward::{Batch, SequenceRows};

use crate::request::{FinishReason, RequestId};
use crate::sequence::Sequence;

/// Number of a step, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StepId(pub(crate) u64);

/// Tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedRows {
    /// Index of the sequence in [`super::Scheduler::running`], valid until the step completes.
    pub(crate) running: usize,
    /// Tokens of it that the step computes, at least 1.
    pub(crate) tokens: usize,
    /// Whether the step computes its last known token, so that the next one can be sampled.
    pub(crate) samples: bool,
}

/// One step. It goes to whoever runs it and comes back in a [`StepOutput`], so that its buffers serve the
/// next step.
#[derive(Debug, Default)]
pub(crate) struct StepPlan {
    pub(crate) step: StepId,
    /// What the runner computes. Its logit rows are those of the entries that sample, in order.
    pub(crate) batch: Batch,
    /// In the order of the batch's sequences.
    pub(crate) entries: Vec<PlannedRows>,
    /// Block tables of earlier steps, kept for their memory.
    spare_tables: Vec<Vec<u32>>,
}

impl StepPlan {
    /// Forgets the rows, keeps the memory.
    pub(super) fn clear(&mut self, step: StepId) {
        self.step = step;
        self.entries.clear();
        self.batch.token_ids.clear();
        self.batch.positions.clear();
        self.batch.logit_rows.clear();
        self.spare_tables.extend(self.batch.sequences.drain(..).map(|rows| rows.block_table));
    }

    /// Adds the next `tokens` tokens of `sequence`, which has blocks for them.
    pub(super) fn push(&mut self, running: usize, sequence: &Sequence, tokens: usize) {
        let batch = &mut self.batch;
        let first_row = batch.token_ids.len();
        let first_position = sequence.computed;
        let end = first_position + tokens;
        batch.token_ids.extend_from_slice(&sequence.tokens()[first_position..end]);
        batch.positions.extend(first_position as u32..end as u32);
        let samples = tokens == sequence.remaining();
        if samples {
            batch.logit_rows.push(first_row + tokens - 1);
        }
        let mut block_table = self.spare_tables.pop().unwrap_or_default();
        block_table.clear();
        block_table.extend(sequence.blocks.iter().map(|block| block.0));
        batch.sequences.push(SequenceRows { first_row, rows: tokens, first_position, block_table });
        self.entries.push(PlannedRows { running, tokens, samples });
    }
}

/// What came of a step.
pub(crate) struct StepOutput {
    /// The plan that was run.
    pub(crate) plan: StepPlan,
    /// For each of the plan's logit rows, in order: the token that was sampled from it, or why none could be.
    pub(crate) sampled: Vec<Result<u32, String>>,
    /// When the step completed, since the start of the engine.
    pub(crate) completed_at: Duration,
}

/// Something to tell the owner of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Effect {
    pub(crate) request: RequestId,
    pub(crate) kind: EffectKind,
}

/// What to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EffectKind {
    /// The next token, sampled from logit row `logit_row` of the step.
    Token { token_id: u32, logit_row: usize },
    /// The request ended; nothing follows.
    Finished { reason: FinishReason, stop_token: Option<u32>, prompt_tokens: usize, completion_tokens: usize },
    /// The request cannot go on; nothing follows.
    Failed { message: String },
}
