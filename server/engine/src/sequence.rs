//! One request inside the scheduler: its tokens, its KV blocks, and where it is in its life.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::blocks::{BlockId, BlockPool, Parent};
use crate::constraint::{ConstraintError, TokenConstraint, TokenMask};
use crate::pooling::Pool;
use crate::prompt_lookup::PromptLookup;
use crate::request::{FinishReason, Request, RequestId};
use crate::sampling::SamplingParameters;
use crate::scheduler::StepId;

/// Where a sequence is in its life.
///
/// ```text
/// submit -> Waiting <-> Running -> Ended
///              |           |          ^
///              |           v          |
///              |     Ending{after} ---+
///              +-- abort -------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SequenceState {
    /// In the queue, without blocks: never started, or preempted.
    Waiting,
    /// Holds blocks for every token it has computed.
    Running,
    /// Aborted while a step was in flight: the device may still write to its blocks, so it keeps them until
    /// that step completes.
    Ending {
        /// The step in flight.
        after: StepId,
    },
    /// Over. Only inside `complete`, which takes it out and frees its blocks.
    Ended,
}

/// When things happened to a sequence, since the start of the engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) submitted: Duration,
    pub(crate) started: Option<Duration>,
    pub(crate) first_token: Option<Duration>,
    pub(crate) last_token: Option<Duration>,
}

/// Tokens of a prompt that a step computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ComputedPromptTokens {
    pub(crate) first_time: usize,
    /// After a preemption.
    pub(crate) again: usize,
}

/// A request and what was computed of it.
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) priority: i32,
    pub(crate) tenant: Arc<str>,
    pub(crate) sampling: SamplingParameters,
    /// Of its random numbers.
    pub(crate) seed: u64,
    pub(crate) state: SequenceState,
    pub(crate) blocks: Vec<BlockId>,
    /// How many of `blocks`, from the first, have names in the prefix tree.
    pub(crate) named_blocks: usize,
    /// Tokens whose keys and values are in the blocks.
    pub(crate) computed: usize,
    pub(crate) times: Times,
    /// Positions of the prompt whose logits are still wanted, for the log probability of the token after each.
    unscored: Range<usize>,
    /// The hidden states of the prompt, if an embedding is wanted.
    pool: Option<Pool>,
    /// The prompt, then the completion, then a draft of what follows while a step computes it.
    tokens: Vec<u32>,
    /// Tokens of the draft.
    draft_tokens: usize,
    /// Whether the draft is what the constraint leaves, not what was looked up.
    draft_is_forced: bool,
    /// Makes drafts, for sequences that may have one.
    lookup: Option<PromptLookup>,
    prompt_tokens: usize,
    /// Prompt tokens that were in the cache at least once: what preemption computes again is not new.
    prompt_tokens_counted: usize,
    /// Of these, the tokens that were found in the prefix cache.
    prompt_tokens_found: usize,
    /// Tokens that end it, sorted.
    stop_tokens: Vec<u32>,
    constraint: Option<Box<dyn TokenConstraint>>,
    /// Whose blocks it shares.
    cache_salt: Option<Arc<str>>,
    /// What the constraint allows as the next token, and behind each token of the draft that it allows.
    allowed: Vec<Result<TokenMask, ConstraintError>>,
}

impl Sequence {
    /// A waiting sequence. `eos_token_ids` are the model's; `seed` is for a request that brings none.
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        eos_token_ids: &[u32],
        seed: u64,
        submitted: Duration,
    ) -> Self {
        let pool = Pool::new(&request);
        let Request { prompt, sampling, constraint, priority, tenant, cache_salt, .. } = request;
        // Nothing comes after the last token of the prompt that is known.
        let scored = if sampling.prompt_logprobs.is_some() { prompt.len() - 1 } else { 0 };
        let mut stop_tokens = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            stop_tokens.extend_from_slice(eos_token_ids);
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Self {
            id,
            priority,
            tenant,
            cache_salt,
            seed: sampling.seed.unwrap_or(seed),
            sampling,
            state: SequenceState::Waiting,
            blocks: Vec::new(),
            named_blocks: 0,
            computed: 0,
            times: Times { submitted, started: None, first_token: None, last_token: None },
            unscored: 0..scored,
            pool,
            prompt_tokens: prompt.len(),
            prompt_tokens_counted: 0,
            prompt_tokens_found: 0,
            tokens: prompt,
            draft_tokens: 0,
            draft_is_forced: false,
            lookup: None,
            stop_tokens,
            constraint,
            allowed: Vec::new(),
        }
    }

    /// The prompt, then the completion so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - self.draft_tokens]
    }

    /// What a step computes: the same, and then the draft.
    pub(crate) fn tokens_and_draft(&self) -> &[u32] {
        &self.tokens
    }

    /// The completion so far and the first tokens of the draft, as many as `drafted`.
    pub(crate) fn completion_with(&self, drafted: usize) -> &[u32] {
        &self.tokens[self.prompt_tokens..self.tokens().len() + drafted]
    }

    /// Tokens of the draft.
    pub(crate) fn draft_tokens(&self) -> usize {
        self.draft_tokens
    }

    /// Makes a draft of at most `most` tokens, none of them beyond the last token that the request may feed back.
    pub(crate) fn draft(&mut self, most: usize, longest: usize) {
        let to_feed_back = self.sampling.max_tokens.saturating_sub(self.completion().len() + 1);
        let most = most.min(to_feed_back);
        // Where there is no room for a draft nothing is looked up, either: a large batch never pays for it.
        if most == 0 {
            return;
        }
        let known = self.tokens.len();
        let completion = &self.tokens[self.prompt_tokens..];
        let forced = self.constraint.as_mut().map(|constraint| constraint.forced_after(completion));
        self.tokens.extend(forced.into_iter().flatten().take(most));
        self.draft_is_forced = self.tokens.len() > known;
        if !self.draft_is_forced {
            let lookup = self.lookup.get_or_insert_with(|| PromptLookup::new(longest));
            lookup.draft(&mut self.tokens, most);
        }
        self.draft_tokens = self.tokens.len() - known;
    }

    /// Takes the draft back; returns it. What sampling confirms of it is appended again, token by token.
    pub(crate) fn take_draft(&mut self) -> Vec<u32> {
        self.tokens.split_off(self.tokens.len() - std::mem::take(&mut self.draft_tokens))
    }

    /// Learns how many tokens of a draft were right: their keys and values are in the blocks.
    pub(crate) fn confirm(&mut self, drafted: usize, right: usize) {
        self.computed += right;
        if let Some(lookup) = self.lookup.as_mut().filter(|_| !self.draft_is_forced) {
            lookup.learn(drafted, right);
        }
    }

    /// The prompt.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens]
    }

    /// The completion so far.
    pub(crate) fn completion(&self) -> &[u32] {
        self.completion_with(0)
    }

    /// Whose blocks it shares.
    pub(crate) fn cache_salt(&self) -> Option<&Arc<str>> {
        self.cache_salt.as_ref()
    }

    /// Tokens that end it, sorted.
    pub(crate) fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Whether a constraint restricts its tokens.
    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Asks the constraint what may follow the completion so far, and along the draft.
    pub(crate) fn constrain(&mut self) {
        if let Some(constraint) = &mut self.constraint {
            let (known, draft) = self.tokens.split_at(self.tokens.len() - self.draft_tokens);
            self.allowed = constraint.allowed_along(&known[self.prompt_tokens..], draft);
        }
    }

    /// What the constraint allows after the first `drafted` tokens of the draft, as of the last [`Sequence::constrain`];
    /// `None` without a constraint. Behind a token that it does not allow, anything: the draft ends before that.
    pub(crate) fn allowed(&self, drafted: usize) -> Option<&Result<TokenMask, ConstraintError>> {
        self.allowed.get(drafted).or(self.allowed.last())
    }

    /// Known tokens that must be computed before the next one can be sampled: 1 while decoding, more for a
    /// prompt, or for what a preemption threw away. Never 0 between steps.
    pub(crate) fn remaining(&self) -> usize {
        self.tokens().len() - self.computed
    }

    /// Tokens that its place in the cache must hold at the end of its life: the last token is never fed back.
    pub(crate) fn maximum_cached_tokens(&self) -> usize {
        self.prompt_tokens + self.sampling.max_tokens.saturating_sub(1)
    }

    /// Whether a step that computes its next `tokens` tokens can sample one more.
    pub(crate) fn samples_after(&self, tokens: usize) -> bool {
        tokens == self.remaining() && !self.embeds()
    }

    /// Whether an embedding is made of its prompt, and nothing generated.
    pub(crate) fn embeds(&self) -> bool {
        self.pool.is_some()
    }

    /// Of its next `tokens` tokens to compute, those whose hidden states are wanted: the last ones.
    pub(crate) fn pooled_within(&self, tokens: usize) -> usize {
        let Some(pool) = &self.pool else { return 0 };
        (self.computed + tokens).saturating_sub(pool.wanted_from().max(self.computed))
    }

    /// Takes the hidden states of the next `tokens` tokens of the prompt; the embedding if these were the last.
    pub(crate) fn pool(&mut self, tokens: usize, hidden_states: &[f32]) -> Option<Result<Vec<f32>, String>> {
        let pool = self.pool.as_mut()?;
        pool.add(tokens, hidden_states);
        (pool.wanted_from() == self.prompt_tokens).then(|| pool.finish())
    }

    /// Of its next `tokens` tokens to compute, those whose logits are wanted for log probabilities of the prompt:
    /// the last ones, but for one that is sampled from.
    pub(crate) fn scored_within(&self, tokens: usize) -> usize {
        let Range { start, end } = self.unscored;
        end.min(self.computed + tokens).saturating_sub(start.max(self.computed))
    }

    /// The most tokens to compute next, of which at most `logit_rows` need logits for the prompt.
    pub(crate) fn computable_within(&self, logit_rows: usize) -> usize {
        if self.unscored.len() <= logit_rows {
            return self.remaining();
        }
        self.unscored.start.max(self.computed) + logit_rows - self.computed
    }

    /// Records that the next `rows` tokens of the prompt got log probabilities.
    pub(crate) fn score(&mut self, rows: usize) {
        self.unscored.start += rows;
    }

    /// Whether it can use keys and values that are in the cache: tokens whose logits or hidden states are wanted must be
    /// computed; those of the last token always are.
    pub(crate) fn reads_cache(&self) -> bool {
        let pooled = self.pool.as_ref().is_none_or(|pool| pool.wanted_from() + 1 >= self.prompt_tokens);
        self.unscored.is_empty() && pooled
    }

    /// Records that `tokens` more tokens were computed.
    pub(crate) fn advance(&mut self, tokens: usize) -> ComputedPromptTokens {
        let before = self.computed.min(self.prompt_tokens);
        self.computed += tokens;
        let computed = self.computed.min(self.prompt_tokens) - before;
        let first_time = self.count_prompt_tokens();
        ComputedPromptTokens { first_time, again: computed - first_time }
    }

    /// Counts the tokens of the prompt that are in the cache for the first time.
    fn count_prompt_tokens(&mut self) -> usize {
        let reached = self.computed.min(self.prompt_tokens).max(self.prompt_tokens_counted);
        reached - std::mem::replace(&mut self.prompt_tokens_counted, reached)
    }

    /// Tokens of the prompt that were computed, each counted once: the others were found in the prefix cache.
    pub(crate) fn computed_prompt_tokens(&self) -> usize {
        self.prompt_tokens_counted - self.prompt_tokens_found
    }

    /// Appends a sampled token; says why the sequence ends with it, if it does.
    pub(crate) fn append(&mut self, token_id: u32) -> Option<FinishReason> {
        self.tokens.push(token_id);
        if self.stop_tokens.binary_search(&token_id).is_ok() {
            Some(FinishReason::Stop)
        } else if self.completion().len() >= self.sampling.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Takes blocks for every known token: `cached` ones for the first, new ones for the rest. Returns how many
    /// tokens of the prompt are in the cache for the first time.
    pub(crate) fn occupy(&mut self, cached: &[BlockId], pool: &mut BlockPool) -> usize {
        // First those, so that none of them is evicted for a new one.
        cached.iter().for_each(|&block| pool.share(block));
        self.blocks.extend_from_slice(cached);
        self.named_blocks = cached.len();
        self.computed = cached.len() * pool.block_size();
        let blocks = self.tokens.len().div_ceil(pool.block_size());
        self.blocks.extend((cached.len()..blocks).map_while(|_| pool.allocate()));
        let found = self.count_prompt_tokens();
        self.prompt_tokens_found += found;
        found
    }

    /// Offers the blocks that have become full to later sequences.
    pub(crate) fn name_full_blocks(&mut self, pool: &mut BlockPool) {
        let block_size = pool.block_size();
        while (self.named_blocks + 1) * block_size <= self.computed {
            let index = self.named_blocks;
            let parent = match index.checked_sub(1) {
                Some(before) => Parent::Block(self.blocks[before]),
                None => Parent::Root(self.cache_salt.clone()),
            };
            let tokens = &self.tokens[index * block_size..(index + 1) * block_size];
            self.blocks[index] = pool.name(parent, tokens, self.blocks[index]);
            self.named_blocks += 1;
        }
    }

    /// Lets go of the blocks that a draft was given and that no known token needs.
    pub(crate) fn release_unused(&mut self, pool: &mut BlockPool) {
        let needed = self.tokens.len().div_ceil(pool.block_size());
        if needed < self.blocks.len() {
            pool.release(&mut self.blocks.split_off(needed));
        }
    }

    /// Lets go of the blocks; the tokens stay.
    pub(crate) fn release(&mut self, pool: &mut BlockPool) {
        pool.release(&mut self.blocks);
        self.named_blocks = 0;
        self.computed = 0;
    }
}
