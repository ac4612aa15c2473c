//! `/v1/chat/completions`: request, response, chunk of a stream.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::common::{PromptLogprobs, Usage, as_float};
use super::sampling::GenerationFields;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;

/// A chat completion request, as it was sent.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) generation: GenerationFields,
    pub(crate) messages: Vec<Map<String, Value>>,
    /// As they are: the template gets them so.
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: Option<Value>,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) max_completion_tokens: Option<u32>,
    pub(crate) logprobs: bool,
    pub(crate) top_logprobs: Option<u32>,
    /// Unless the last message is continued, true.
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) continue_final_message: bool,
    pub(crate) echo: bool,
    pub(crate) chat_template: Option<String>,
    pub(crate) reasoning_effort: Option<ReasoningEffort>,
    pub(crate) include_reasoning: bool,
    pub(crate) add_special_tokens: bool,
    pub(crate) documents: Option<Vec<Value>>,
    pub(crate) chat_template_kwargs: Map<String, Value>,
}

/// How much the model shall think, where its chat template knows the word.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
}

impl ReasoningEffort {
    /// What templates know it as.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

impl TryFrom<Fields> for ChatRequest {
    type Error = ApiError;

    fn try_from(mut fields: Fields) -> Result<Self, ApiError> {
        const BOOLEAN: &str = "true or false";
        const EFFORTS: &str = "\"none\", \"minimal\", \"low\", \"medium\" or \"high\"";
        let request = Self {
            messages: fields.require("messages", "a list of messages")?,
            tools: fields.take("tools", "a list of tools")?.unwrap_or_default(),
            tool_choice: fields.take("tool_choice", "a choice")?,
            parallel_tool_calls: fields.take("parallel_tool_calls", BOOLEAN)?.unwrap_or(true),
            max_completion_tokens: fields.take("max_completion_tokens", "an integer of at least 1")?,
            logprobs: fields.take("logprobs", BOOLEAN)?.unwrap_or(false),
            top_logprobs: fields.take("top_logprobs", "an integer of at least 0")?,
            add_generation_prompt: fields.take("add_generation_prompt", BOOLEAN)?,
            continue_final_message: fields.take("continue_final_message", BOOLEAN)?.unwrap_or(false),
            echo: fields.take("echo", BOOLEAN)?.unwrap_or(false),
            chat_template: fields.take("chat_template", "a Jinja template")?,
            reasoning_effort: fields.take("reasoning_effort", EFFORTS)?,
            include_reasoning: fields.take("include_reasoning", BOOLEAN)?.unwrap_or(true),
            // The template writes the special tokens that the model expects.
            add_special_tokens: fields.take("add_special_tokens", BOOLEAN)?.unwrap_or(false),
            documents: fields.take("documents", "a list of objects")?,
            chat_template_kwargs: fields.take("chat_template_kwargs", "an object")?.unwrap_or_default(),
            generation: GenerationFields::take(&mut fields)?,
        };
        fields.finish()?;
        Ok(request)
    }
}

/// A whole chat completion.
#[derive(Debug, Serialize)]
pub(crate) struct ChatResponse {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
}

/// One of the `n` answers.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: ChatMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: &'static str,
    pub(crate) stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// The assistant's message.
#[derive(Debug, Serialize)]
pub(crate) struct ChatMessage {
    pub(crate) role: &'static str,
    /// Absent when there are calls only.
    pub(crate) content: Option<String>,
    pub(crate) refusal: Option<String>,
    /// What the model thought first.
    #[serde(flatten)]
    pub(crate) reasoning: Reasoning,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Debug, Serialize)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    pub(crate) r#type: &'static str,
    pub(crate) function: FunctionCall,
}

/// What a tool is called with.
#[derive(Debug, Serialize)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// JSON text, as the model wrote it.
    pub(crate) arguments: String,
}

/// A part of a streamed chat completion.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChunk {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChatChunkChoice>,
    /// In the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
}

/// What a chunk adds to one of the answers.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: ChatDelta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// What a chunk adds to the message.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(flatten)]
    pub(crate) reasoning: Reasoning,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCallDelta>,
}

/// What the model thinks, under the name that most clients know and under vLLM's newer one.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Reasoning {
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
}

impl From<String> for Reasoning {
    fn from(text: String) -> Self {
        let text = Some(text).filter(|text| !text.is_empty());
        Self { reasoning_content: text.clone(), reasoning: text }
    }
}

/// What a chunk adds to a call.
#[derive(Debug, Serialize)]
pub(crate) struct ToolCallDelta {
    pub(crate) index: usize,
    /// In the first delta of a call, as the type and the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) r#type: Option<&'static str>,
    pub(crate) function: FunctionDelta,
}

/// What a chunk adds to a function's call.
#[derive(Debug, Serialize)]
pub(crate) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

/// Log probabilities of the tokens of a message or a chunk.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatTokenLogprob>,
}

/// The log probability of one token, and of the most likely ones in its place.
#[derive(Debug, Serialize)]
pub(crate) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(crate) token: TokenEntry,
    pub(crate) top_logprobs: Vec<TokenEntry>,
}

/// A token and its log probability.
#[derive(Debug, Serialize)]
pub(crate) struct TokenEntry {
    pub(crate) token: String,
    #[serde(serialize_with = "as_float")]
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}
