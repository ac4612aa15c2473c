//! The API as a client sees it, over a model that knows the alphabet.

mod admin;
mod answers;
mod anything;
mod chats;
mod embeddings;
mod files;
mod hang_up;
mod http2;
mod lenient;
mod logs;
mod metrics;
mod openapi;
mod prompts;
mod refusals;
mod service;
mod sharing;
mod slow_clients;
mod streams;
mod structured;
mod support;
mod tool_calls;
mod traces;
