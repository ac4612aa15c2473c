//! The router: which address is answered by what, within which limits.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use nibble_engine::{EngineHandle, Pooling};
use nibble_model::chat_template::ChatTemplate;
use nibble_model::generation_config::GenerationConfig;
use nibble_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::auth::require_key;
use crate::grammar::Grammars;
use crate::metrics::{Metrics, metrics};
use crate::observe::observe;
use crate::openai::error::ApiError;
use crate::openai::fields::BODY_LIMIT_BYTES;
use crate::openai::{chat, completions, embeddings, models, tokenize};
use crate::reasoning::{Reasoning, ReasoningFormat};
use crate::tools::ToolCallFormat;
use crate::{ServerError, health};

/// The model that a server serves.
#[derive(Clone)]
pub struct ServedModel {
    /// Its name in the API.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template, if it has one.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Its own defaults of sampling parameters.
    pub generation_config: GenerationConfig,
    /// How it makes embeddings, where a request says nothing.
    pub pooling: Pooling,
    /// The engine that runs it.
    pub engine: EngineHandle,
}

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// With keys, every request but health checks needs one of them.
    pub api_keys: Vec<String>,
    /// Time without a finished step, while there is work, after which the engine counts as stuck.
    pub stuck_after: Duration,
    /// Silence in a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// How the model calls tools; what its chat template says if absent.
    pub tool_call_format: Option<ToolCallFormat>,
    /// How the model marks what it thinks; what its chat template says if absent.
    pub reasoning_parser: Option<ReasoningFormat>,
    /// Whether requests may bring chat templates of their own.
    pub trust_request_chat_template: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            // Far above the longest step: a slow machine under load must not be restarted.
            stuck_after: Duration::from_secs(120),
            keep_alive: Duration::from_secs(10),
            tool_call_format: None,
            reasoning_parser: None,
            trust_request_chat_template: false,
        }
    }
}

impl ServedModel {
    /// Refuses requests for another model; those that name none get the one there is.
    pub(crate) fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(found) if found != self.name => {
                Err(ApiError::ModelNotFound { found: found.to_owned(), expected: self.name.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// What every handler sees.
pub(crate) struct AppState {
    pub(crate) model: ServedModel,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) grammars: Grammars,
    /// How the model calls tools; absent when nobody knows, or when it has no chat template.
    pub(crate) tool_call_format: Option<ToolCallFormat>,
    /// How the model marks what it thinks, as far as it is known.
    pub(crate) reasoning: Option<Reasoning>,
    /// When the server started, in seconds since 1970.
    pub(crate) started_at: u64,
    pub(crate) options: ServerOptions,
}

/// The HTTP service of `model`.
///
/// # Errors
/// When the metrics cannot be set up.
pub fn router(model: ServedModel, options: ServerOptions) -> Result<Router, ServerError> {
    let metrics_of_server = Metrics::new(model.engine.clone(), &model.name)?;
    let limits = model.engine.limits();
    let tokenizer = Arc::clone(&model.tokenizer);
    let template = model.chat_template.as_deref();
    let reasoning_parser =
        options.reasoning_parser.or_else(|| template.and_then(ReasoningFormat::of_template));
    let reasoning = reasoning_parser.map(|ReasoningFormat::ThinkTags| {
        Reasoning::new(Arc::clone(&tokenizer), limits.vocabulary_size, limits.eos_token_ids.clone())
    });
    let grammars = Grammars::new(tokenizer, limits.vocabulary_size, limits.eos_token_ids.clone());
    let of_template = || ToolCallFormat::of_template(model.chat_template.as_deref()?);
    let tool_call_format = options.tool_call_format.or_else(of_template);
    let state = Arc::new(AppState {
        model,
        metrics: metrics_of_server,
        grammars,
        tool_call_format,
        reasoning,
        started_at: seconds_since_1970(),
        options,
    });
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), require_key));
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .method_not_allowed_fallback(method_not_allowed);
    Ok(guarded
        .merge(open)
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), observe))
        .with_state(state))
}

/// Seconds since 1970; 0 when the clock stands before.
pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

/// `GET /version`.
async fn version(State(_): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn not_found(request: Request) -> ApiError {
    ApiError::NotFound { path: request.uri().path().to_owned() }
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::MethodNotAllowed { method: request.method().to_string(), path: request.uri().path().to_owned() }
}
