//! Starting an engine and learning how it ended.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::engine_thread::EngineThread;
use crate::handle::{EngineConfig, EngineHandle, Shared};
use crate::runner::{RunnerLimits, StepRunner};

/// A running engine: owns its thread, and counts as one handle until it is joined or dropped.
pub struct Engine {
    handle: EngineHandle,
    thread: JoinHandle<Result<(), EngineFailure>>,
}

/// An engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A field of [`EngineConfig`] is out of its range.
    #[error("{field} is 0, expected at least 1")]
    Config {
        /// The field.
        field: &'static str,
    },
    /// The runner has no room for any sequence.
    #[error(
        "the runner offers {0:?}, expected at least one block of one token, one token id below the vocabulary \
         size for each eos_token_id, and at least 2 tokens in a sequence"
    )]
    Limits(RunnerLimits),
    /// The system gave no thread.
    #[error("the engine's thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// The engine ended by an error; every open request got a `Failed` event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine has failed: {message}")]
pub struct EngineFailure {
    /// What happened.
    pub message: String,
}

impl Engine {
    /// Starts the engine's thread, which owns `runner` from here on.
    ///
    /// # Errors
    /// When `config` or the runner's limits allow no step, or the system gives no thread.
    pub fn start(runner: Box<dyn StepRunner>, config: EngineConfig) -> Result<Self, StartError> {
        for (field, value) in [
            ("max_running_sequences", config.max_running_sequences),
            ("max_step_tokens", config.max_step_tokens),
            ("max_prefill_chunk_tokens", config.max_prefill_chunk_tokens),
            ("max_prompt_logit_rows", config.max_prompt_logit_rows),
            ("max_waiting_requests", config.max_waiting_requests),
        ] {
            if value == 0 {
                return Err(StartError::Config { field });
            }
        }
        let limits = runner.limits();
        check_limits(&limits)?;
        tracing::info!(?limits, ?config, "the engine starts");
        let shared = Arc::new(Shared::new(limits, config));
        let (sender, commands) = mpsc::channel();
        let handle = EngineHandle::new(sender, Arc::clone(&shared));
        let thread = EngineThread::new(runner, commands, shared);
        let thread = std::thread::Builder::new()
            .name("nibble-engine".to_owned())
            .spawn(move || thread.run())
            .map_err(StartError::Thread)?;
        Ok(Self { handle, thread })
    }

    /// A handle to submit requests with.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Waits until the engine has ended: after [`EngineHandle::drain`], after a failure, or when every handle
    /// is gone and what was accepted is finished.
    ///
    /// # Errors
    /// What stopped the engine, unless it ended in order.
    pub fn join(self) -> Result<(), EngineFailure> {
        let Self { handle, thread } = self;
        // The engine runs on while a handle exists; this one must not keep it.
        drop(handle);
        thread.join().unwrap_or_else(|panic| Err(EngineFailure { message: panic_message(&*panic) }))
    }
}

fn check_limits(limits: &RunnerLimits) -> Result<(), StartError> {
    let tokens = limits.blocks.checked_mul(limits.block_size);
    let valid = tokens.is_some_and(|tokens| tokens > 0 && u32::try_from(tokens).is_ok())
        && limits.maximum_sequence_tokens >= 2
        && limits.vocabulary_size > 0
        && limits.hidden_size != Some(0)
        && limits.eos_token_ids.iter().all(|&token| (token as usize) < limits.vocabulary_size);
    if valid { Ok(()) } else { Err(StartError::Limits(limits.clone())) }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("a panic: {}", text.unwrap_or("without a message"))
}
