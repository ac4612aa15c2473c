//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use nibble_model::tokenizer::Tokenizer;

use super::error::ApiError;
use super::fields::Fields;
use super::types::chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatMessage, ChatRequest, ChatResponse,
};
use super::types::common::Usage;
use super::{blocking, logprobs};
use crate::app::{AppState, seconds_since_1970};
use crate::generation::{ChoiceEvent, CompletedChoice, Generation};
use crate::observe::RequestIdentity;
use crate::stream::{Chunks, stream};
use crate::validation::{Delivery, ValidRequest};

/// Answers the last message of a conversation.
pub(crate) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    Extension(identity): Extension<RequestIdentity>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let request = ChatRequest::try_from(fields)?;
    let request = blocking(&state, move |state| ValidRequest::chat(&state.model, request)).await?;
    let generation = Generation::start(&state, &request, identity.arrived_at)?;
    let answer = Answer {
        id: format!("chatcmpl-{}", identity.id),
        created: seconds_since_1970(),
        model: state.model.name.clone(),
        tokenizer: Arc::clone(&state.model.tokenizer),
    };
    match request.delivery() {
        Delivery::Stream { options } => Ok(stream(generation, answer, options, state.options.keep_alive)),
        Delivery::Whole => {
            let (choices, usage) = generation.collect().await?;
            Ok(Json(answer.whole(choices, usage)).into_response())
        }
    }
}

/// What all parts of an answer share.
struct Answer {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
}

impl Answer {
    fn whole(self, choices: Vec<CompletedChoice>, usage: Usage) -> ChatResponse {
        let choice = |(index, choice): (usize, CompletedChoice)| ChatChoice {
            index,
            logprobs: logprobs::chat(&self.tokenizer, &choice.tokens),
            message: ChatMessage { role: "assistant", content: choice.text, refusal: None },
            finish_reason: choice.finish.outcome.name(),
            stop_reason: choice.finish.stop_reason,
        };
        ChatResponse {
            choices: choices.into_iter().enumerate().map(choice).collect(),
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            usage,
        }
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

impl Chunks for Answer {
    type Chunk = ChatChunk;

    fn opening(&self, choice: usize) -> Option<ChatChunk> {
        let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
        let choice =
            ChatChunkChoice { index: choice, delta, logprobs: None, finish_reason: None, stop_reason: None };
        Some(self.chunk(vec![choice], None))
    }

    fn event(&self, event: ChoiceEvent, usage: Option<Usage>) -> ChatChunk {
        let content = (!event.text.is_empty()).then_some(event.text);
        let choice = ChatChunkChoice {
            index: event.choice,
            delta: ChatDelta { role: None, content },
            logprobs: logprobs::chat(&self.tokenizer, &event.tokens),
            finish_reason: event.finish.as_ref().map(|finish| finish.outcome.name()),
            stop_reason: event.finish.and_then(|finish| finish.stop_reason),
        };
        self.chunk(vec![choice], usage)
    }

    fn usage(&self, usage: Usage) -> ChatChunk {
        self.chunk(Vec::new(), Some(usage))
    }
}
