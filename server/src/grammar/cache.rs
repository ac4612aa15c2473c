//! Compiled grammars that may be wanted again.

use std::collections::HashMap;

use llguidance::Matcher;

/// Most grammars that are kept.
pub(super) const MAXIMUM_GRAMMARS: usize = 64;
/// Most bytes of their texts, with which grows what they are compiled to.
pub(super) const MAXIMUM_BYTES: usize = 1 << 20;

/// A grammar as it was given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct GrammarKey {
    pub(super) kind: GrammarKind,
    pub(super) text: String,
}

/// In what language the text of a grammar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum GrammarKind {
    JsonSchema,
    Lark,
}

/// The grammars used last, each with a parser at the beginning of a text that nobody has moved.
#[derive(Default)]
pub(super) struct GrammarCache {
    grammars: HashMap<GrammarKey, Entry>,
    bytes: usize,
    uses: u64,
}

struct Entry {
    matcher: Matcher,
    /// Number of its last use.
    last_use: u64,
}

impl GrammarCache {
    /// A parser of the grammar `key`, independent of all others, if it is here.
    pub(super) fn get(&mut self, key: &GrammarKey) -> Option<Matcher> {
        self.uses += 1;
        let entry = self.grammars.get_mut(key)?;
        entry.last_use = self.uses;
        Some(entry.matcher.deep_clone())
    }

    /// Keeps a parser at the beginning of a text of the grammar `key`, in the place of those that were used longest ago.
    pub(super) fn insert(&mut self, key: GrammarKey, matcher: Matcher) {
        self.remove(&key);
        while self.grammars.len() >= MAXIMUM_GRAMMARS || self.bytes + key.text.len() > MAXIMUM_BYTES {
            let oldest = self.grammars.iter().min_by_key(|(_, entry)| entry.last_use);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { return };
            self.remove(&oldest);
        }
        self.bytes += key.text.len();
        self.grammars.insert(key, Entry { matcher, last_use: self.uses });
    }

    fn remove(&mut self, key: &GrammarKey) {
        if self.grammars.remove(key).is_some() {
            self.bytes -= key.text.len();
        }
    }

    /// Grammars and bytes of their texts.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        (self.grammars.len(), self.bytes)
    }
}
