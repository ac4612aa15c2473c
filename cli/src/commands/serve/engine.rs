//! What of `nibble serve` concerns the engine.

use clap::{Args, ValueEnum, value_parser};
use nibble_engine::EngineConfig;

/// How many sequences run, how they share a step, and what is guessed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArguments {
    /// Most sequences that run at once.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..))]
    pub(super) max_num_seqs: u32,
    /// Most tokens in a step: larger steps compute prompts faster, smaller ones hold up running answers less.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = value_parser!(u32).range(1..))]
    max_num_batched_tokens: u32,
    /// Who is served first: whoever came first, or requests with a lower `priority`, which then also take the place of
    /// running ones with a higher number. Equal ones of several tenants take turns.
    #[arg(long, value_enum, default_value_t = SchedulingPolicy::Fcfs)]
    pub(super) scheduling_policy: SchedulingPolicy,
    /// Most requests of a tenant that wait; more are answered with 429.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = value_parser!(u32).range(1..))]
    max_waiting_requests: u32,
    /// Compute every prompt from its beginning; answers are the same.
    #[arg(long)]
    no_prefix_caching: bool,
    /// Guess up to N tokens ahead where an answer repeats its prompt or itself (prompt lookup); answers are the same. 0
    /// guesses nothing.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(..=64))]
    speculative_tokens: u32,
    /// Guess while a step has at most this many tokens, guesses included.
    #[arg(long, value_name = "N", default_value_t = EngineConfig::default().max_step_tokens_with_drafts)]
    speculative_step_tokens: usize,
    /// Share of a tenant, the name of a key in --api-key-file, in the tokens of the server while others wait; 1 where
    /// not given. May be given several times.
    #[arg(long, value_name = "NAME=WEIGHT", value_parser = parse_tenant_weight)]
    tenant_weight: Vec<(String, u32)>,
}

/// What `priority` in a request means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SchedulingPolicy {
    Fcfs,
    Priority,
}

impl EngineArguments {
    /// What they ask for.
    pub(super) fn config(&self) -> EngineConfig {
        let default = EngineConfig::default();
        let max_step_tokens = self.max_num_batched_tokens as usize;
        EngineConfig {
            max_running_sequences: self.max_num_seqs as usize,
            max_step_tokens,
            max_prefill_chunk_tokens: default.max_prefill_chunk_tokens.min(max_step_tokens),
            max_waiting_requests: self.max_waiting_requests as usize,
            prefix_caching: !self.no_prefix_caching,
            max_draft_tokens: self.speculative_tokens as usize,
            max_step_tokens_with_drafts: self.speculative_step_tokens,
            tenant_weights: self.tenant_weight.iter().cloned().collect(),
            ..default
        }
    }
}

fn parse_tenant_weight(text: &str) -> Result<(String, u32), String> {
    let (name, weight) = text.split_once('=').ok_or("expected NAME=WEIGHT, such as batch=1")?;
    match weight.parse() {
        Ok(weight) if weight > 0 => Ok((name.to_owned(), weight)),
        _ => Err(format!("the weight is \"{weight}\", expected a whole number of at least 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_a_positive_number_behind_a_name() {
        assert_eq!(parse_tenant_weight("batch=3"), Ok(("batch".to_owned(), 3)));
        for wrong in ["batch", "batch=", "batch=0", "batch=-1", "batch=1.5"] {
            assert!(parse_tenant_weight(wrong).is_err(), "{wrong}");
        }
    }
}
