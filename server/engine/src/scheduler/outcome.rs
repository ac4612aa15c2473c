//! What a step's outcome means for its sequences: tokens, ends, and what is counted of both.

use std::time::Duration;

use super::plan::{Effect, EffectKind};
use crate::request::{Blame, Failure, FinishReason};
use crate::sequence::{Sequence, SequenceState};
use crate::stats::EngineStats;

/// What came of the logit rows of one sequence.
pub(super) struct Outcome<'a> {
    pub(super) next_tokens: &'a [Result<u32, Failure>],
    /// Rows for log probabilities of the prompt; those sampled from follow, if there are any.
    pub(super) scored: usize,
    /// Tokens that were computed on the guess that they are sampled, one less than rows that are sampled from.
    pub(super) draft: &'a [u32],
    /// The first row in the step.
    pub(super) first_logit_row: usize,
}

/// Where outcomes are written to.
pub(super) struct Record<'a> {
    /// When they came.
    pub(super) now: Duration,
    pub(super) counters: &'a mut EngineStats,
    pub(super) effects: &'a mut Vec<Effect>,
}

impl Record<'_> {
    /// Applies what came of the logit rows of a sequence that nobody aborted; false if its numbers were of no use.
    pub(super) fn rows(&mut self, sequence: &mut Sequence, outcome: &Outcome<'_>) -> bool {
        let (scored, sampled) = outcome.next_tokens.split_at(outcome.scored);
        if let Some(failure) = scored.iter().find_map(|next| next.as_ref().err()) {
            self.fail(sequence, failure.clone());
            return false;
        }
        if !scored.is_empty() {
            sequence.score(scored.len());
            let logit_rows = outcome.first_logit_row..outcome.first_logit_row + scored.len();
            self.tell(sequence, EffectKind::PromptLogprobs { logit_rows });
        }
        // The first row follows a known token. Each further one counts if the token sampled before it is the drafted one.
        let mut right = 0;
        for (index, next) in sampled.iter().enumerate() {
            let token_id = match next {
                Ok(token_id) => *token_id,
                Err(failure) => {
                    self.fail(sequence, failure.clone());
                    // What the request made impossible is no flaw of the numbers.
                    return failure.blame == Blame::Request;
                }
            };
            self.token(sequence, token_id, outcome.first_logit_row + scored.len() + index);
            if sequence.state == SequenceState::Ended || outcome.draft.get(index) != Some(&token_id) {
                break;
            }
            right += 1;
        }
        if !outcome.draft.is_empty() {
            sequence.confirm(outcome.draft.len(), right);
            self.counters.drafts += 1;
            self.counters.drafts_by_length[outcome.draft.len() - 1] += 1;
            self.counters.draft_tokens += outcome.draft.len() as u64;
            self.counters.accepted_draft_tokens[..right].iter_mut().for_each(|accepted| *accepted += 1);
        }
        true
    }

    /// Appends a token that was sampled from `logit_row`.
    fn token(&mut self, sequence: &mut Sequence, token_id: u32, logit_row: usize) {
        self.observe_prefill(sequence);
        if sequence.sampling.max_tokens == 0 {
            // The prompt was all that was wanted.
            self.finish(sequence, FinishReason::Length, None);
            return;
        }
        self.counters.generation_tokens += 1;
        sequence.times.last_token = Some(self.now);
        let reason = sequence.append(token_id);
        if reason != Some(FinishReason::Stop) {
            self.tell(sequence, EffectKind::Token { token_id, logit_row });
        }
        if let Some(reason) = reason {
            self.finish(sequence, reason, Some(logit_row));
        }
    }

    /// Ends a sequence that was to become an embedding; false if its numbers were of no use.
    pub(super) fn embedding(&mut self, sequence: &mut Sequence, embedding: Result<Vec<f32>, String>) -> bool {
        self.observe_prefill(sequence);
        match embedding {
            Ok(values) => {
                self.tell(sequence, EffectKind::Embedding { values });
                self.finish(sequence, FinishReason::Length, None);
                true
            }
            Err(message) => {
                self.fail(sequence, Failure::of_engine(message));
                false
            }
        }
    }

    /// Tells the end of a sequence that somebody aborted.
    pub(super) fn abort(&mut self, sequence: &Sequence) {
        self.tell_end(sequence, FinishReason::Aborted, None);
    }

    /// Ends a sequence whose last token, if it has one, was sampled from `logit_row`.
    fn finish(&mut self, sequence: &mut Sequence, reason: FinishReason, logit_row: Option<usize>) {
        sequence.state = SequenceState::Ended;
        self.tell_end(sequence, reason, logit_row);
    }

    /// Ends a sequence that cannot go on.
    fn fail(&mut self, sequence: &mut Sequence, failure: Failure) {
        sequence.state = SequenceState::Ended;
        self.counters.finished.failed += 1;
        self.counters.observe_end(sequence);
        self.tell(sequence, EffectKind::Failed(failure));
    }

    fn tell_end(&mut self, sequence: &Sequence, reason: FinishReason, logit_row: Option<usize>) {
        let finished = &mut self.counters.finished;
        match reason {
            FinishReason::Stop => finished.stop += 1,
            FinishReason::Length => finished.length += 1,
            FinishReason::Aborted => finished.aborted += 1,
        }
        self.counters.observe_end(sequence);
        let completion = sequence.completion();
        let stop_token = completion.last().copied().zip(logit_row).filter(|_| reason == FinishReason::Stop);
        let (prompt_tokens, completion_tokens) = (sequence.prompt().len(), completion.len());
        self.tell(sequence, EffectKind::Finished { reason, stop_token, prompt_tokens, completion_tokens });
    }

    /// Observes the time that the prompt took, once.
    fn observe_prefill(&mut self, sequence: &mut Sequence) {
        if sequence.times.first_token.is_none() {
            sequence.times.first_token = Some(self.now);
            let started = sequence.times.started.unwrap_or(self.now);
            self.counters.prefill_seconds.observe_between(started, self.now);
        }
    }

    fn tell(&mut self, sequence: &Sequence, kind: EffectKind) {
        self.effects.push(Effect { request: sequence.id, kind });
    }
}
