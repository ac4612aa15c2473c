//! The API as a client sees it, over a model that knows the alphabet.

mod answers;
mod anything;
mod chats;
mod embeddings;
mod hang_up;
mod prompts;
mod refusals;
mod service;
mod streams;
mod structured;
mod support;
mod tool_calls;
