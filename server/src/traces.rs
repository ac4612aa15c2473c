//! OpenTelemetry: one span for each request that generates, sent to a collector as OTLP over HTTP, with vLLM's
//! attributes.
//!
//! A span is made when its request has ended, with the time of its arrival: nothing is kept open beside the request.
//! Spans are sent in batches by a thread of their own; when the collector does not take them they are dropped.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use axum::http::HeaderMap;
use bytes::Bytes;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{
    Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HeaderExtractor, HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use crate::app::AppState;
use crate::observe::RequestIdentity;

/// Time that the collector has to answer.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to send the last spans when the server stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Where a collector takes spans.
const TRACES_PATH: &str = "/v1/traces";

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The collector's address is none.
    #[error("the OTLP endpoint is {found:?}, expected a URL such as http://localhost:4318")]
    Endpoint {
        /// What was given.
        found: String,
    },
    /// The exporter cannot be built.
    #[error("spans cannot be exported: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Exports spans.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Spans go to the collector at `endpoint`, at `/v1/traces` there unless `endpoint` has a path.
    ///
    /// # Errors
    /// When `endpoint` is not the URL of an HTTP server.
    pub fn export_to(endpoint: &str) -> Result<Self, TracesError> {
        let error = || TracesError::Endpoint { found: endpoint.to_owned() };
        let uri: http::Uri = endpoint.parse().map_err(|_| error())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(error());
        }
        let has_path = !matches!(uri.path(), "" | "/");
        let url = if has_path {
            endpoint.to_owned()
        } else {
            format!("{}{TRACES_PATH}", endpoint.trim_end_matches('/'))
        };
        let agent = ureq::AgentBuilder::new().timeout(COLLECTOR_TIMEOUT).build();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector { agent })
            .with_endpoint(url)
            .with_timeout(COLLECTOR_TIMEOUT)
            .build()?;
        let resource = Resource::builder().with_service_name("nibble").build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("nibble-server");
        Ok(Self { provider, tracer })
    }

    /// The span that `headers` say their request belongs to, by W3C's `traceparent`.
    pub(crate) fn parent(headers: &HeaderMap) -> SpanContext {
        let context =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        context.span().span_context().clone()
    }

    /// Sends what was not sent yet. Blocks, for a short time at most.
    pub fn shut_down(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

/// A request on its way, as its span will tell of it.
pub(crate) struct RequestTrace {
    traces: Arc<Traces>,
    identity: RequestIdentity,
    model: String,
    submitted_at: Instant,
    /// When the first of its sequences had its first step.
    started_at: Option<Instant>,
    /// When the first token of any of its sequences came.
    first_token_at: Option<Instant>,
    max_tokens: usize,
    /// Why it was not finished.
    problem: Option<&'static str>,
}

/// What a request took in the end.
pub(crate) struct TracedUsage {
    pub(crate) choices_per_prompt: usize,
    /// Over all prompts.
    pub(crate) choices: usize,
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
}

impl RequestTrace {
    /// The trace of a request that is about to be submitted; `None` when spans are not exported.
    pub(crate) fn new(state: &AppState, identity: &RequestIdentity) -> Option<Self> {
        Some(Self {
            traces: Arc::clone(state.options.traces.as_ref()?),
            identity: identity.clone(),
            model: state.model.name.clone(),
            submitted_at: Instant::now(),
            started_at: None,
            first_token_at: None,
            max_tokens: 0,
            problem: None,
        })
    }

    /// A sequence of up to `max_tokens` generated tokens is submitted.
    pub(crate) fn submits(&mut self, max_tokens: usize) {
        self.max_tokens = self.max_tokens.max(max_tokens);
    }

    /// The engine tells something of a sequence that had its first step at `started_at`, perhaps a token.
    pub(crate) fn hears(&mut self, started_at: Option<Instant>, token_at: Option<Instant>) {
        self.started_at = self.started_at.or(started_at);
        self.first_token_at = self.first_token_at.or(token_at);
    }

    /// The request will not be finished, for the reason `problem`.
    pub(crate) fn fails(&mut self, problem: &'static str) {
        self.problem = Some(problem);
    }

    /// Exports the span: the request ended now.
    pub(crate) fn end(&self, usage: &TracedUsage) {
        let identity = &self.identity;
        let since = |start: Instant, end: Option<Instant>| {
            end.map(|end| end.saturating_duration_since(start).as_secs_f64())
        };
        let e2e = identity.arrived_at.elapsed();
        let ended_at = SystemTime::now();
        let arrived_at = ended_at.checked_sub(e2e).unwrap_or(ended_at);
        let mut attributes = vec![
            KeyValue::new("gen_ai.request.id", identity.id.clone()),
            KeyValue::new("gen_ai.response.model", self.model.clone()),
            KeyValue::new("gen_ai.request.max_tokens", count(self.max_tokens)),
            KeyValue::new("gen_ai.request.n", count(usage.choices_per_prompt)),
            KeyValue::new("gen_ai.usage.num_sequences", count(usage.choices)),
            KeyValue::new("gen_ai.usage.prompt_tokens", count(usage.prompt_tokens)),
            KeyValue::new("gen_ai.usage.completion_tokens", count(usage.completion_tokens)),
            KeyValue::new("gen_ai.latency.e2e", e2e.as_secs_f64()),
        ];
        for (name, seconds) in [
            ("gen_ai.latency.time_in_queue", since(self.submitted_at, self.started_at)),
            ("gen_ai.latency.time_to_first_token", since(identity.arrived_at, self.first_token_at)),
        ] {
            attributes.extend(seconds.map(|seconds| KeyValue::new(name, seconds)));
        }
        let tracer = &self.traces.tracer;
        let builder = tracer.span_builder("llm_request").with_kind(SpanKind::Server);
        let builder = builder.with_start_time(arrived_at).with_attributes(attributes);
        let mut parent = Context::new();
        if identity.parent.is_valid() {
            // An invalid one would count as a parent that is not sampled.
            parent = parent.with_remote_span_context(identity.parent.clone());
        }
        let mut span = builder.start_with_context(tracer, &parent);
        if let Some(problem) = self.problem {
            span.set_status(Status::error(problem));
        }
        span.end_with_timestamp(ended_at);
    }
}

/// OpenTelemetry's integers are signed.
fn count(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Sends requests on the exporter's own thread, which may block.
#[derive(Debug)]
struct Collector {
    agent: ureq::Agent,
}

#[async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string();
        let outgoing = parts
            .headers
            .iter()
            .filter_map(|(name, value)| Some((name, value.to_str().ok()?)))
            .fold(self.agent.request(parts.method.as_str(), &url), |outgoing, (name, value)| {
                outgoing.set(name.as_str(), value)
            });
        let answer = match outgoing.send_bytes(&body) {
            Ok(answer) => answer,
            Err(ureq::Error::Status(status, answer)) => {
                tracing::warn!(url, status, "the collector refused spans");
                answer
            }
            Err(error) => {
                tracing::warn!(url, %error, "the collector does not answer: spans are lost");
                return Err(Box::new(error));
            }
        };
        let status = answer.status();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(answer.into_reader(), 1 << 20), &mut bytes)?;
        Ok(http::Response::builder().status(status).body(bytes.into())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_the_url_of_a_server() {
        for endpoint in ["", "localhost:4318", "ftp://x", "http://", "grpc://localhost:4317", "http://a b"] {
            let message = Traces::export_to(endpoint).unwrap_err().to_string();
            assert!(message.contains("http://localhost:4318"), "{message}");
        }
        Traces::export_to("https://collector.example/v1/traces").unwrap();
    }
}
