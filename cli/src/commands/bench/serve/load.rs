//! Sends the requests of a workload when they arrive, at most so many at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::ServeArguments;
use super::client::{Answer, Client};
use super::workload::Workload;
use crate::output::Progress;

/// What became of a workload.
pub(super) struct Run {
    /// In the order of arrival.
    pub(super) answers: Vec<anyhow::Result<Answer>>,
    /// From the first arrival to the last end.
    pub(super) duration: Duration,
}

/// Runs `workload` after the warm-up.
pub(super) async fn run(
    client: Client,
    workload: Workload,
    arguments: &ServeArguments,
) -> anyhow::Result<Run> {
    for prompt in workload.prompts.iter().cycle().take(arguments.num_warmups as usize) {
        client.answer(prompt).await.context("the warm-up request failed")?;
    }
    let total = workload.prompts.len();
    let places = arguments.max_concurrency.map_or(total, |limit| limit as usize);
    let places = Arc::new(Semaphore::new(places));
    let mut progress = Progress::new("requests");
    let mut answers: Vec<Option<anyhow::Result<Answer>>> = (0..total).map(|_| None).collect();
    let started = Instant::now();
    let mut requests = JoinSet::new();
    for (index, prompt) in workload.prompts.into_iter().enumerate() {
        let (client, places) = (client.clone(), Arc::clone(&places));
        requests.spawn(async move {
            tokio::time::sleep_until((started + prompt.arrives_at).into()).await;
            // Nobody closes the semaphore; places are given in the order of asking.
            let _place = places.acquire_owned().await;
            (index, client.answer(&prompt).await)
        });
    }
    for done in 1..=total as u64 {
        let Some(request) = requests.join_next().await else { break };
        let (index, answer) = request.context("a client panicked")?;
        answers[index] = Some(answer);
        progress.update(done, total as u64, "");
    }
    Ok(Run { answers: answers.into_iter().flatten().collect(), duration: started.elapsed() })
}
