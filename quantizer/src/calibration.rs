//! Calibration data: token sequences that show the quantizer what the inputs of each layer look like.
//!
//! A UTF-8 text is tokenized and cut into sequences of equal length that do not overlap; as many as were asked
//! for are drawn without repetition by a seed, in the order of the text. Each begins with the tokens that the
//! model's tokenizer puts before a text (a beginning-of-sequence token, or none).

mod generated;

use std::path::Path;

use nibble_model::config::ModelConfig;
use nibble_model::error::CheckpointError;
use nibble_model::tokenizer::Tokenizer;

use crate::error::QuantizeError;

/// How many sequences, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Sequences to draw.
    pub samples: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Which sequences are drawn.
    pub seed: u64,
}

/// Token sequences of equal length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    sequences: Vec<Vec<u32>>,
    sequence_length: usize,
}

impl Calibration {
    /// Draws sequences from the text `file`. Too few of them are used all the same, with a warning.
    ///
    /// # Errors
    /// When the file cannot be read, is not UTF-8 or is shorter than one sequence, and when the model cannot
    /// take sequences of that length.
    pub fn from_text(
        file: &Path,
        tokenizer: &Tokenizer,
        config: &ModelConfig,
        options: CalibrationOptions,
    ) -> Result<Self, QuantizeError> {
        let refuse = |problem: String, help: &str| {
            Err(QuantizeError::Calibration { file: file.to_owned(), problem, help: help.to_owned() })
        };
        let bytes = std::fs::read(file).map_err(CheckpointError::io("read", file))?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let problem = format!("byte {} is not UTF-8", error.utf8_error().valid_up_to());
                return refuse(problem, "convert it to a UTF-8 text");
            }
        };
        let prefix = tokenizer.encode("", true)?;
        let tokens = tokenizer.encode(&text, false)?;
        let length = options.sequence_length;
        if length > config.max_position_embeddings {
            let problem = format!(
                "sequences of {length} tokens are wanted and the model takes {}",
                config.max_position_embeddings
            );
            return refuse(problem, "give a smaller --sequence-length");
        }
        if length <= prefix.len() || options.samples == 0 {
            return refuse(
                format!("{} sequences of {length} tokens are wanted", options.samples),
                "give a positive --samples and a larger --sequence-length",
            );
        }
        let body = length - prefix.len();
        let available = tokens.len() / body;
        if available == 0 {
            let problem = format!("it has {} tokens, fewer than one sequence of {length}", tokens.len());
            return refuse(problem, "give a longer text or a smaller --sequence-length");
        }
        let chosen = draw(available, options.samples, options.seed);
        if chosen.len() < options.samples {
            tracing::warn!(
                file = %file.display(),
                wanted = options.samples,
                found = available,
                "the calibration text holds fewer sequences than asked for; all of them are used"
            );
        }
        let widest = config.intermediate_size.max(config.hidden_size).max(config.heads * config.head_dim);
        if chosen.len() * length < widest {
            tracing::warn!(
                tokens = chosen.len() * length,
                inputs = widest,
                "fewer calibration tokens than inputs of the widest matrix; give more samples for a better result"
            );
        }
        let sequence = |&index: &usize| [&prefix, &tokens[index * body..(index + 1) * body]].concat();
        Ok(Self { sequences: chosen.iter().map(sequence).collect(), sequence_length: length })
    }

    /// The sequences.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.sequences
    }

    /// Tokens of each.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }
}

/// Up to `count` different numbers below `available`, rising: a seeded partial Fisher-Yates shuffle, sorted.
fn draw(available: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..available).collect();
    let count = count.min(available);
    let mut state = seed;
    for index in 0..count {
        let left = (available - index) as u64;
        numbers.swap(index, index + (split_mix(&mut state) % left) as usize);
    }
    numbers.truncate(count);
    numbers.sort_unstable();
    numbers
}

/// The generator SplitMix64 (Steele, Lea, Flood 2014): the same numbers on every machine.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut value = *state;
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_sequences_are_different_in_order_and_those_of_the_seed() {
        let drawn = draw(1000, 64, 7);
        assert_eq!(drawn.len(), 64);
        assert!(drawn.windows(2).all(|pair| pair[0] < pair[1]) && drawn.iter().all(|&index| index < 1000));
        assert_eq!(drawn, draw(1000, 64, 7));
        assert_ne!(drawn, draw(1000, 64, 8));
        assert_eq!(draw(5, 64, 7), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn the_generator_is_split_mix() {
        // First outputs for seed 1234567, as published with the reference implementation.
        let mut state = 1_234_567;
        assert_eq!(split_mix(&mut state), 6_457_827_717_110_365_317);
        assert_eq!(split_mix(&mut state), 3_203_168_211_198_807_973);
    }
}
