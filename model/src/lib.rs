//! Checkpoints, tokenizer, chat template, architectures and the forward pass. Knows models, not requests.

pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod detokenizer;
pub mod error;
pub mod evaluation;
pub mod formats;
pub mod forward;
pub mod generation_config;
pub mod gguf;
mod gguf_model;
pub mod hub;
pub mod import;
pub mod inspection;
mod mapped_file;
pub mod pooling_config;
pub mod self_test;
pub mod tokenizer;
