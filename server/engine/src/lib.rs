//! Scheduler, KV blocks, sampling and the engine thread. No tokio, no HTTP.
//!
//! The way of a request: [`EngineHandle::submit`] checks it and sends it to the one engine thread; there the
//! scheduler plans a step, a [`StepRunner`] computes its logits, the sampler picks the tokens, and every
//! token goes to the request's [`EventSink`], ending with exactly one terminal event.
#![forbid(unsafe_code)]

mod blocks;
mod constraint;
mod engine;
mod engine_thread;
mod handle;
mod ledger;
mod model_runner;
mod pooling;
mod prompt_lookup;
mod request;
mod runner;
mod sampling;
mod scheduler;
mod sequence;
mod stats;

pub use constraint::{ConstraintError, TokenConstraint, TokenMask};
pub use engine::{Engine, EngineFailure, StartError};
pub use handle::{EngineConfig, EngineHandle, Health, SubmitError};
pub use model_runner::ModelRunner;
pub use nibble_model::pooling_config::Pooling;
pub use request::{Blame, EventSink, Failure, FinishReason, Request, RequestEvent, RequestId, SinkState};
pub use runner::{DeviceSampler, RunnerLimits, StepError, StepRunner, StepValues};
pub use sampling::{InvalidParameter, SamplingParameters, TokenLogprob, TokenLogprobs};
pub use stats::{EngineStats, FinishedCounts, Histogram, token_bounds};
