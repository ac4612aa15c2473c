//! Requests and responses as they are on the wire.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod sampling;
pub(crate) mod structured;
