//! The OpenAI HTTP API and metrics, over the engine.
//!
//! The way of a request: `observe` names it, `openai::fields` takes its body apart, `validation` makes a
//! [`validation::ValidRequest`] of it, with a constraint by `grammar` if the answer must have a form, `generation`
//! submits it and turns tokens into text, and the endpoint writes that, with the calls that `tools` and the thoughts
//! that `reasoning` find in it, as one body or through `stream` as events. The engine calls back the sink that puts an event into a channel, and
//! beside each step the constraints.
#![forbid(unsafe_code)]

mod admin;
mod answer_parser;
mod app;
mod auth;
mod body;
mod generation;
mod grammar;
mod health;
mod lenient;
mod messages;
mod metrics;
mod observe;
mod openai;
mod reasoning;
mod serve;
mod stop_strings;
mod stream;
#[cfg(test)]
mod testing;
mod tools;
mod traces;
mod validation;

pub use app::{ServedModel, ServerOptions, Service};
pub use auth::{ApiKeys, KeyError, Tenant};
pub use reasoning::ReasoningFormat;
pub use serve::{ConnectionLimits, ServeOptions, ServerError, Socket, Sockets, Tls, TlsError};
pub use tools::ToolCallFormat;
pub use traces::{Traces, TracesError};
