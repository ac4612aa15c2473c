//! Guesses at the next tokens of a sequence: what followed the last time it said the same.
//!
//! Prompt lookup decoding (Saxena, 2023; vLLM's `ngram` method): the last tokens are looked up in the prompt and the
//! completion so far, and what came after them there is the draft. A step computes a draft along with the token
//! before it and keeps the part that sampling confirms, so a draft costs time but changes no token. How long drafts
//! may be follows from how the last ones fared.

use std::collections::HashMap;

/// Tokens that must have been said before, the longer run first.
const RUNS: [usize; 2] = [4, 2];
/// Drafts of nothing right that are followed by ever longer pauses.
const LONGEST_PAUSE: u32 = 6;

/// What a sequence has said, and how guesses at it fared.
pub(crate) struct PromptLookup {
    /// For each run of tokens that something follows: where that begins, the last time.
    following: [HashMap<u128, u32>; RUNS.len()],
    /// Tokens that are in the tables as what follows a run.
    indexed: usize,
    /// The longest draft there may be at all, and now.
    longest: usize,
    length: usize,
    /// Drafts in a row of which nothing was right, and tokens to wait because of them.
    misses: u32,
    pause: usize,
}

impl PromptLookup {
    /// Of a sequence that has said nothing, for drafts of at most `longest` tokens.
    pub(crate) fn new(longest: usize) -> Self {
        Self { following: Default::default(), indexed: 0, longest, length: 1, misses: 0, pause: 0 }
    }

    /// Appends a draft of at most `most` tokens to `tokens`, which holds everything that was said and only grows from
    /// call to call.
    pub(crate) fn draft(&mut self, tokens: &mut Vec<u32>, most: usize) {
        self.index(tokens);
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let known = tokens.len();
        let found = RUNS.iter().zip(&self.following).find_map(|(&run, following)| {
            let last = known.checked_sub(run).map(|start| &tokens[start..])?;
            following.get(&key(last)).copied()
        });
        if let Some(start) = found {
            // What is drafted may itself be repeated.
            (start as usize..).take(self.length.min(most)).for_each(|from| tokens.push(tokens[from]));
        }
    }

    fn index(&mut self, tokens: &[u32]) {
        for end in self.indexed..tokens.len() {
            for (&run, following) in RUNS.iter().zip(&mut self.following) {
                if let Some(start) = end.checked_sub(run) {
                    following.insert(key(&tokens[start..end]), end as u32);
                }
            }
        }
        self.indexed = tokens.len();
    }

    /// Learns that of a draft of `drafted` tokens the first `accepted` were right.
    pub(crate) fn learn(&mut self, drafted: usize, accepted: usize) {
        if accepted == drafted {
            self.length = (2 * self.length).min(self.longest);
        } else {
            self.length = accepted.max(1);
        }
        if accepted > 0 {
            self.misses = 0;
        } else {
            self.misses = (self.misses + 1).min(LONGEST_PAUSE);
            self.pause = (1 << self.misses) - 1;
        }
    }
}

/// Up to four tokens as one number.
fn key(tokens: &[u32]) -> u128 {
    tokens.iter().fold(0, |key, &token| key << u32::BITS | u128::from(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(lookup: &mut PromptLookup, tokens: &[u32], most: usize) -> Vec<u32> {
        let mut all = tokens.to_vec();
        lookup.draft(&mut all, most);
        assert_eq!(&all[..tokens.len()], tokens);
        all.split_off(tokens.len())
    }

    #[test]
    fn what_followed_the_longest_run_comes_again_from_where_it_was_said_last() {
        let tokens = [1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 7, 1, 2, 3, 4];
        let mut lookup = PromptLookup::new(8);
        assert_eq!(draft(&mut lookup, &tokens, 8), [5], "after 1 2 3 4, not after the later 3 4");
        let mut lookup = PromptLookup::new(8);
        assert_eq!(draft(&mut lookup, &tokens[..9], 8), [5]);
        let mut lookup = PromptLookup::new(8);
        assert_eq!(draft(&mut lookup, &[tokens.as_slice(), &[8, 3, 4]].concat(), 8), [8]);
        assert!(draft(&mut PromptLookup::new(8), &[1, 2, 3], 8).is_empty());
        assert!(draft(&mut PromptLookup::new(8), &[1], 8).is_empty());
    }

    #[test]
    fn drafts_grow_while_they_are_right_and_repeat_themselves() {
        let mut lookup = PromptLookup::new(7);
        let mut tokens = vec![1, 2, 1, 2];
        for length in [1, 2, 4, 7, 7] {
            let drafted = draft(&mut lookup, &tokens, 100);
            assert_eq!(drafted.len(), length);
            tokens.extend(&drafted);
            lookup.learn(length, length);
        }
        assert!(tokens.windows(2).all(|pair| pair[0] != pair[1]), "in turns");
        assert_eq!(draft(&mut lookup, &tokens, 3).len(), 3, "no more than are wanted");
        lookup.learn(3, 2);
        assert_eq!(draft(&mut lookup, &tokens, 100).len(), 2, "as many as were right");
    }

    #[test]
    fn guesses_that_are_wrong_become_short_and_rare_until_one_is_right() {
        let mut lookup = PromptLookup::new(8);
        let mut tokens = vec![1, 2, 1, 2];
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let mut pause = 0;
            while draft(&mut lookup, &tokens, 100).is_empty() {
                pause += 1;
            }
            pauses.push(pause);
            lookup.learn(2, 0);
            tokens.extend([1, 2]);
        }
        assert_eq!(pauses, [0, 1, 3, 7, 15, 31, 63, 63]);
        while draft(&mut lookup, &tokens, 100).is_empty() {}
        lookup.learn(1, 1);
        assert_eq!(draft(&mut lookup, &tokens, 100), [1, 2]);
    }
}
