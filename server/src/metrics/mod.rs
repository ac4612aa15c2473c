//! `/metrics`: what vLLM reports, under the prefix `nibble:`, so that its dashboards need a search and
//! replace only.
//!
//! What the engine counts is read from its statistics when somebody asks; what a client experiences is
//! observed here. Times come from one monotonic clock, tokens are stamped on the engine thread, so that a
//! client that reads slowly does not look like a slow engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use nibble_engine::{EngineHandle, EngineStats};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, Metric, MetricFamily, MetricType};
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TEXT_FORMAT, TextEncoder,
};

use crate::app::AppState;
use crate::openai::error::ApiError;

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
/// Times of HTTP requests until their response begins.
const HTTP_SECONDS: &[f64] = &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Name, help and value of a metric that is read from the engine's statistics.
type FromStats<T> = (&'static str, &'static str, fn(&EngineStats) -> T);

const GAUGES: &[FromStats<f64>] = &[
    ("nibble:num_requests_running", "Sequences that hold KV blocks.", |stats| stats.running as f64),
    ("nibble:num_requests_waiting", "Sequences that wait for KV blocks.", |stats| stats.waiting as f64),
    ("nibble:kv_cache_usage_perc", "Part of the KV blocks in use, from 0 to 1.", |stats| {
        stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64
    }),
    ("nibble:last_step_age_seconds", "While there is work: time since the last step; else 0.", |stats| {
        stats.last_step_age.unwrap_or(Duration::ZERO).as_secs_f64()
    }),
];

const COUNTERS: &[FromStats<u64>] = &[
    ("nibble:num_preemptions_total", "Sequences put back because KV blocks ran out.", |stats| {
        stats.preemptions
    }),
    ("nibble:prompt_tokens_total", "Prompt tokens computed.", |stats| stats.prompt_tokens),
    ("nibble:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", |stats| {
        stats.prefix_cache_queries
    }),
    ("nibble:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", |stats| {
        stats.prefix_cache_hits
    }),
    ("nibble:generation_tokens_total", "Tokens generated.", |stats| stats.generation_tokens),
];

/// The same for histograms.
type HistogramOfStats = (&'static str, &'static str, fn(&EngineStats) -> &nibble_engine::Histogram);

const HISTOGRAMS: &[HistogramOfStats] = &[
    ("nibble:iteration_tokens_total", "Tokens computed in a step.", |stats| &stats.step_tokens),
    ("nibble:request_queue_time_seconds", "Seconds from submission to the first step.", |stats| {
        &stats.queue_seconds
    }),
    ("nibble:request_prefill_time_seconds", "Seconds from the first step to the first token.", |stats| {
        &stats.prefill_seconds
    }),
    ("nibble:request_decode_time_seconds", "Seconds from the first to the last token.", |stats| {
        &stats.decode_seconds
    }),
];

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
    registry: Registry,
    first_token: prometheus::Histogram,
    between_tokens: prometheus::Histogram,
    request: prometheus::Histogram,
    ended: IntCounterVec,
    http_requests: IntCounterVec,
    http_seconds: HistogramVec,
}

impl Metrics {
    /// Metrics of a server of the model `model_name` over `engine`.
    ///
    /// # Errors
    /// When two metrics have one name.
    pub(crate) fn new(engine: EngineHandle, model_name: &str) -> prometheus::Result<Arc<Self>> {
        let labels = [("model_name", model_name), ("engine", "0")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let registry = Registry::new_custom(None, Some(HashMap::from(labels)))?;
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
            let histogram = prometheus::Histogram::with_opts(options)?;
            registry.register(Box::new(histogram.clone())).map(|()| histogram)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone())).map(|()| counter)
        };
        let http_seconds = HistogramVec::new(
            HistogramOpts::new("http_request_duration_seconds", "Seconds until an HTTP response began.")
                .buckets(HTTP_SECONDS.to_vec()),
            &["handler", "method"],
        )?;
        registry.register(Box::new(http_seconds.clone()))?;
        registry.register(Box::new(EngineCollector::new(engine)?))?;
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
                "Seconds from a request's arrival to its end.",
                REQUEST_SECONDS,
            )?,
            ended: counter(
                "nibble:request_success_total",
                "Ended sequences by how they ended.",
                &["finished_reason"],
            )?,
            http_requests: counter(
                "http_requests_total",
                "HTTP requests by address, method and class of status.",
                &["handler", "method", "status"],
            )?,
            http_seconds,
            registry,
        }))
    }

    /// The observer of a request that arrived at `arrived_at`.
    pub(crate) fn request(self: &Arc<Self>, arrived_at: Instant) -> RequestMetrics {
        RequestMetrics { metrics: Arc::clone(self), arrived_at }
    }

    /// Counts an HTTP request whose response began after `elapsed`.
    pub(crate) fn http(&self, handler: &str, method: &str, status: u16, elapsed: Duration) {
        let class = format!("{}xx", status / 100);
        self.http_requests.with_label_values(&[handler, method, class.as_str()]).inc();
        self.http_seconds.with_label_values(&[handler, method]).observe(elapsed.as_secs_f64());
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
}

/// Reads the engine's statistics when metrics are gathered.
struct EngineCollector {
    engine: EngineHandle,
    descriptions: Vec<Desc>,
}

impl EngineCollector {
    fn new(engine: EngineHandle) -> prometheus::Result<Self> {
        let gauges = GAUGES.iter().map(|&(name, help, _)| (name, help));
        let counters = COUNTERS.iter().map(|&(name, help, _)| (name, help));
        let histograms = HISTOGRAMS.iter().map(|&(name, help, _)| (name, help));
        let descriptions = gauges
            .chain(counters)
            .chain(histograms)
            .map(|(name, help)| Desc::new(name.to_owned(), help.to_owned(), Vec::new(), HashMap::new()))
            .collect::<Result<_, _>>()?;
        Ok(Self { engine, descriptions })
    }
}

impl Collector for EngineCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let stats = self.engine.stats();
        let gauges = GAUGES.iter().map(|(name, help, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value(&stats));
            family(name, help, MetricType::GAUGE, Metric::from_gauge(gauge))
        });
        let counters = COUNTERS.iter().map(|(name, help, value)| {
            let (mut counter, mut metric) = (Counter::default(), Metric::default());
            counter.set_value(value(&stats) as f64);
            metric.set_counter(counter);
            family(name, help, MetricType::COUNTER, metric)
        });
        let histograms = HISTOGRAMS.iter().map(|(name, help, value)| {
            let mut metric = Metric::default();
            metric.set_histogram(cumulative(value(&stats)));
            family(name, help, MetricType::HISTOGRAM, metric)
        });
        gauges.chain(counters).chain(histograms).collect()
    }
}

fn family(name: &str, help: &str, kind: MetricType, metric: Metric) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(vec![metric]);
    family
}

/// The engine's counts by bucket as Prometheus' counts up to each bound.
fn cumulative(counts: &nibble_engine::Histogram) -> Histogram {
    let mut total = 0;
    let buckets = counts.bounds.iter().zip(&counts.buckets).map(|(&bound, &count)| {
        total += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(total);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_sum(counts.sum);
    histogram.set_sample_count(counts.count);
    histogram
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> Result<Response, ApiError> {
    let mut text = Vec::new();
    TextEncoder::new()
        .encode(&state.metrics.registry.gather(), &mut text)
        .map_err(|error| ApiError::Internal { message: format!("cannot write the metrics: {error}") })?;
    Ok(([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response())
}
