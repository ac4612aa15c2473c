//! `/metrics`: what vLLM reports, with its labels and buckets, under the prefix `nibble:`, and if wanted under its own
//! names too.
//!
//! What the engine counts is read from its statistics when somebody asks ([`engine`]); what a client experiences is
//! observed here. Times come from one monotonic clock, tokens are stamped on the engine thread, so that a
//! client that reads slowly does not look like a slow engine.

mod engine;
mod exposition;
mod http;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use nibble_engine::{EngineHandle, token_bounds};
use prometheus::{HistogramOpts, IntCounterVec, Opts, Registry, TEXT_FORMAT};

use crate::app::AppState;
use crate::openai::error::ApiError;
use engine::EngineCollector;
use http::HttpMetrics;
pub(crate) use http::HttpRequest;

const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// How a choice of a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// By an end-of-sequence token, a stop token or a stop string.
    Stop,
    /// By its number of tokens.
    Length,
    /// By the client's going away.
    Abort,
    /// By an error.
    Error,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    /// Its name in the API and in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// The metrics of a server.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Of the model: with its name as a label.
    of_model: Registry,
    /// Of the process and its HTTP requests.
    of_process: Registry,
    first_token: prometheus::Histogram,
    between_tokens: prometheus::Histogram,
    request: prometheus::Histogram,
    choices: prometheus::Histogram,
    longest_choice: prometheus::Histogram,
    ended: IntCounterVec,
    http: HttpMetrics,
}

impl Metrics {
    /// Metrics of a server of the model `model_name` over `engine`.
    ///
    /// # Errors
    /// When two metrics have one name.
    pub(crate) fn new(engine: EngineHandle, model_name: &str) -> prometheus::Result<Arc<Self>> {
        let labels = [("model_name", model_name), ("engine", "0")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let of_model = Registry::new_custom(None, Some(HashMap::from(labels)))?;
        let of_process = Registry::new();
        #[cfg(target_os = "linux")]
        of_process.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
            let histogram = prometheus::Histogram::with_opts(options)?;
            of_model.register(Box::new(histogram.clone())).map(|()| histogram)
        };
        let ended = IntCounterVec::new(
            Opts::new("nibble:request_success_total", "Ended sequences by how they ended."),
            &["finished_reason"],
        )?;
        for outcome in Outcome::ALL {
            // From the beginning: a rate needs a first value.
            ended.with_label_values(&[outcome.name()]);
        }
        of_model.register(Box::new(ended.clone()))?;
        let tokens = token_bounds(engine.maximum_tokens());
        of_model.register(Box::new(EngineCollector::new(engine)?))?;
        Ok(Arc::new(Self {
            first_token: histogram(
                "nibble:time_to_first_token_seconds",
                "Seconds from a request's arrival to its first token.",
                FIRST_TOKEN_SECONDS,
            )?,
            between_tokens: histogram(
                "nibble:inter_token_latency_seconds",
                "Seconds from a token to the next of the same sequence.",
                BETWEEN_TOKENS_SECONDS,
            )?,
            request: histogram(
                "nibble:e2e_request_latency_seconds",
                "Seconds from a request's arrival to the end of a sequence.",
                REQUEST_SECONDS,
            )?,
            choices: histogram("nibble:request_params_n", "Sequences asked for a prompt.", CHOICES)?,
            longest_choice: histogram(
                "nibble:request_max_num_generation_tokens",
                "Generated tokens of the longest sequence of a prompt.",
                tokens,
            )?,
            ended,
            http: HttpMetrics::new(&of_process)?,
            of_model,
            of_process,
        }))
    }

    /// The observer of a request that arrived at `arrived_at`.
    pub(crate) fn request(self: &Arc<Self>, arrived_at: Instant) -> RequestMetrics {
        RequestMetrics { metrics: Arc::clone(self), arrived_at }
    }

    /// Counts an HTTP request whose response began.
    pub(crate) fn http(&self, request: HttpRequest<'_>) {
        self.http.observe(request);
    }
}

/// Observes one request.
pub(crate) struct RequestMetrics {
    metrics: Arc<Metrics>,
    arrived_at: Instant,
}

impl RequestMetrics {
    /// A token came at `at`, the one before in its sequence at `before`.
    pub(crate) fn token(&self, before: Option<Instant>, at: Instant) {
        match before {
            None => self.metrics.first_token.observe(at.duration_since(self.arrived_at).as_secs_f64()),
            Some(before) => self.metrics.between_tokens.observe(at.duration_since(before).as_secs_f64()),
        }
    }

    /// A sequence ended now.
    pub(crate) fn finished(&self, outcome: Outcome) {
        self.metrics.ended.with_label_values(&[outcome.name()]).inc();
        self.metrics.request.observe(self.arrived_at.elapsed().as_secs_f64());
    }

    /// All `choices` of a prompt have ended; the longest has `longest_tokens` tokens.
    pub(crate) fn prompt_finished(&self, choices: usize, longest_tokens: usize) {
        self.metrics.choices.observe(choices as f64);
        self.metrics.longest_choice.observe(longest_tokens as f64);
    }
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> Result<Response, ApiError> {
    let metrics = &state.metrics;
    let registries = [&metrics.of_model, &metrics.of_process];
    let text = exposition::text(registries, state.options.vllm_metrics)
        .map_err(|error| ApiError::Internal { message: format!("cannot write the metrics: {error}") })?;
    Ok(([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response())
}
