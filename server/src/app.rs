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
use tokio::sync::{Notify, watch};

use crate::auth::{ApiKeys, require_key};
use crate::body::limit_body_time;
use crate::grammar::Grammars;
use crate::lenient::{LoggedNames, ignore_unknown_fields};
use crate::metrics::{Metrics, metrics};
use crate::observe::observe;
use crate::openai::error::ApiError;
use crate::openai::fields::BODY_LIMIT_BYTES;
use crate::openai::{chat, completions, embeddings, models, openapi, tokenize};
use crate::reasoning::{Reasoning, ReasoningFormat};
use crate::tools::ToolCallFormat;
use crate::traces::Traces;
use crate::{ServerError, admin, health};

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
    pub api_keys: Arc<ApiKeys>,
    /// Demand keys at the admin address too.
    pub admin_needs_key: bool,
    /// Report metrics at the admin address alone.
    pub metrics_on_admin_only: bool,
    /// Time that the body of a request may take to arrive.
    pub body_timeout: Duration,
    /// Time without a finished step, while there is work, after which the engine counts as stuck.
    pub stuck_after: Duration,
    /// Silence in a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// How the model calls tools; what its chat template says if absent.
    pub tool_call_format: Option<ToolCallFormat>,
    /// Where the spans of requests go, if anywhere.
    pub traces: Option<Arc<Traces>>,
    /// Report metrics under vLLM's names as well.
    pub vllm_metrics: bool,
    /// Ignore the unknown and unsupported fields of requests, and name them in the header
    /// `x-nibble-ignored-fields` of the answer, instead of refusing them.
    pub ignore_unknown_fields: bool,
    /// How the model marks what it thinks; what its chat template says if absent.
    pub reasoning_parser: Option<ReasoningFormat>,
    /// Whether requests may bring chat templates of their own.
    pub trust_request_chat_template: bool,
    /// Whether requests may ask to be served before others.
    pub priorities: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_keys: Arc::default(),
            admin_needs_key: false,
            metrics_on_admin_only: false,
            body_timeout: Duration::from_secs(30),
            // Far above the longest step: a slow machine under load must not be restarted.
            stuck_after: Duration::from_secs(120),
            keep_alive: Duration::from_secs(10),
            tool_call_format: None,
            traces: None,
            vllm_metrics: false,
            ignore_unknown_fields: false,
            reasoning_parser: None,
            trust_request_chat_template: false,
            priorities: false,
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
    /// Why no request will be finished any more, if that is so.
    pub(crate) given_up: watch::Sender<Option<Arc<str>>>,
    /// Told when somebody asks for the end of the server.
    pub(crate) drain: Notify,
    /// How the model marks what it thinks, as far as it is known.
    pub(crate) reasoning: Option<Reasoning>,
    /// When the server started, in seconds since 1970.
    pub(crate) started_at: u64,
    pub(crate) options: ServerOptions,
}

/// The HTTP service of a model. Clones are the same service.
#[derive(Clone)]
pub struct Service {
    state: Arc<AppState>,
}

impl Service {
    /// The service of `model`.
    ///
    /// # Errors
    /// When the metrics cannot be set up.
    pub fn new(model: ServedModel, options: ServerOptions) -> Result<Self, ServerError> {
        let metrics = Metrics::new(model.engine.clone(), &model.name)?;
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
        let state = AppState {
            model,
            metrics,
            grammars,
            tool_call_format,
            reasoning,
            started_at: seconds_since_1970(),
            given_up: watch::Sender::new(None),
            drain: Notify::new(),
            options,
        };
        Ok(Self { state: Arc::new(state) })
    }

    /// What answers at the API's address.
    pub fn router(&self) -> Router {
        let state = &self.state;
        let mut guarded = Router::new()
            .route("/v1/chat/completions", post(chat::chat_completions))
            .route("/v1/completions", post(completions::completions))
            .route("/v1/embeddings", post(embeddings::embeddings))
            .route("/v1/models", get(models::list))
            .route("/v1/models/{*model}", get(models::one))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(tokenize::detokenize))
            .route("/version", get(version))
            .route("/openapi.json", get(openapi::openapi));
        if !state.options.metrics_on_admin_only {
            guarded = guarded.route("/metrics", get(metrics));
        }
        let guarded = guarded
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed)
            .layer(middleware::from_fn_with_state(Arc::clone(state), require_key));
        let mut routes = guarded.merge(probes());
        if state.options.ignore_unknown_fields {
            let logged = Arc::new(LoggedNames::default());
            routes = routes.layer(middleware::from_fn_with_state(logged, ignore_unknown_fields));
        }
        self.finish(routes)
    }

    /// What answers at the admin address: what changes the server's state or tells of its insides.
    pub fn admin_router(&self) -> Router {
        let state = &self.state;
        let mut guarded = Router::new()
            .route("/admin/drain", post(admin::drain))
            .route("/admin/reset_prefix_cache", post(admin::reset_prefix_cache))
            .route("/metrics", get(metrics))
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed);
        if state.options.admin_needs_key {
            guarded = guarded.layer(middleware::from_fn_with_state(Arc::clone(state), require_key));
        }
        self.finish(guarded.layer(middleware::from_fn(admin::refuse_web_pages)).merge(probes()))
    }

    /// What every request passes.
    fn finish(&self, routes: Router<Arc<AppState>>) -> Router {
        let state = &self.state;
        routes
            .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
            .layer(middleware::from_fn_with_state(state.options.body_timeout, limit_body_time))
            .layer(middleware::from_fn_with_state(Arc::clone(state), observe))
            .with_state(Arc::clone(state))
    }

    pub(crate) fn engine(&self) -> &EngineHandle {
        &self.state.model.engine
    }

    pub(crate) fn options(&self) -> &ServerOptions {
        &self.state.options
    }

    /// Waits until somebody asks for the end of the server over the admin address.
    pub(crate) async fn drain_requested(&self) {
        self.state.drain.notified().await;
    }

    /// Answers every open request with an error, and every later one.
    pub(crate) fn give_up_requests(&self, message: &str) {
        self.state.given_up.send_replace(Some(message.into()));
    }
}

/// What a supervisor and a load balancer ask, without a key.
fn probes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .method_not_allowed_fallback(method_not_allowed)
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
