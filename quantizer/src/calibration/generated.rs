//! Calibration data that the model writes itself: no data needed, and in the distribution the model works in.
//!
//! Each sequence begins with the tokens that the tokenizer puts before a text and one token drawn from the
//! whole vocabulary, special tokens left out; the model continues it. A token is drawn from the model's own
//! distribution, without those less than a twentieth as likely as the first; end-of-sequence tokens are left
//! out, so that all sequences have the same length. The whole model must fit the device.
//!
//! Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888), section 2.1, which draws from the unfiltered distribution.

use nibble_kernels::backend::Backend;
use nibble_model::forward::{BLOCK_SIZE, Batch, Model, SequenceRows};
use nibble_model::tokenizer::Tokenizer;

use super::packing::split_mix;
use super::{Calibration, CalibrationOptions};
use crate::error::QuantizeError;

/// Sequences written side by side: bounds the KV cache, and keeps the weights' reads shared.
const CONCURRENT: usize = 32;
/// Tokens less likely than this times the most likely one are left out.
const LEAST_RATIO: f32 = 0.05;

impl Calibration {
    /// Lets `model` write the sequences. `progress` gets the tokens written and those wanted.
    ///
    /// # Errors
    /// When the options ask for nothing, the model cannot take sequences of that length, or it refuses a step.
    pub fn from_model<B: Backend>(
        model: &mut Model<B>,
        tokenizer: &Tokenizer,
        options: CalibrationOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, QuantizeError> {
        let CalibrationOptions { samples, sequence_length, seed } = options;
        let prefix = tokenizer.encode("", true)?;
        let longest = model.max_positions().min(model.config().max_position_embeddings);
        options.check(prefix.len() + 2, longest)?;
        let vocabulary = model.config().vocabulary_size;
        let mut sequences: Vec<Vec<u32>> = Vec::with_capacity(samples);
        for sequence in 0..samples {
            let first = first_token(tokenizer, vocabulary, random_state(seed, sequence, 0))?;
            sequences.push([&prefix[..], &[first]].concat());
        }
        let blocks_each = sequence_length.div_ceil(BLOCK_SIZE);
        let mut cache = model.kv_cache(CONCURRENT.min(samples) * blocks_each)?;
        let wanted = samples * sequence_length;
        for (group, sequences) in sequences.chunks_mut(CONCURRENT).enumerate() {
            let mut computed = 0;
            while sequences[0].len() < sequence_length {
                let logits = model.forward(&next_rows(sequences, computed, blocks_each), &mut cache)?;
                computed = sequences[0].len();
                for (row, sequence) in sequences.iter_mut().enumerate() {
                    let state = random_state(seed, group * CONCURRENT + row, sequence.len());
                    sequence.push(draw_token(logits.row(row), &model.config().eos_token_ids, state));
                }
                progress(group * CONCURRENT * sequence_length + sequences.len() * sequences[0].len(), wanted);
            }
        }
        Ok(Self { sequences, sequence_length })
    }
}

/// The rows from position `computed` on of sequences of equal length.
fn next_rows(sequences: &[Vec<u32>], computed: usize, blocks_each: usize) -> Batch {
    let mut batch = Batch::default();
    for (index, sequence) in sequences.iter().enumerate() {
        let first_row = batch.token_ids.len();
        batch.token_ids.extend(&sequence[computed..]);
        batch.positions.extend((computed..sequence.len()).map(|position| position as u32));
        batch.logit_rows.push(batch.token_ids.len() - 1);
        batch.sequences.push(SequenceRows {
            first_row,
            rows: sequence.len() - computed,
            first_position: computed,
            block_table: (0..blocks_each).map(|block| (index * blocks_each + block) as u32).collect(),
        });
    }
    batch
}

/// A token that stands for text.
fn first_token(tokenizer: &Tokenizer, vocabulary: usize, mut state: u64) -> Result<u32, QuantizeError> {
    // A vocabulary is mostly text; the bound only keeps a broken tokenizer from hanging the program.
    for _ in 0..1000 {
        let token = (split_mix(&mut state) % vocabulary as u64) as u32;
        if !tokenizer.decode(&[token], true)?.trim().is_empty() {
            return Ok(token);
        }
    }
    Err(QuantizeError::Settings {
        name: "the tokenizer".to_owned(),
        found: "almost without tokens that stand for text".to_owned(),
        expected: "a tokenizer of this model".to_owned(),
        help: "fetch or import the model again, or calibrate on a text file".to_owned(),
    })
}

/// The state that draws token `position` of sequence `sequence`, whatever was drawn before.
fn random_state(seed: u64, sequence: usize, position: usize) -> u64 {
    let mut state = seed;
    for word in [sequence as u64, position as u64] {
        state = split_mix(&mut state) ^ word;
    }
    state
}

/// Draws from `logits`; see the module text.
fn draw_token(logits: &[f32], left_out: &[u32], mut state: u64) -> u32 {
    let candidates = || logits.iter().enumerate().filter(|(token, _)| !left_out.contains(&(*token as u32)));
    let largest = candidates().fold(f32::NEG_INFINITY, |largest, (_, &logit)| largest.max(logit));
    let least = largest + LEAST_RATIO.ln();
    let likely = || candidates().filter(|&(_, &logit)| logit >= least);
    let weight = |logit: f32| f64::from(logit - largest).exp();
    let total: f64 = likely().map(|(_, &logit)| weight(logit)).sum();
    let mut left = (split_mix(&mut state) >> 11) as f64 / (1u64 << 53) as f64 * total;
    let mut chosen = 0;
    for (token, &logit) in likely() {
        chosen = token as u32;
        left -= weight(logit);
        if left < 0.0 {
            break;
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely_and_unlikely_ones_never() {
        let probabilities = [0.5f32, 0.005, 0.3, 0.195];
        let logits = probabilities.map(f32::ln);
        let mut counts = [0; 4];
        for position in 0..20_000 {
            counts[draw_token(&logits, &[], random_state(7, 3, position)) as usize] += 1;
        }
        assert_eq!(counts[1], 0, "less than a twentieth of 0.5");
        for (token, count) in counts.into_iter().enumerate().filter(|&(token, _)| token != 1) {
            let expected = 20_000.0 * f64::from(probabilities[token]) / 0.995;
            // Four standard deviations of a binomial distribution are at most 283.
            assert!(
                (f64::from(count) - expected).abs() < 283.0,
                "token {token} {count} times, not {expected}"
            );
        }
        let end_left_out = |position| draw_token(&logits, &[0, 2], random_state(7, 3, position));
        assert!((0..1000).all(|position| end_left_out(position) == 3));
    }
}
