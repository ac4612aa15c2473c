//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use nibble_model::tokenizer::Tokenizer;

use super::blocking;
use super::error::ApiError;
use super::fields::Fields;
use super::logprobs::LogprobWriter;
use super::types::common::Usage;
use super::types::completions::{CompletionChoice, CompletionRequest, CompletionResponse};
use crate::app::{AppState, seconds_since_1970};
use crate::generation::{ChoiceEvent, CompletedChoice, Generation};
use crate::observe::RequestIdentity;
use crate::stream::{Chunks, stream};
use crate::validation::{Delivery, Presentation, ValidRequest};

/// Continues one or several prompts.
pub(crate) async fn completions(
    State(state): State<Arc<AppState>>,
    Extension(identity): Extension<RequestIdentity>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let request = CompletionRequest::try_from(fields)?;
    let request = blocking(&state, move |state| ValidRequest::completion(state, request)).await?;
    let generation = Generation::start(&state, &request, identity.arrived_at)?;
    let answer = Answer {
        id: format!("cmpl-{}", request.id(&identity.id)),
        created: seconds_since_1970(),
        model: state.model.name.clone(),
        tokenizer: Arc::clone(&state.model.tokenizer),
        presentation: request.presentation(),
    };
    match request.delivery() {
        Delivery::Stream { options } => Ok(stream(generation, answer, options, state.options.keep_alive)),
        Delivery::Whole => {
            let (choices, usage) = generation.collect().await?;
            let choices = choices.into_iter().enumerate().map(|(index, choice)| {
                let CompletedChoice { text, prompt, tokens, embedding, finish } = choice;
                let finish = Some(finish);
                answer.choice(ChoiceEvent { choice: index, text, prompt, tokens, embedding, finish })
            });
            Ok(Json(answer.response(choices.collect(), Some(usage))).into_response())
        }
    }
}

/// What all parts of an answer share.
struct Answer {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    presentation: Presentation,
}

impl Answer {
    fn choice(&self, event: ChoiceEvent) -> CompletionChoice {
        let ChoiceEvent { choice, text, prompt, tokens, finish, .. } = event;
        let writer = LogprobWriter { tokenizer: &self.tokenizer, presentation: self.presentation };
        CompletionChoice {
            index: choice,
            text,
            logprobs: writer.completion(&prompt, &tokens),
            finish_reason: finish.as_ref().map(|finish| finish.outcome.name()),
            stop_reason: finish.and_then(|finish| finish.stop_reason),
            prompt_logprobs: writer.prompt(&prompt),
            token_ids: writer.ids(&tokens),
            prompt_token_ids: writer.prompt_ids(&prompt),
        }
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

impl Chunks for Answer {
    type Chunk = CompletionResponse;

    fn opening(&self, _: usize) -> Option<CompletionResponse> {
        None
    }

    fn event(&mut self, event: ChoiceEvent, usage: Option<Usage>) -> Option<CompletionResponse> {
        Some(self.response(vec![self.choice(event)], usage))
    }

    fn usage(&self, usage: Usage) -> CompletionResponse {
        self.response(Vec::new(), Some(usage))
    }
}
