//! What is asked for, and when: prompts of random words, and the times at which they arrive.

use std::time::Duration;

use anyhow::Context;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Gamma};

use super::ServeArguments;

/// Short words that are one token, with the space before them, in the vocabularies of most models.
const WORDS: &str = "the of and to in is that for it was on are as with they at be this from have or by one had not but \
    what all were when we there can an your which their said if do will each about how up out them then she many some \
    so these would other into has more her two like him see time could no make than first been its who now people my \
    made over did down only way find use may water long little very after words called just where most know";

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt {
    pub(super) text: String,
    pub(super) max_tokens: usize,
    /// When it arrives, from the beginning of the load.
    pub(super) arrives_at: Duration,
}

/// All requests of a load, in the order of their arrival; the same for the same arguments.
pub(super) struct Workload {
    pub(super) prompts: Vec<Prompt>,
}

impl Workload {
    pub(super) fn new(arguments: &ServeArguments) -> anyhow::Result<Self> {
        let mut random = StdRng::seed_from_u64(arguments.seed);
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        let draw = |count: usize, random: &mut StdRng| -> Vec<&str> {
            (0..count).filter_map(|_| words.choose(random).copied()).collect()
        };
        let prefix = draw(arguments.random_prefix_len as usize, &mut random);
        // Exponential times between arrivals for a shape of 1; the mean is that of the rate for every shape.
        let shape = arguments.burstiness;
        let gaps = match arguments.request_rate {
            rate if rate.is_infinite() => None,
            rate => Some(
                Gamma::new(shape, 1.0 / (rate * shape)).context("no arrivals of this rate and burstiness")?,
            ),
        };
        let mut arrives_at = 0.0;
        let prompts = (0..arguments.num_prompts)
            .map(|_| {
                let length = |mean: u32, random: &mut StdRng| {
                    let spread = f64::from(mean) * arguments.random_range_ratio;
                    let (low, high) = ((f64::from(mean) - spread).ceil(), (f64::from(mean) + spread).floor());
                    random.random_range((low as usize).max(1)..=(high as usize).max(1))
                };
                let input = length(arguments.random_input_len, &mut random);
                let max_tokens = length(arguments.random_output_len, &mut random);
                let text = [prefix.clone(), draw(input, &mut random)].concat().join(" ");
                let prompt = Prompt { text, max_tokens, arrives_at: Duration::from_secs_f64(arrives_at) };
                arrives_at += gaps.map_or(0.0, |gaps| gaps.sample(&mut random));
                prompt
            })
            .collect();
        Ok(Self { prompts })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: ServeArguments,
    }

    fn prompts(options: &[&str]) -> Vec<Prompt> {
        let line = ["bench", "--url", "http://localhost"].iter().chain(options);
        Workload::new(&Line::parse_from(line).arguments).unwrap().prompts
    }

    #[test]
    fn the_same_seed_gives_the_same_load_and_another_seed_another() {
        let options = ["--random-input-len", "20", "--request-rate", "5", "--random-range-ratio", "0.5"];
        let load = |seed| prompts(&[&options[..], &["--seed", seed]].concat());
        assert_eq!(load("1"), load("1"));
        assert_ne!(load("1"), load("2"));
    }

    #[test]
    fn prompts_have_the_length_asked_for_and_share_their_prefix_only() {
        let prompts =
            prompts(&["--random-input-len", "20", "--random-prefix-len", "7", "--num-prompts", "9"]);
        let words: Vec<Vec<&str>> = prompts.iter().map(|prompt| prompt.text.split(' ').collect()).collect();
        assert!(words.iter().all(|own| own.len() == 27 && own[..7] == words[8][..7]));
        assert!((0..8).all(|index| !words[index].ends_with(&words[8][7..])));
        assert!(prompts.iter().all(|prompt| prompt.max_tokens == 128 && prompt.arrives_at.is_zero()));
    }

    #[test]
    fn lengths_stay_within_their_range_and_reach_its_ends() {
        let prompts =
            prompts(&["--random-output-len", "10", "--random-range-ratio", "0.2", "--num-prompts", "200"]);
        let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.max_tokens).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&8), Some(&12)));
    }

    #[test]
    fn arrivals_keep_their_rate_and_burstiness_changes_their_spread() {
        let gaps = |burstiness: &str| {
            let rate = ["--request-rate", "10", "--num-prompts", "4000", "--random-input-len", "1"];
            let prompts = prompts(&[&rate[..], &["--burstiness", burstiness]].concat());
            let gaps: Vec<f64> = prompts
                .windows(2)
                .map(|pair| (pair[1].arrives_at - pair[0].arrives_at).as_secs_f64())
                .collect();
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            (mean, variance.sqrt() / mean)
        };
        // The coefficient of variation of a gamma distribution is 1 / sqrt(shape); within 5 deviations of 4000 draws.
        for (burstiness, shape) in [("0.25", 0.25_f64), ("1", 1.0), ("16", 16.0)] {
            let (mean, variation) = gaps(burstiness);
            let expected = 1.0 / shape.sqrt();
            assert!((mean - 0.1).abs() < 0.1 * 5.0 * expected / 4000_f64.sqrt(), "{burstiness}: {mean}");
            assert!((variation / expected - 1.0).abs() < 0.2, "{burstiness}: {variation}");
        }
    }
}
