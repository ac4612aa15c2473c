//! What happens at the HTTP level, under the names, labels and buckets of `prometheus_fastapi_instrumentator`,
//! which vLLM uses.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Metric, MetricFamily, MetricType, Summary};
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

use super::engine::{family, labelled};

const COARSE_SECONDS: &[f64] = &[0.1, 0.5, 1.0];
const FINE_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];

/// One HTTP request, as it is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HttpRequest<'a> {
    /// The address as the router knows it, "none" for unknown ones: else anybody could fill the memory with counters.
    pub(crate) handler: &'a str,
    pub(crate) method: &'a str,
    pub(crate) status: u16,
    /// Until the response began.
    pub(crate) elapsed: Duration,
    /// Of the body, 0 when it is not known in advance.
    pub(crate) request_bytes: u64,
    /// The same for the response, 0 for a stream.
    pub(crate) response_bytes: u64,
}

/// The metrics of HTTP requests.
#[derive(Debug)]
pub(super) struct HttpMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    fine_seconds: Histogram,
    request_bytes: Summaries,
    response_bytes: Summaries,
}

impl HttpMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let seconds = HistogramOpts::new("http_request_duration_seconds", "Seconds until a response began.");
        let fine = "Seconds until a response began, in many buckets, of all handlers together.";
        let fine = HistogramOpts::new("http_request_duration_highr_seconds", fine);
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("http_requests_total", "HTTP requests by address, method and class of status."),
                &["handler", "method", "status"],
            )?,
            seconds: HistogramVec::new(seconds.buckets(COARSE_SECONDS.to_vec()), &["handler", "method"])?,
            fine_seconds: Histogram::with_opts(fine.buckets(FINE_SECONDS.to_vec()))?,
            request_bytes: Summaries::new("http_request_size_bytes", "Bytes of request bodies.")?,
            response_bytes: Summaries::new("http_response_size_bytes", "Bytes of response bodies.")?,
        };
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.fine_seconds.clone()))?;
        registry.register(Box::new(metrics.request_bytes.clone()))?;
        registry.register(Box::new(metrics.response_bytes.clone()))?;
        Ok(metrics)
    }

    /// Counts a request whose response began.
    pub(super) fn observe(&self, request: HttpRequest<'_>) {
        let HttpRequest { handler, method, status, elapsed, request_bytes, response_bytes } = request;
        let class = format!("{}xx", status / 100);
        self.requests.with_label_values(&[handler, method, class.as_str()]).inc();
        self.seconds.with_label_values(&[handler, method]).observe(elapsed.as_secs_f64());
        self.fine_seconds.observe(elapsed.as_secs_f64());
        self.request_bytes.observe(handler, request_bytes);
        self.response_bytes.observe(handler, response_bytes);
    }
}

/// Count and sum by handler: Prometheus' summaries without quantiles, which the client library lacks.
#[derive(Clone, Debug)]
struct Summaries {
    description: Desc,
    by_handler: std::sync::Arc<Mutex<BTreeMap<String, (u64, u64)>>>,
}

impl Summaries {
    fn new(name: &str, help: &str) -> prometheus::Result<Self> {
        let labels = vec!["handler".to_owned()];
        let description = Desc::new(name.to_owned(), help.to_owned(), labels, HashMap::new())?;
        Ok(Self { description, by_handler: std::sync::Arc::default() })
    }

    fn observe(&self, handler: &str, bytes: u64) {
        let mut by_handler = self.by_handler.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, sum) = by_handler.entry(handler.to_owned()).or_default();
        *count += 1;
        *sum += bytes;
    }
}

impl Collector for Summaries {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.description]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let by_handler = self.by_handler.lock().unwrap_or_else(PoisonError::into_inner);
        let summaries = by_handler.iter().map(|(handler, &(count, sum))| {
            let (mut summary, mut metric) = (Summary::default(), Metric::default());
            summary.set_sample_count(count);
            summary.set_sample_sum(sum as f64);
            metric.set_summary(summary);
            labelled(metric, &[("handler", handler)])
        });
        let Desc { fq_name, help, .. } = &self.description;
        vec![family(fq_name, help, MetricType::SUMMARY, summaries.collect())]
    }
}
