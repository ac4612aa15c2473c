//! Which KV blocks hold which tokens after which others.
//!
//! A full block whose keys and values are computed is *named* by its tokens and by the block before it, so
//! the names are a tree of token blocks. Names are compared token by token, not by a hash: no collision can
//! hand one request the keys of another.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::BlockId;

type Children = BTreeMap<Arc<[u32]>, BlockId>;

/// What lies before a block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Parent {
    /// Nothing: it holds the first tokens of sequences with this salt. Different salts share nothing.
    Root(Option<Arc<str>>),
    /// Another block; named as long as this one is.
    Block(BlockId),
}

/// The names of the blocks of a pool.
pub(crate) struct PrefixTree {
    /// Blocks of the first tokens of sequences, by salt; none is empty.
    roots: BTreeMap<Option<Arc<str>>, Children>,
    /// By block.
    names: Vec<Option<Name>>,
}

struct Name {
    parent: Parent,
    tokens: Arc<[u32]>,
    children: Children,
}

impl PrefixTree {
    /// No names for `blocks` blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self { roots: BTreeMap::new(), names: (0..blocks).map(|_| None).collect() }
    }

    /// Whether a block has a name.
    pub(crate) fn is_named(&self, block: BlockId) -> bool {
        self.names[block.0 as usize].is_some()
    }

    /// The block of `tokens` after `parent`.
    pub(crate) fn child(&self, parent: &Parent, tokens: &[u32]) -> Option<BlockId> {
        let children = match parent {
            Parent::Root(salt) => self.roots.get(salt)?,
            Parent::Block(block) => &self.names[block.0 as usize].as_ref()?.children,
        };
        children.get(tokens).copied()
    }

    /// The blocks of the longest prefix of `tokens` that has names under `salt`, `block_size` tokens each.
    pub(super) fn prefix(
        &self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
        block_size: usize,
    ) -> impl Iterator<Item = BlockId> {
        let mut parent = Parent::Root(salt.cloned());
        tokens.chunks_exact(block_size).map_while(move |tokens| {
            let block = self.child(&parent, tokens)?;
            parent = Parent::Block(block);
            Some(block)
        })
    }

    /// Names `block`, which has no name, as `tokens` after `parent`, where no block is named so.
    pub(super) fn insert(&mut self, parent: Parent, tokens: &[u32], block: BlockId) {
        let tokens: Arc<[u32]> = tokens.into();
        let children = match &parent {
            Parent::Root(salt) => self.roots.entry(salt.clone()).or_default(),
            Parent::Block(before) => self.children_mut(*before),
        };
        children.insert(Arc::clone(&tokens), block);
        self.names[block.0 as usize] = Some(Name { parent, tokens, children: Children::new() });
    }

    /// Takes a block's name.
    ///
    /// # Panics
    /// When a block after it has a name, which nobody could find any more.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Some(name) = self.names[block.0 as usize].take() else { return };
        assert!(name.children.is_empty(), "names go from the end of a prefix");
        match &name.parent {
            Parent::Root(salt) => {
                if let Some(children) = self.roots.get_mut(salt) {
                    children.remove(&name.tokens);
                    if children.is_empty() {
                        self.roots.remove(salt);
                    }
                }
            }
            Parent::Block(before) => {
                self.children_mut(*before).remove(&name.tokens);
            }
        }
    }

    fn children_mut(&mut self, block: BlockId) -> &mut Children {
        let name = self.names[block.0 as usize].as_mut();
        &mut name.expect("the block before a named one is named").children
    }
}
