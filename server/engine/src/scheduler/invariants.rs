//! What must hold after every call of the scheduler; checked in tests and in the simulation.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::plan::PlannedRows;
use super::{Scheduler, StepPlan};
use crate::blocks::{BlockId, Parent};
use crate::sequence::SequenceState;

/// Checks everything that can be seen between two calls.
///
/// # Panics
/// With the invariant that does not hold.
pub(super) fn check(scheduler: &Scheduler) {
    check_blocks(scheduler);
    check_names(scheduler);
    let Scheduler { config, running, waiting, in_flight, pool, .. } = scheduler;
    let block_size = pool.block_size();
    let mut lines = BTreeMap::new();
    for sequence in running.iter().chain(waiting.lines().flatten()) {
        let line = (sequence.priority, Arc::clone(&sequence.tenant));
        let before = lines.insert(line, sequence.id);
        assert!(
            before.is_none_or(|before| before < sequence.id),
            "of one tenant and priority, running sequences and then waiting ones are in the order of arrival"
        );
    }
    assert!(
        in_flight.is_some() || running.is_sorted_by_key(|sequence| sequence.priority),
        "those who must make way come last"
    );
    assert!(running.len() <= config.max_running_sequences, "no more run than may");
    assert!(running.len() <= config.max_step_tokens, "every running sequence can have a token in a step");
    for sequence in running {
        match sequence.state {
            SequenceState::Running => {}
            SequenceState::Ending { after } => {
                assert_eq!(Some(after), *in_flight, "a sequence ends with the step in flight");
            }
            state => panic!("{:?} runs in state {state:?}", sequence.id),
        }
        let (tokens, places) = (sequence.tokens().len(), sequence.blocks.len() * block_size);
        assert!(sequence.remaining() > 0, "a running sequence has something to compute");
        assert!(sequence.computed <= places, "computed tokens have their place");
        let drafted = sequence.draft_tokens();
        assert!(drafted == 0 || in_flight.is_some(), "a draft is gone with its step");
        assert!(places < tokens + drafted + block_size, "no block is held before it is needed");
        assert!(sequence.times.started.is_some(), "a running sequence has started");
    }
    let waiting = || waiting.lines().flatten();
    for sequence in waiting() {
        assert_eq!(sequence.state, SequenceState::Waiting, "of {:?} in the queue", sequence.id);
        assert!(sequence.blocks.is_empty() && sequence.computed == 0, "a waiting sequence holds nothing");
    }
    assert_eq!(scheduler.waiting.len(), waiting().count(), "every waiting sequence stands in a line");
}

fn check_blocks(scheduler: &Scheduler) {
    let pool = &scheduler.pool;
    let mut holders = vec![0; pool.total()];
    for block in scheduler.running.iter().flat_map(|sequence| &sequence.blocks) {
        holders[block.0 as usize] += 1;
    }
    let mut unheld = vec![0; pool.total()];
    let (free, idle) = pool.unheld();
    for &block in free {
        unheld[block.0 as usize] += 1;
        assert!(!pool.tree().is_named(block), "a free block has no name");
    }
    for block in idle {
        unheld[block.0 as usize] += 1;
        assert!(pool.tree().is_named(block), "an idle block has a name");
    }
    for block in (0..pool.total() as u32).map(BlockId) {
        let (holders, unheld) = (holders[block.0 as usize], unheld[block.0 as usize]);
        assert_eq!(pool.holders(block), holders, "{block:?} counts its holders");
        assert_eq!(unheld, u32::from(holders == 0), "{block:?} is held or not, and then once");
        assert!(holders <= 1 || pool.tree().is_named(block), "{block:?} is shared only under its name");
    }
}

fn check_names(scheduler: &Scheduler) {
    let (pool, block_size) = (&scheduler.pool, scheduler.pool.block_size());
    for sequence in &scheduler.running {
        let named = &sequence.blocks[..sequence.named_blocks];
        assert!(named.len() * block_size <= sequence.computed, "named blocks are computed");
        let mut parent = Parent::Root(sequence.cache_salt().cloned());
        for (&block, tokens) in named.iter().zip(sequence.tokens().chunks_exact(block_size)) {
            assert_eq!(pool.tree().child(&parent, tokens), Some(block), "a name leads to its block");
            parent = Parent::Block(block);
        }
        let unnamed = &sequence.blocks[sequence.named_blocks..];
        assert!(unnamed.iter().all(|&block| !pool.tree().is_named(block)), "others have no name");
    }
}

/// Checks a cache that has just been reset.
///
/// # Panics
/// When a block has a name that nobody holds.
pub(super) fn check_forgotten(scheduler: &Scheduler) {
    let pool = &scheduler.pool;
    let (free, mut idle) = pool.unheld();
    assert!(idle.next().is_none(), "no block is kept for later");
    let held = (0..pool.total() as u32).filter(|&block| pool.holders(BlockId(block)) > 0).count();
    assert_eq!(free.len() + held, pool.total(), "every block is held or free");
}

/// Checks a plan that has just been made.
///
/// # Panics
/// With the invariant that does not hold.
pub(super) fn check_plan(scheduler: &Scheduler, plan: &StepPlan) {
    let Scheduler { config, running, in_flight, pool, .. } = scheduler;
    let (batch, block_size) = (&plan.batch, pool.block_size());
    assert_eq!(Some(plan.step), *in_flight, "the plan is in flight");
    assert!(batch.token_ids.len() <= config.max_step_tokens, "the plan is within the budget");
    assert!(plan.entries.iter().any(|planned| planned.running == 0), "the first sequence gets on");
    assert_eq!(plan.entries.len(), batch.sequences.len(), "one entry for each sequence of the batch");
    let mut planned_times = vec![0; running.len()];
    let (mut next_row, mut logit_rows, mut hidden_rows) = (0, Vec::new(), Vec::new());
    for (planned, rows) in plan.entries.iter().zip(&batch.sequences) {
        let sequence = &running[planned.running];
        planned_times[planned.running] += 1;
        assert_eq!((rows.first_row, rows.rows), (next_row, planned.tokens), "rows follow without gaps");
        next_row += rows.rows;
        assert_eq!(rows.first_position, sequence.computed, "it goes on where it stands");
        let end = rows.first_position + rows.rows;
        let known_end = end - planned.draft_tokens;
        assert!(
            known_end > rows.first_position && known_end <= sequence.tokens().len(),
            "known tokens come first"
        );
        let chunk = known_end - rows.first_position;
        assert!(chunk <= config.max_prefill_chunk_tokens, "chunks are no larger than they may be");
        assert!(planned.draft_tokens <= config.max_draft_tokens, "drafts are no longer than they may be");
        assert!(planned.draft_tokens == 0 || planned.samples, "a draft follows the last known token");
        let tokens = sequence.tokens_and_draft();
        assert_eq!(batch.token_ids[rows.first_row..next_row], tokens[rows.first_position..end]);
        assert!(
            batch.positions[rows.first_row..next_row]
                .iter()
                .map(|&at| at as usize)
                .eq(rows.first_position..end)
        );
        assert!(rows.block_table.iter().copied().eq(sequence.blocks.iter().map(|block| block.0)));
        assert!(end <= rows.block_table.len() * block_size, "every token has its place");
        let written = &sequence.blocks[rows.first_position / block_size..end.div_ceil(block_size)];
        assert!(written.iter().all(|&block| pool.holders(block) == 1), "no shared block is written to");
        let is_last = known_end == sequence.tokens().len();
        assert_eq!(planned.samples, is_last && !sequence.embeds(), "the last known token is sampled from");
        hidden_rows.extend(next_row - planned.hidden..next_row);
        logit_rows.extend(next_row - planned.logits..next_row);
        if sequence.sampling.prompt_logprobs.is_none() {
            assert_eq!(planned.scored(), 0, "logits of a prompt are computed for who asks");
        }
    }
    assert_eq!(next_row, batch.token_ids.len(), "sequences cover all rows");
    assert_eq!(next_row, batch.positions.len(), "every row has a position");
    assert_eq!(logit_rows, batch.logit_rows, "logits are wanted of the last rows of each entry");
    assert_eq!(hidden_rows, batch.hidden_rows, "hidden states as well");
    let scored: usize = plan.entries.iter().map(PlannedRows::scored).sum();
    assert!(scored <= config.max_prompt_logit_rows, "logits of prompts are within their budget");
    for (sequence, times) in running.iter().zip(planned_times) {
        assert!(times <= 1, "a sequence is planned once");
        assert!(times == 1 || sequence.remaining() > 1, "a decoding sequence is in every step");
    }
}
