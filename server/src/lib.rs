//! The OpenAI HTTP API and metrics, over the engine.
//!
//! The way of a request: `observe` names it, `openai::fields` takes its body apart, `validation` makes a
//! [`validation::ValidRequest`] of it, `generation` submits it and turns tokens into text, and the endpoint
//! writes that as one body or through `stream` as events. Nothing here runs on the engine thread but the
//! sink that puts an event into a channel.
#![forbid(unsafe_code)]

mod app;
mod auth;
mod generation;
mod health;
mod metrics;
mod observe;
mod openai;
mod serve;
mod stop_strings;
mod stream;
mod validation;

pub use app::{ServedModel, ServerOptions, router};
pub use serve::{ServerError, serve};
