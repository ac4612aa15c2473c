//! `nibble bench serve`: a running server under load, as its clients see it.
//!
//! Options and figures are those of `vllm bench serve` with random prompts, so that results can be put side by
//! side. Any server with OpenAI's streams will do.

mod client;
mod load;
mod report;
mod statistics;
mod workload;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use nibble_model::checkpoint::replace_file;

use crate::output::print_json;
use client::Client;
use report::{Goodput, Report};
use workload::Workload;

/// Arguments of `nibble bench serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example: nibble bench serve --url http://127.0.0.1:8000 --max-concurrency 16 \
    --num-prompts 64 --random-input-len 60 --random-output-len 64 --ignore-eos")]
pub(crate) struct ServeArguments {
    /// Where the server listens, such as http://127.0.0.1:8000; a path of /v1 may follow.
    #[arg(long)]
    url: String,
    /// The model's name in the API; the first that the server lists when not given.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Sent as the bearer token.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// What is measured.
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    endpoint: Endpoint,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    num_prompts: u32,
    /// Requests before them that are not measured, one after the other.
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_warmups: u32,
    /// Most requests at once; those that arrive meanwhile wait, which counts as no time of theirs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: Option<u32>,
    /// Requests that arrive in a second, on average; inf for all at once.
    #[arg(long, value_name = "RATE", default_value = "inf", value_parser = parse_positive)]
    request_rate: f64,
    /// Shape of the gamma distribution of times between arrivals: 1 is a Poisson process, less comes in bursts, more
    /// is more even.
    #[arg(long, value_name = "SHAPE", default_value = "1.0", value_parser = parse_finite)]
    burstiness: f64,
    /// Words of a prompt. Each is one token in most vocabularies; the report says how many tokens the server counted.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    random_input_len: u32,
    /// Tokens to generate.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    random_output_len: u32,
    /// Lengths are drawn evenly from this part below to this part above: 0.5 of 100 is 50 to 150.
    #[arg(long, value_name = "RATIO", default_value = "0", value_parser = parse_ratio)]
    random_range_ratio: f64,
    /// Words that all prompts have in common, before their own: what a prefix cache can find.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    random_prefix_len: u32,
    /// Decides prompts, lengths and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ask for exactly --random-output-len tokens, whatever the model says.
    #[arg(long)]
    ignore_eos: bool,
    /// Percentiles of latencies, beside the median.
    #[arg(long, value_name = "P,P,...", value_delimiter = ',', default_value = "90,99", value_parser = parse_percentile)]
    percentiles: Vec<f64>,
    /// Count requests a second that keep all these bounds in milliseconds, such as ttft:500 tpot:50 e2el:5000.
    #[arg(long, value_name = "METRIC:MS", num_args = 1..)]
    goodput: Vec<Goodput>,
    /// Also write the JSON to this file.
    #[arg(long, value_name = "FILE")]
    save_result: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The endpoints that stream text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// Runs the command.
pub(crate) fn run(arguments: &ServeArguments) -> anyhow::Result<()> {
    // One thread: on a machine that also runs the server, the load must be light.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the threads of the clients")?;
    let report = runtime.block_on(measure(arguments))?;
    if let Some(file) = &arguments.save_result {
        save(file, &format!("{:#}\n", report.json()))?;
    }
    match arguments.json {
        true => print_json(&report.json()),
        false => report.print(),
    }
}

async fn measure(arguments: &ServeArguments) -> anyhow::Result<Report> {
    let client = Client::connect(arguments).await?;
    let workload = Workload::new(arguments)?;
    let run = load::run(client.clone(), workload, arguments).await?;
    let report = Report::new(arguments, client.model().to_owned(), run);
    anyhow::ensure!(
        report.completed() > 0,
        "none of {} requests succeeded: {}",
        arguments.num_prompts,
        report.first_error().unwrap_or_default()
    );
    Ok(report)
}

fn save(file: &Path, text: &str) -> anyhow::Result<()> {
    let name = file.file_name().and_then(|name| name.to_str());
    let name =
        name.with_context(|| format!("--save-result {}: expected the name of a file", file.display()))?;
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(replace_file(directory, name, text.as_bytes())?)
}

fn parse_positive(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|value| *value > 0.0)
        .ok_or_else(|| "expected a number above 0, or inf".to_owned())
}

fn parse_finite(text: &str) -> Result<f64, String> {
    parse_positive(text)
        .ok()
        .filter(|value| value.is_finite())
        .ok_or_else(|| "expected a number above 0".to_owned())
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| (0.0..1.0).contains(value));
    value.ok_or_else(|| "expected a number from 0 to below 1".to_owned())
}

fn parse_percentile(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| (0.0..=100.0).contains(value));
    value.ok_or_else(|| "expected a number from 0 to 100".to_owned())
}
