//! Which samples are drawn, and how they fill sequences.
//!
//! Samples come in an order that a seed shuffles. Each joins the first sequence with room for it, and begins a new
//! one where none has; a sample longer than a sequence is cut at its end. What was cut off waits until all samples
//! had their turn, and comes then, again at most a sequence of it at a time: a few long samples do not crowd out
//! the others, and nothing is left out while sequences are missing. It ends when a piece finds no room.

use std::collections::VecDeque;

/// Sequences being filled.
pub(super) struct Packer<'a> {
    /// Tokens before what is not the beginning of a sample.
    prefix: &'a [u32],
    /// The most tokens of a sequence, more than `prefix` has.
    length: usize,
    /// The most sequences.
    samples: usize,
    /// The number of the first sample in each, and the tokens.
    sequences: Vec<(usize, Vec<u32>)>,
    /// What was cut off, with the number of its sample.
    cut_off: VecDeque<(usize, Vec<u32>)>,
}

impl<'a> Packer<'a> {
    /// Up to `samples` sequences of up to `length` tokens, of which `prefix` are fewer.
    pub(super) fn new(prefix: &'a [u32], length: usize, samples: usize) -> Self {
        Self { prefix, length, samples, sequences: Vec::new(), cut_off: VecDeque::new() }
    }

    /// Adds the sample of that number, with the tokens it begins with. `false` when there is no room for it.
    pub(super) fn add(&mut self, number: usize, mut tokens: Vec<u32>) -> bool {
        let rest = tokens.split_off(self.length.min(tokens.len()));
        let placed = self.place(number, &tokens);
        if placed && !rest.is_empty() {
            self.cut_off.push_back((number, rest));
        }
        placed
    }

    /// The sequences, in the order of the first sample in each, filled up with what was cut off.
    pub(super) fn finish(mut self) -> Vec<Vec<u32>> {
        let body = self.length - self.prefix.len();
        while let Some((number, mut tokens)) = self.cut_off.pop_front() {
            let rest = tokens.split_off(body.min(tokens.len()));
            if !self.place(number, &[self.prefix, &tokens].concat()) {
                break;
            }
            if !rest.is_empty() {
                self.cut_off.push_back((number, rest));
            }
        }
        self.sequences.sort_by_key(|&(number, _)| number);
        self.sequences.into_iter().map(|(_, tokens)| tokens).collect()
    }

    fn place(&mut self, number: usize, piece: &[u32]) -> bool {
        let has_room = |(_, tokens): &(usize, Vec<u32>)| tokens.len() + piece.len() <= self.length;
        match self.sequences.iter().position(has_room) {
            Some(open) => self.sequences[open].1.extend(piece),
            None if self.sequences.len() < self.samples => self.sequences.push((number, piece.to_vec())),
            None => return false,
        }
        true
    }
}

/// The numbers below `count` in an order that `seed` chooses: a Fisher-Yates shuffle.
pub(super) fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..count).collect();
    let mut state = seed;
    for index in 0..count {
        let left = (count - index) as u64;
        numbers.swap(index, index + (split_mix(&mut state) % left) as usize);
    }
    numbers
}

/// The generator SplitMix64 (Steele, Lea, Flood 2014): the same numbers on every machine.
pub(super) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_shuffle_has_every_number_once_in_the_order_of_the_seed() {
        // By the definition of both algorithms in plain Python.
        assert_eq!(shuffled(1000, 0)[..8], [535, 28, 321, 922, 851, 630, 511, 927]);
        let mut numbers = shuffled(1000, 7);
        assert_ne!(numbers, shuffled(1000, 8));
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..1000));
    }

    #[test]
    fn the_generator_is_split_mix() {
        // First outputs for seed 1234567, as published with the reference implementation.
        let mut state = 1_234_567;
        assert_eq!(split_mix(&mut state), 6_457_827_717_110_365_317);
        assert_eq!(split_mix(&mut state), 3_203_168_211_198_807_973);
    }

    #[test]
    fn short_samples_share_a_sequence_and_what_was_cut_off_comes_last() {
        let mut packer = Packer::new(&[0], 5, 4);
        for (number, tokens) in [(3, vec![31, 32]), (1, (11..=19).collect()), (0, vec![1, 2, 3, 4])] {
            assert!(packer.add(number, tokens));
        }
        assert!(packer.add(2, vec![21, 22, 23]), "beside sample 3");
        let expected =
            [vec![1, 2, 3, 4], vec![11, 12, 13, 14, 15], vec![0, 16, 17, 18, 19], vec![31, 32, 21, 22, 23]];
        assert_eq!(packer.finish(), expected);
    }

    #[test]
    fn a_sample_without_room_is_not_taken() {
        let mut packer = Packer::new(&[], 4, 1);
        assert!(packer.add(0, vec![1, 2, 3]));
        assert!(!packer.add(1, vec![4, 5]));
        assert_eq!(packer.finish(), [[1, 2, 3]]);
    }

    proptest! {
        #[test]
        fn with_room_enough_every_token_is_used_once_and_no_sequence_is_too_long(
            sizes in proptest::collection::vec(1usize..40, 1..30),
            prefix in 0usize..3,
            length in 4usize..20,
        ) {
            let prefix = vec![u32::MAX; prefix];
            let mut packer = Packer::new(&prefix, length, usize::MAX);
            let mut next = 0;
            for (number, &size) in sizes.iter().enumerate() {
                let tokens = (next..next + size as u32).collect();
                next += size as u32;
                prop_assert!(packer.add(number, tokens));
            }
            let sequences = packer.finish();
            prop_assert!(sequences.iter().all(|tokens| (1..=length).contains(&tokens.len())));
            let mut tokens: Vec<u32> = sequences.concat();
            tokens.retain(|&token| token != u32::MAX);
            tokens.sort_unstable();
            prop_assert!(tokens.into_iter().eq(0..next));
        }
    }
}
