//! The KV blocks of a runner's cache: who holds which, and what lies in those that nobody holds.
//!
//! A block is *free* (its contents are of no use), *held* by one or more sequences, or *idle*: nobody holds
//! it, but it is named in the [`PrefixTree`] and serves a later sequence with the same prefix until its place
//! is needed; then the one that has been idle longest goes. Only named blocks are shared: their tokens are
//! computed, and nobody writes to them.

mod prefix_tree;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use prefix_tree::{Parent, PrefixTree};

/// Number of one KV block, below [`crate::RunnerLimits::blocks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockId(pub(crate) u32);

/// All blocks of a cache. The same calls give the same blocks.
pub(crate) struct BlockPool {
    block_size: usize,
    /// The one freed last is taken first.
    free: Vec<BlockId>,
    /// By the number of the release that made them idle: the least recently used first. Sequences release
    /// their last block first, and hold all blocks before one that they hold, so a block is always idle
    /// for longer than the block before it.
    idle: BTreeMap<u64, BlockId>,
    releases: u64,
    /// By block.
    holders: Vec<Holders>,
    tree: PrefixTree,
}

/// Who holds a block.
#[derive(Clone, Copy, Default)]
struct Holders {
    count: u32,
    /// Its key in `idle`, if it is there.
    idle_since: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks of `block_size` tokens.
    pub(crate) fn new(blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
            free: (0..blocks as u32).rev().map(BlockId).collect(),
            idle: BTreeMap::new(),
            releases: 0,
            holders: vec![Holders::default(); blocks],
            tree: PrefixTree::new(blocks),
        }
    }

    /// Tokens in a block.
    pub(crate) fn block_size(&self) -> usize {
        self.block_size
    }

    /// All blocks.
    pub(crate) fn total(&self) -> usize {
        self.holders.len()
    }

    /// Blocks that nobody holds.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// How many sequences hold a block.
    pub(crate) fn holders(&self, block: BlockId) -> u32 {
        self.holders[block.0 as usize].count
    }

    /// Takes a block to write to, if nobody holds one: a free one, or the one that has been idle longest.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| {
            let (_, block) = self.idle.pop_first()?;
            self.tree.remove(block);
            Some(block)
        })?;
        self.holders[block.0 as usize].count = 1;
        Some(block)
    }

    /// The blocks of the longest prefix of `tokens` that is computed already under `salt`; nobody holds them for it yet.
    pub(crate) fn cached_prefix(
        &self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
    ) -> impl Iterator<Item = BlockId> {
        self.tree.prefix(salt, tokens, self.block_size)
    }

    /// Makes the caller one more holder of a named block.
    pub(crate) fn share(&mut self, block: BlockId) {
        let holders = &mut self.holders[block.0 as usize];
        if holders.count == 0 {
            self.idle.remove(&holders.idle_since);
        }
        holders.count += 1;
    }

    /// Names a block that the caller holds and that is full and computed: `tokens` after `parent`, which the
    /// caller holds too. If there is such a block already the caller gets that instead, which holds the same:
    /// keys and values depend on nothing but the tokens.
    pub(crate) fn name(&mut self, parent: Parent, tokens: &[u32], block: BlockId) -> BlockId {
        let Some(named) = self.tree.child(&parent, tokens) else {
            self.tree.insert(parent, tokens, block);
            return block;
        };
        self.share(named);
        self.release_one(block);
        named
    }

    /// Lets go of the blocks of a sequence, in the order of its tokens; leaves `blocks` empty.
    pub(crate) fn release(&mut self, blocks: &mut Vec<BlockId>) {
        for block in blocks.drain(..).rev() {
            self.release_one(block);
        }
    }

    fn release_one(&mut self, block: BlockId) {
        let holders = &mut self.holders[block.0 as usize];
        holders.count -= 1;
        if holders.count > 0 {
            return;
        }
        if self.tree.is_named(block) {
            self.releases += 1;
            holders.idle_since = self.releases;
            self.idle.insert(self.releases, block);
        } else {
            self.free.push(block);
        }
    }

    /// Frees every idle block: what they hold is found no more.
    pub(crate) fn free_idle(&mut self) {
        // Ends of prefixes come first, as in `allocate`.
        while let Some((_, block)) = self.idle.pop_first() {
            self.tree.remove(block);
            self.free.push(block);
        }
    }

    /// The blocks whose contents are of no use, and those that are idle, longest first.
    #[cfg(test)]
    pub(crate) fn unheld(&self) -> (&[BlockId], impl Iterator<Item = BlockId>) {
        (&self.free, self.idle.values().copied())
    }

    /// The names.
    #[cfg(test)]
    pub(crate) fn tree(&self) -> &PrefixTree {
        &self.tree
    }
}
