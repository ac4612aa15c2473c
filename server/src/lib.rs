//! The OpenAI HTTP API and metrics, over the engine.
#![forbid(unsafe_code)]
