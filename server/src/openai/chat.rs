//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use nibble_model::tokenizer::Tokenizer;
use uuid::Uuid;

use super::blocking;
use super::error::ApiError;
use super::fields::Fields;
use super::logprobs::LogprobWriter;
use super::types::chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, ChatMessage, ChatRequest, ChatResponse, FunctionCall,
    FunctionDelta, ToolCall, ToolCallDelta,
};
use super::types::common::Usage;
use crate::answer_parser::{AnswerDelta, AnswerParser};
use crate::app::{AppState, seconds_since_1970};
use crate::generation::{ChoiceEvent, CompletedChoice, Generation};
use crate::metrics::Outcome;
use crate::observe::RequestIdentity;
use crate::stream::{Chunks, stream};
use crate::tools::CallDelta;
use crate::validation::{Delivery, Presentation, ValidRequest};

/// Answers the last message of a conversation.
pub(crate) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    Extension(identity): Extension<RequestIdentity>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let request = ChatRequest::try_from(fields)?;
    let request = blocking(&state, move |state| ValidRequest::chat(state, request)).await?;
    let generation = Generation::start(&state, &request, identity.arrived_at)?;
    let answer = Answer {
        id: format!("chatcmpl-{}", request.id(&identity.id)),
        created: seconds_since_1970(),
        model: state.model.name.clone(),
        tokenizer: Arc::clone(&state.model.tokenizer),
        parsers: (0..generation.choices()).map(|_| AnswerParser::new(&request)).collect(),
        presentation: request.presentation(),
        echo: request.prompts().iter().map(|prompt| prompt.echo.as_str()).collect(),
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
    /// What finds thoughts and calls of tools in the text of each choice.
    parsers: Vec<AnswerParser>,
    presentation: Presentation,
    /// What the content of each choice begins with.
    echo: String,
}

impl Answer {
    fn whole(mut self, choices: Vec<CompletedChoice>, usage: Usage) -> ChatResponse {
        let (mut prompt_logprobs, mut prompt_token_ids) = (None, None);
        let choice = |(index, choice): (usize, CompletedChoice)| {
            let CompletedChoice { text, prompt, tokens, finish, .. } = choice;
            let delta = self.parse(index, &text, true);
            let tool_calls: Vec<ToolCall> =
                delta.calls.into_iter().map(|(_, call)| tool_call(call)).collect();
            let content = self.echo.clone() + &delta.content;
            let content = Some(content).filter(|text| tool_calls.is_empty() || !text.is_empty());
            let writer = self.writer();
            if index == 0 {
                // All choices have the one prompt.
                (prompt_logprobs, prompt_token_ids) = (writer.prompt(&prompt), writer.prompt_ids(&prompt));
            }
            ChatChoice {
                index,
                logprobs: writer.chat(&tokens),
                token_ids: writer.ids(&tokens),
                message: ChatMessage {
                    role: "assistant",
                    content,
                    refusal: None,
                    reasoning: delta.reasoning.into(),
                    tool_calls,
                },
                finish_reason: self.finish_reason(index, finish.outcome),
                stop_reason: finish.stop_reason,
            }
        };
        ChatResponse {
            choices: choices.into_iter().enumerate().map(choice).collect(),
            prompt_logprobs,
            prompt_token_ids,
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            usage,
        }
    }

    fn writer(&self) -> LogprobWriter<'_> {
        LogprobWriter { tokenizer: &self.tokenizer, presentation: self.presentation }
    }

    /// What the next text of a choice brings, and what was kept back if it is the `last`.
    fn parse(&mut self, choice: usize, text: &str, last: bool) -> AnswerDelta {
        let mut delta = self.parsers[choice].push(text, last);
        if !self.presentation.reasoning {
            delta.reasoning.clear();
        }
        delta
    }

    fn finish_reason(&self, choice: usize, outcome: Outcome) -> &'static str {
        match outcome {
            Outcome::Stop if self.parsers[choice].has_calls() => "tool_calls",
            outcome => outcome.name(),
        }
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            prompt_token_ids: None,
            usage,
        }
    }
}

impl Chunks for Answer {
    type Chunk = ChatChunk;

    fn opening(&self, choice: usize) -> Option<ChatChunk> {
        let content = Some(self.echo.clone());
        let delta = ChatDelta { role: Some("assistant"), content, ..ChatDelta::default() };
        let choice = ChatChunkChoice {
            index: choice,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        };
        Some(self.chunk(vec![choice], None))
    }

    fn event(&mut self, event: ChoiceEvent, usage: Option<Usage>) -> Option<ChatChunk> {
        let ChoiceEvent { choice: index, text, prompt, tokens, finish, .. } = event;
        let delta = self.parse(index, &text, finish.is_some());
        let logprobs = self.writer().chat(&tokens);
        let token_ids = self.writer().ids(&tokens);
        if delta.is_empty() && logprobs.is_none() && token_ids.is_none() && finish.is_none() {
            return None;
        }
        let content = (!delta.content.is_empty()).then_some(delta.content);
        let tool_calls = delta.calls.into_iter().map(|(index, call)| tool_call_delta(index, call)).collect();
        let choice = ChatChunkChoice {
            index,
            delta: ChatDelta { role: None, content, reasoning: delta.reasoning.into(), tool_calls },
            logprobs,
            finish_reason: finish.as_ref().map(|finish| self.finish_reason(index, finish.outcome)),
            stop_reason: finish.and_then(|finish| finish.stop_reason),
            token_ids,
        };
        let prompt_token_ids = self.writer().prompt_ids(&prompt);
        Some(ChatChunk { prompt_token_ids, ..self.chunk(vec![choice], usage) })
    }

    fn usage(&self, usage: Usage) -> ChatChunk {
        self.chunk(Vec::new(), Some(usage))
    }
}

/// A whole call.
fn tool_call(call: CallDelta) -> ToolCall {
    let function = FunctionCall { name: call.name.unwrap_or_default(), arguments: call.arguments };
    ToolCall { id: call_id(), r#type: "function", function }
}

fn tool_call_delta(index: usize, call: CallDelta) -> ToolCallDelta {
    let begins = call.name.is_some();
    ToolCallDelta {
        index,
        id: begins.then(call_id),
        r#type: begins.then_some("function"),
        function: FunctionDelta { name: call.name, arguments: call.arguments },
    }
}

fn call_id() -> String {
    format!("call_{}", Uuid::new_v4().simple())
}
