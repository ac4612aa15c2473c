//! Everything the API answers instead of a result, each with its status and an OpenAI error body.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use nibble_engine::SubmitError;
use nibble_model::chat_template::ChatTemplateError;
use nibble_model::error::CheckpointError;
use serde::Serialize;

use crate::body::BodyTimedOut;

/// Seconds after which a client that met a full queue may try again.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// Why a request was refused or could not be finished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The body is no JSON, or no object.
    #[error("the body is not a JSON object: {problem}")]
    InvalidJson { problem: String },
    /// The body could not be read.
    #[error("the body could not be read: {problem}")]
    UnreadableBody { problem: String },
    /// The body is not declared as JSON.
    #[error("the content type is {found}, expected application/json")]
    UnsupportedMediaType { found: String },
    /// The body is larger than the server takes.
    #[error("the body is larger than {limit_bytes} bytes; shorten the prompt")]
    BodyTooLarge { limit_bytes: usize },
    /// The body came too slowly.
    #[error("{0}")]
    BodyTimedOut(String),
    /// A page in a browser speaks to the admin address.
    #[error("the admin address does not answer web pages: the request has an Origin header")]
    FromWebPage,
    /// A field that must be there is not.
    #[error("{param} is missing, expected {expected}")]
    MissingField { param: String, expected: String },
    /// A field has another type or value than it may have.
    #[error("{message}")]
    InvalidField { param: String, message: String },
    /// A field that nobody knows.
    #[error("{param} is not a field of this request; remove it")]
    UnknownField { param: String },
    /// A field whose value would change the answer, in a way that is not built.
    #[error("{param} is {found}, which is not supported; leave it out")]
    UnsupportedField { param: String, found: String },
    /// A completion for which the request leaves no next token.
    #[error("{message}")]
    CannotGoOn { message: String },
    /// A prompt that can never be held.
    #[error("{message}")]
    ContextLength { param: String, message: String },
    /// The conversation cannot be put into the model's form.
    #[error(transparent)]
    ChatTemplate(#[from] ChatTemplateError),
    /// The model has no chat template.
    #[error(
        "the model {model} has no chat template; use /v1/completions, or add a chat_template.jinja to the model"
    )]
    NoChatTemplate { model: String },
    /// A model that is not served here.
    #[error("the model {found:?} is not served here, expected {expected:?}")]
    ModelNotFound { found: String, expected: String },
    /// No such address.
    #[error("there is no {path} here")]
    NotFound { path: String },
    /// The address exists, not for this method.
    #[error("{path} does not accept {method}")]
    MethodNotAllowed { method: String, path: String },
    /// No API key, or a wrong one.
    #[error("the API key is missing or wrong; send it as \"Authorization: Bearer KEY\"")]
    Unauthorized,
    /// Too many requests wait.
    #[error("{message}")]
    QueueFull { message: String },
    /// The engine does not accept or could not finish requests.
    #[error("{message}")]
    Unavailable { message: String },
    /// A defect of the server or the model's files.
    #[error("{message}")]
    Internal { message: String },
}

/// The body of an error, as OpenAI's clients expect it.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody {
    error: ErrorObject,
}

#[derive(Debug, Serialize)]
struct ErrorObject {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// An [`ApiError::InvalidField`] that says what was found and what is expected.
    pub(crate) fn invalid(
        param: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Self {
        let param = param.into();
        let message = format!("{param} is {found}, expected {expected}");
        Self::InvalidField { param, message }
    }

    /// The engine's refusal; `prompt` names the field that the prompt came from.
    pub(crate) fn submit(error: SubmitError, prompt: &str) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::EmptyPrompt => Self::InvalidField { param: prompt.to_owned(), message },
            SubmitError::NoEmbeddings => Self::InvalidField { param: "model".to_owned(), message },
            // The engine's name for what came from this field.
            SubmitError::Invalid(invalid) if invalid.parameter == "prompt" => {
                Self::invalid(prompt, invalid.found, invalid.expected)
            }
            SubmitError::Invalid(invalid) => {
                Self::InvalidField { param: invalid.parameter.to_owned(), message }
            }
            SubmitError::TooLong { .. } => Self::ContextLength { param: prompt.to_owned(), message },
            SubmitError::QueueFull { .. } => Self::QueueFull { message },
            SubmitError::ShuttingDown | SubmitError::EngineFailed { .. } => Self::Unavailable { message },
        }
    }

    /// Status, type and code.
    fn kind(&self) -> (StatusCode, &'static str, Option<&'static str>) {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        match self {
            Self::InvalidJson { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_json")),
            Self::UnreadableBody { .. } => (StatusCode::BAD_REQUEST, INVALID, None),
            Self::UnsupportedMediaType { .. } => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_content_type"))
            }
            Self::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large")),
            Self::BodyTimedOut(_) => (StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout")),
            Self::FromWebPage => (StatusCode::FORBIDDEN, INVALID, Some("forbidden")),
            Self::MissingField { .. } => {
                (StatusCode::BAD_REQUEST, INVALID, Some("missing_required_parameter"))
            }
            Self::InvalidField { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("invalid_value")),
            Self::UnknownField { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("unknown_parameter")),
            Self::UnsupportedField { .. } => {
                (StatusCode::BAD_REQUEST, INVALID, Some("unsupported_parameter"))
            }
            Self::ContextLength { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded")),
            Self::CannotGoOn { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("no_token_left")),
            Self::ChatTemplate(_) => (StatusCode::BAD_REQUEST, INVALID, Some("chat_template_error")),
            Self::NoChatTemplate { .. } => (StatusCode::BAD_REQUEST, INVALID, Some("no_chat_template")),
            Self::ModelNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, Some("model_not_found")),
            Self::NotFound { .. } => (StatusCode::NOT_FOUND, INVALID, Some("unknown_url")),
            Self::MethodNotAllowed { .. } => {
                (StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"))
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key")),
            Self::QueueFull { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"))
            }
            Self::Unavailable { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("service_unavailable"))
            }
            Self::Internal { .. } => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, Some("internal_error")),
        }
    }

    /// The field of the request that is to blame.
    fn param(&self) -> Option<&str> {
        match self {
            Self::MissingField { param, .. }
            | Self::InvalidField { param, .. }
            | Self::UnknownField { param }
            | Self::UnsupportedField { param, .. }
            | Self::ContextLength { param, .. } => Some(param),
            Self::ModelNotFound { .. } => Some("model"),
            Self::ChatTemplate(_) | Self::NoChatTemplate { .. } => Some("messages"),
            _ => None,
        }
    }

    /// The error as an OpenAI client reads it, in a body or inside a stream.
    pub(crate) fn body(&self) -> ErrorBody {
        let (_, r#type, code) = self.kind();
        let param = self.param().map(str::to_owned);
        ErrorBody { error: ErrorObject { message: self.to_string(), r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, ..) = self.kind();
        if status.is_server_error() {
            tracing::error!(%status, error = %self, "request failed");
        } else {
            tracing::debug!(%status, error = %self, "request refused");
        }
        let mut response = (status, Json(self.body())).into_response();
        match self {
            Self::QueueFull { .. } => response.headers_mut().insert(RETRY_AFTER, RETRY_AFTER_SECONDS),
            Self::Unauthorized => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
            }
            _ => None,
        };
        response
    }
}

impl ApiError {
    /// Why a body of at most `limit_bytes` could not be read.
    pub(crate) fn unreadable(rejection: &BytesRejection, limit_bytes: usize) -> Self {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            return Self::BodyTooLarge { limit_bytes };
        }
        if let Some(timed_out) = BodyTimedOut::cause_of(rejection) {
            return Self::BodyTimedOut(timed_out.to_string());
        }
        Self::UnreadableBody { problem: rejection.body_text() }
    }
}

/// What the tokenizer cannot do with a checked request is a defect of the model's files.
impl From<CheckpointError> for ApiError {
    fn from(error: CheckpointError) -> Self {
        Self::Internal { message: error.to_string() }
    }
}
