//! Scheduler, KV blocks, sampling and the engine thread. No tokio, no HTTP.
#![forbid(unsafe_code)]
