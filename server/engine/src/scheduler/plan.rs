//! What the scheduler hands out and takes back: plans of steps, their outcome, and effects.

use std::ops::Range;
use std::time::Duration;

use nibble_model::forward::{Batch, SequenceRows};

use crate::request::{Failure, FinishReason, RequestId};
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
    /// Of these, the last ones whose logits are wanted.
    pub(crate) logits: usize,
    /// Of these, the last ones whose hidden states are wanted.
    pub(crate) hidden: usize,
    /// Whether the step computes its last known token, so that the next one can be sampled: from the first of its logits
    /// behind the [`scored`](Self::scored) ones.
    pub(crate) samples: bool,
    /// Tokens of a draft behind the last known one, of those that the step computes. After each one that is right another
    /// token can be sampled.
    pub(crate) draft_tokens: usize,
}

impl PlannedRows {
    /// Rows whose logits tell the log probability of the token that follows in the prompt: all that have logits, but
    /// those sampled from.
    pub(crate) fn scored(&self) -> usize {
        self.logits - usize::from(self.samples) - self.draft_tokens
    }
}

/// One step. It goes to whoever runs it and comes back in a [`StepOutput`], so that its buffers serve the
/// next step.
#[derive(Debug, Default)]
pub(crate) struct StepPlan {
    pub(crate) step: StepId,
    /// What the runner computes. Its logit rows are the last [`PlannedRows::logits`] of each entry, in order.
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
        self.batch.hidden_rows.clear();
        self.spare_tables.extend(self.batch.sequences.drain(..).map(|rows| rows.block_table));
    }

    /// Adds the next `tokens` tokens of `sequence`, and its draft behind its last one; it has blocks for them.
    pub(super) fn push(&mut self, running: usize, sequence: &Sequence, tokens: usize) {
        let batch = &mut self.batch;
        let first_row = batch.token_ids.len();
        let first_position = sequence.computed;
        let samples = sequence.samples_after(tokens);
        let draft_tokens = if samples { sequence.draft_tokens() } else { 0 };
        let logits = sequence.scored_within(tokens) + usize::from(samples) + draft_tokens;
        let tokens = tokens + draft_tokens;
        let end = first_position + tokens;
        batch.token_ids.extend_from_slice(&sequence.tokens_and_draft()[first_position..end]);
        batch.positions.extend(first_position as u32..end as u32);
        batch.logit_rows.extend(first_row + tokens - logits..first_row + tokens);
        let hidden = sequence.pooled_within(tokens);
        batch.hidden_rows.extend(first_row + tokens - hidden..first_row + tokens);
        let mut block_table = self.spare_tables.pop().unwrap_or_default();
        block_table.clear();
        block_table.extend(sequence.blocks.iter().map(|block| block.0));
        batch.sequences.push(SequenceRows { first_row, rows: tokens, first_position, block_table });
        self.entries.push(PlannedRows { running, tokens, logits, hidden, samples, draft_tokens });
    }
}

/// What came of a step.
pub(crate) struct StepOutput {
    /// The plan that was run.
    pub(crate) plan: StepPlan,
    /// For each of the plan's logit rows, in order: the token that follows it, sampled or known from the prompt,
    /// or why its logits are of no use. Behind a draft, as if all of it were right.
    pub(crate) next_tokens: Vec<Result<u32, Failure>>,
    /// The hidden states of the batch's hidden rows, one after the other.
    pub(crate) hidden_states: Vec<f32>,
    /// When the step completed, since the start of the engine.
    pub(crate) completed_at: Duration,
}

/// Something to tell the owner of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Effect {
    pub(crate) request: RequestId,
    pub(crate) kind: EffectKind,
}

/// What to tell.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum EffectKind {
    /// The next tokens of the prompt have log probabilities, those of these logit rows of the step.
    PromptLogprobs { logit_rows: Range<usize> },
    /// The embedding of the prompt.
    Embedding { values: Vec<f32> },
    /// The next token, sampled from logit row `logit_row` of the step.
    Token { token_id: u32, logit_row: usize },
    /// The request ended; nothing follows. A stop token comes with the logit row that it was sampled from.
    Finished {
        reason: FinishReason,
        stop_token: Option<(u32, usize)>,
        prompt_tokens: usize,
        completion_tokens: usize,
    },
    /// The request cannot go on; nothing follows.
    Failed(Failure),
}
