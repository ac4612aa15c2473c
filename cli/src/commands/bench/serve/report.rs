//! What is reported of a load: throughput, latencies, and requests that kept the bounds of a service.

use std::fmt::Write;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::ServeArguments;
use super::client::Answer;
use super::load::Run;
use super::statistics::Distribution;
use crate::output::print_text;

/// A latency of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Time to the first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Time from a token to the next; not of a request but of each of its tokens.
    Itl,
    /// Time to the end.
    E2el,
}

impl Metric {
    const ALL: [Self; 4] = [Self::Ttft, Self::Tpot, Self::Itl, Self::E2el];

    fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Ttft => "time to first token",
            Self::Tpot => "time per output token",
            Self::Itl => "inter-token latency",
            Self::E2el => "end-to-end latency",
        }
    }

    /// Milliseconds of `answer`; of one token there is no time per further token.
    fn of(self, answer: &Answer) -> Vec<f64> {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        match self {
            Self::Ttft => vec![milliseconds(answer.to_first_token)],
            Self::Tpot if answer.output_tokens < 2 => vec![],
            Self::Tpot => {
                let decoding = answer.total.saturating_sub(answer.to_first_token);
                vec![milliseconds(decoding) / (answer.output_tokens - 1) as f64]
            }
            Self::Itl => answer.between_tokens.iter().map(|time| milliseconds(*time)).collect(),
            Self::E2el => vec![milliseconds(answer.total)],
        }
    }
}

/// A bound that a request keeps or not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Goodput {
    metric: Metric,
    milliseconds: f64,
}

impl FromStr for Goodput {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("found {text}, expected ttft, tpot or e2el and milliseconds, such as ttft:500");
        let (name, bound) = text.split_once(':').ok_or_else(expected)?;
        let metric =
            [Metric::Ttft, Metric::Tpot, Metric::E2el].into_iter().find(|metric| metric.name() == name);
        let milliseconds = bound.parse().ok().filter(|bound| *bound > 0.0);
        Ok(Self { metric: metric.ok_or_else(expected)?, milliseconds: milliseconds.ok_or_else(expected)? })
    }
}

impl Goodput {
    fn is_kept_by(self, answer: &Answer) -> bool {
        self.metric.of(answer).iter().all(|found| *found <= self.milliseconds)
    }
}

/// The outcome of a load.
pub(super) struct Report {
    model: String,
    answers: Vec<Answer>,
    errors: Vec<String>,
    seconds: f64,
    goodput: Vec<Goodput>,
    /// In ascending order, the median among them.
    percentiles: Vec<f64>,
    /// What was asked for, as the JSON tells it.
    asked: Map<String, Value>,
}

impl Report {
    pub(super) fn new(arguments: &ServeArguments, model: String, run: Run) -> Self {
        let (mut answers, mut errors) = (Vec::new(), Vec::new());
        for answer in run.answers {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(error) => errors.push(format!("{error:#}")),
            }
        }
        // Scripts rely on these three.
        let mut percentiles = [&[50.0, 90.0, 99.0], &arguments.percentiles[..]].concat();
        percentiles.sort_by(f64::total_cmp);
        percentiles.dedup();
        let asked = [
            ("num_prompts", arguments.num_prompts.into()),
            ("max_concurrency", arguments.max_concurrency.into()),
            // Infinity has no form in JSON.
            ("request_rate", Some(arguments.request_rate).filter(|rate| rate.is_finite()).into()),
            ("burstiness", arguments.burstiness.into()),
            ("random_input_len", arguments.random_input_len.into()),
            ("random_output_len", arguments.random_output_len.into()),
            ("random_range_ratio", arguments.random_range_ratio.into()),
            ("random_prefix_len", arguments.random_prefix_len.into()),
            ("seed", arguments.seed.into()),
            ("ignore_eos", arguments.ignore_eos.into()),
        ];
        Self {
            model,
            answers,
            errors,
            seconds: run.duration.as_secs_f64(),
            goodput: arguments.goodput.clone(),
            percentiles,
            asked: asked.into_iter().map(|(name, value): (&str, Value)| (name.to_owned(), value)).collect(),
        }
    }

    /// Requests that were answered.
    pub(super) fn completed(&self) -> usize {
        self.answers.len()
    }

    /// Why the first request that failed did.
    pub(super) fn first_error(&self) -> Option<&str> {
        self.errors.first().map(String::as_str)
    }

    fn total(&self, tokens: fn(&Answer) -> usize) -> usize {
        self.answers.iter().map(tokens).sum()
    }

    fn input_tokens(&self) -> usize {
        self.total(|answer| answer.prompt_tokens)
    }

    fn output_tokens(&self) -> usize {
        self.total(|answer| answer.output_tokens)
    }

    fn distribution(&self, metric: Metric) -> Distribution {
        Distribution::new(self.answers.iter().flat_map(|answer| metric.of(answer)).collect())
    }

    /// Requests a second that kept every bound, if bounds were given.
    fn goodput(&self) -> Option<f64> {
        let is_good = |answer: &&Answer| self.goodput.iter().all(|bound| bound.is_kept_by(answer));
        let good = self.answers.iter().filter(is_good).count();
        (!self.goodput.is_empty()).then(|| good as f64 / self.seconds)
    }

    /// The report as scripts read it.
    pub(super) fn json(&self) -> Value {
        let mut report = json!({
            "model": self.model,
            "completed": self.completed(),
            "failed": self.errors.len(),
            "duration_seconds": self.seconds,
            "requests_per_second": self.completed() as f64 / self.seconds,
            "goodput_requests_per_second": self.goodput(),
            "input_tokens": self.input_tokens(),
            "output_tokens": self.output_tokens(),
            "output_tokens_per_second": self.output_tokens() as f64 / self.seconds,
            "total_tokens_per_second": (self.input_tokens() + self.output_tokens()) as f64 / self.seconds,
            "arguments": self.asked,
            "first_error": self.first_error(),
        });
        for metric in Metric::ALL {
            report[format!("{}_ms", metric.name())] = self.distribution(metric).json(&self.percentiles);
        }
        report
    }

    /// Prints the report as people read it.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let mut text = String::new();
        let (requests, seconds) = (self.completed() as f64 / self.seconds, self.seconds);
        writeln!(
            text,
            "{}: {} requests in {seconds:.2} s, {requests:.2} a second",
            self.model,
            self.completed()
        )?;
        if let Some(goodput) = self.goodput() {
            writeln!(text, "goodput: {goodput:.2} requests a second")?;
        }
        let (input, output) = (self.input_tokens(), self.output_tokens());
        let rate = |tokens: usize| tokens as f64 / self.seconds;
        writeln!(text, "input:  {input} tokens")?;
        writeln!(
            text,
            "output: {output} tokens, {:.1} a second ({:.1} with input)",
            rate(output),
            rate(input + output)
        )?;
        write!(text, "{:24}{:>10}", "milliseconds", "mean")?;
        for percent in &self.percentiles {
            write!(text, "{:>10}", format!("p{percent}"))?;
        }
        writeln!(text)?;
        for metric in Metric::ALL {
            let distribution = self.distribution(metric);
            write!(text, "{:24}", metric.title())?;
            let percentiles = self.percentiles.iter().map(|percent| distribution.percentile(*percent));
            for value in std::iter::once(distribution.mean()).chain(percentiles) {
                write!(text, "{:>10}", value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}")))?;
            }
            writeln!(text)?;
        }
        if let Some(error) = self.first_error() {
            writeln!(text, "{} requests failed; the first: {error}", self.errors.len())?;
        }
        print_text(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(output_tokens: usize, to_first_token: u64, total: u64) -> Answer {
        Answer {
            prompt_tokens: 3,
            output_tokens,
            to_first_token: Duration::from_millis(to_first_token),
            total: Duration::from_millis(total),
            between_tokens: vec![],
        }
    }

    #[test]
    fn time_per_output_token_leaves_out_the_first() {
        assert_eq!(Metric::Tpot.of(&answer(5, 100, 140)), [10.0]);
        assert!(Metric::Tpot.of(&answer(1, 100, 140)).is_empty());
    }

    #[test]
    fn a_request_is_good_when_it_keeps_every_bound() {
        let bound = |text: &str| text.parse::<Goodput>().unwrap();
        assert!(bound("ttft:100").is_kept_by(&answer(5, 100, 140)));
        assert!(!bound("tpot:9.5").is_kept_by(&answer(5, 100, 140)));
        assert!(bound("tpot:9.5").is_kept_by(&answer(1, 100, 140)), "it has no time per token");
        for wrong in ["ttft", "itl:5", "ttft:-1", "ttft:soon", ""] {
            assert!(wrong.parse::<Goodput>().unwrap_err().contains("expected ttft, tpot or e2el"), "{wrong}");
        }
    }
}
