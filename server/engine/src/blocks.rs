//! The KV blocks of a runner's cache: who may write to which.

/// Number of one KV block, below [`crate::RunnerLimits::blocks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockId(pub(crate) u32);

/// The free blocks. The same calls give the same blocks: the one freed last is taken first.
pub(crate) struct BlockPool {
    free: Vec<BlockId>,
    total: usize,
}

impl BlockPool {
    /// A pool of `total` free blocks, numbered from 0.
    pub(crate) fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().map(BlockId).collect(), total }
    }

    /// Takes one block, if one is free.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        self.free.pop()
    }

    /// Takes back blocks, whose contents nobody needs any more; leaves `blocks` empty.
    pub(crate) fn free(&mut self, blocks: &mut Vec<BlockId>) {
        // Backwards, so that a sequence that comes back gets its blocks in the order it had them.
        self.free.extend(blocks.drain(..).rev());
    }

    /// The blocks that nobody holds.
    pub(crate) fn free_blocks(&self) -> &[BlockId] {
        &self.free
    }

    /// Blocks that somebody holds.
    pub(crate) fn used(&self) -> usize {
        self.total - self.free.len()
    }

    /// All blocks.
    pub(crate) fn total(&self) -> usize {
        self.total
    }
}
