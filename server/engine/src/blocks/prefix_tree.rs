//! Which KV blocks hold which tokens after which others.
//!
//! A full block whose keys and values are computed is *named* by its tokens and by the block before it, so
//! the names are a tree of token blocks. Names are compared token by token, not by a hash: no collision can
//! hand one request the keys of another.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::BlockId;

type Children = BTreeMap<Arc<[u32]>, BlockId>;

/// The names of the blocks of a pool.
pub(crate) struct PrefixTree {
    /// Blocks of the first tokens of sequences.
    roots: Children,
    /// By block.
    names: Vec<Option<Name>>,
}

struct Name {
    /// The block before it; named as long as this one is.
    parent: Option<BlockId>,
    tokens: Arc<[u32]>,
    children: Children,
}

impl PrefixTree {
    /// No names for `blocks` blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self { roots: Children::new(), names: (0..blocks).map(|_| None).collect() }
    }

    /// Whether a block has a name.
    pub(crate) fn is_named(&self, block: BlockId) -> bool {
        self.names[block.0 as usize].is_some()
    }

    /// The block of `tokens` after `parent`.
    pub(crate) fn child(&self, parent: Option<BlockId>, tokens: &[u32]) -> Option<BlockId> {
        let children = match parent {
            None => &self.roots,
            Some(parent) => &self.names[parent.0 as usize].as_ref()?.children,
        };
        children.get(tokens).copied()
    }

    /// The blocks of the longest prefix of `tokens` that has names, `block_size` tokens each.
    pub(super) fn prefix(&self, tokens: &[u32], block_size: usize) -> impl Iterator<Item = BlockId> {
        let mut parent = None;
        tokens.chunks_exact(block_size).map_while(move |tokens| {
            parent = self.child(parent, tokens);
            parent
        })
    }

    /// Names `block`, which has no name, as `tokens` after `parent`, where no block is named so.
    pub(super) fn insert(&mut self, parent: Option<BlockId>, tokens: &[u32], block: BlockId) {
        let tokens: Arc<[u32]> = tokens.into();
        self.children_mut(parent).insert(Arc::clone(&tokens), block);
        self.names[block.0 as usize] = Some(Name { parent, tokens, children: Children::new() });
    }

    /// Takes a block's name.
    ///
    /// # Panics
    /// When a block after it has a name, which nobody could find any more.
    pub(super) fn remove(&mut self, block: BlockId) {
        if let Some(name) = self.names[block.0 as usize].take() {
            assert!(name.children.is_empty(), "names go from the end of a prefix");
            self.children_mut(name.parent).remove(&name.tokens);
        }
    }

    fn children_mut(&mut self, parent: Option<BlockId>) -> &mut Children {
        match parent {
            None => &mut self.roots,
            Some(parent) => {
                let name = self.names[parent.0 as usize].as_mut();
                &mut name.expect("the block before a named one is named").children
            }
        }
    }
}
