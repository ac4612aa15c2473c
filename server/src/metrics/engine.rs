//! What the engine counts, read from its statistics when somebody asks.
//!
//! A new metric is a row of [`ROWS`].

use std::collections::HashMap;

use nibble_engine::{EngineConfig, EngineHandle, EngineStats};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

/// A metric of the engine: its name, its help, and how it is read.
struct Row {
    name: &'static str,
    help: &'static str,
    reading: Reading,
}

/// How a metric is read from the statistics.
enum Reading {
    Gauge(fn(&EngineStats) -> f64),
    Counter(fn(&EngineStats) -> u64),
    Histogram(fn(&EngineStats) -> &nibble_engine::Histogram),
    /// One gauge for each value of the label.
    Gauges(&'static str, fn(&EngineStats) -> Vec<(&'static str, f64)>),
    /// One counter for each value of the label.
    Counters(&'static str, fn(&EngineStats) -> Vec<(&'static str, u64)>),
    /// One counter for each number from the given one on, the value of the label.
    NumberedCounters(&'static str, usize, fn(&EngineStats) -> &[u64]),
}

const fn row(name: &'static str, help: &'static str, reading: Reading) -> Row {
    Row { name, help, reading }
}

const ROWS: &[Row] = &[
    row(
        "nibble:num_requests_running",
        "Sequences that hold KV blocks.",
        Reading::Gauge(|stats| stats.running as f64),
    ),
    row(
        "nibble:num_requests_waiting",
        "Sequences that wait for KV blocks.",
        Reading::Gauge(|stats| stats.waiting as f64),
    ),
    row(
        "nibble:num_requests_waiting_by_reason",
        "Sequences that wait, by what for; there is nothing but capacity here.",
        Reading::Gauges("reason", |stats| vec![("capacity", stats.waiting as f64), ("deferred", 0.0)]),
    ),
    row(
        "nibble:num_requests_swapped",
        "Sequences whose KV blocks are elsewhere; always 0.",
        Reading::Gauge(|_| 0.0),
    ),
    row(
        "nibble:engine_sleep_state",
        "1 for the state that the engine is in; it never sleeps.",
        Reading::Gauges("sleep_state", |_| {
            vec![("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)]
        }),
    ),
    row(
        "nibble:kv_cache_usage_perc",
        "Part of the KV blocks in use, from 0 to 1.",
        Reading::Gauge(|stats| stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64),
    ),
    row(
        "nibble:cpu_cache_usage_perc",
        "Part of a second KV cache in use; there is none: always 0.",
        Reading::Gauge(|_| 0.0),
    ),
    row(
        "nibble:last_step_age_seconds",
        "While there is work: time since the last step; else 0.",
        Reading::Gauge(|stats| stats.last_step_age.unwrap_or_default().as_secs_f64()),
    ),
    row(
        "nibble:num_preemptions_total",
        "Sequences put back because KV blocks ran out, or for a priority.",
        Reading::Counter(|stats| stats.preemptions),
    ),
    row(
        "nibble:prompt_tokens_total",
        "Prompt tokens computed or found in the prefix cache.",
        Reading::Counter(|stats| stats.prompt_tokens),
    ),
    row(
        "nibble:prompt_tokens_by_source_total",
        "Prompt tokens by where they came from.",
        Reading::Counters("source", |stats| {
            let computed = stats.prompt_tokens - stats.prompt_tokens_cached;
            let cached = stats.prompt_tokens_cached;
            vec![("local_compute", computed), ("local_cache_hit", cached), ("external_kv_transfer", 0)]
        }),
    ),
    row(
        "nibble:prompt_tokens_cached_total",
        "Prompt tokens found in the prefix cache.",
        Reading::Counter(|stats| stats.prompt_tokens_cached),
    ),
    row(
        "nibble:prompt_tokens_recomputed_total",
        "Prompt tokens computed again after a preemption.",
        Reading::Counter(|stats| stats.prompt_tokens_recomputed),
    ),
    row(
        "nibble:prefix_cache_queries_total",
        "Tokens looked up in the prefix cache, once per admission.",
        Reading::Counter(|stats| stats.prefix_cache_queries),
    ),
    row(
        "nibble:prefix_cache_hits_total",
        "Tokens found in the prefix cache.",
        Reading::Counter(|stats| stats.prefix_cache_hits),
    ),
    row(
        "nibble:external_prefix_cache_queries_total",
        "Tokens looked up in a cache outside this engine; there is none: always 0.",
        Reading::Counter(|_| 0),
    ),
    row(
        "nibble:external_prefix_cache_hits_total",
        "Tokens found in a cache outside this engine; there is none: always 0.",
        Reading::Counter(|_| 0),
    ),
    row(
        "nibble:mm_cache_queries_total",
        "Images and the like looked up in a cache; there are none: always 0.",
        Reading::Counter(|_| 0),
    ),
    row(
        "nibble:mm_cache_hits_total",
        "Images and the like found in a cache; there are none: always 0.",
        Reading::Counter(|_| 0),
    ),
    row(
        "nibble:tokens_total",
        "Prompt tokens and tokens generated.",
        Reading::Counter(|stats| stats.prompt_tokens + stats.generation_tokens),
    ),
    row(
        "nibble:generation_tokens_total",
        "Tokens generated.",
        Reading::Counter(|stats| stats.generation_tokens),
    ),
    row(
        "nibble:spec_decode_num_drafts_total",
        "Drafts that were computed along with the token before them.",
        Reading::Counter(|stats| stats.drafts),
    ),
    row(
        "nibble:spec_decode_num_draft_tokens_total",
        "Tokens of drafts.",
        Reading::Counter(|stats| stats.draft_tokens),
    ),
    row(
        "nibble:spec_decode_num_accepted_tokens_total",
        "Tokens of drafts that were right.",
        Reading::Counter(|stats| stats.accepted_draft_tokens.iter().sum()),
    ),
    row(
        "nibble:spec_decode_num_accepted_tokens_per_pos_total",
        "Tokens of drafts that were right, by place in the draft.",
        Reading::NumberedCounters("position", 0, |stats| &stats.accepted_draft_tokens),
    ),
    row(
        "nibble:spec_decode_num_drafts_by_draft_length_total",
        "Drafts by the number of their tokens.",
        Reading::NumberedCounters("draft_length", 1, |stats| &stats.drafts_by_length),
    ),
    row(
        "nibble:iteration_tokens_total",
        "Tokens computed in a step.",
        Reading::Histogram(|stats| &stats.step_tokens),
    ),
    row(
        "nibble:request_queue_time_seconds",
        "Seconds from submission to the first step.",
        Reading::Histogram(|stats| &stats.queue_seconds),
    ),
    row(
        "nibble:request_prefill_time_seconds",
        "Seconds from the first step to the first token.",
        Reading::Histogram(|stats| &stats.prefill_seconds),
    ),
    row(
        "nibble:request_decode_time_seconds",
        "Seconds from the first to the last token.",
        Reading::Histogram(|stats| &stats.decode_seconds),
    ),
    row(
        "nibble:request_inference_time_seconds",
        "Seconds from the first step to the last token.",
        Reading::Histogram(|stats| &stats.inference_seconds),
    ),
    row(
        "nibble:request_time_per_output_token_seconds",
        "Mean of a sequence's seconds between tokens.",
        Reading::Histogram(|stats| &stats.mean_token_seconds),
    ),
    row(
        "nibble:request_prompt_tokens",
        "Prompt tokens of a sequence.",
        Reading::Histogram(|stats| &stats.request_prompt_tokens),
    ),
    row(
        "nibble:request_generation_tokens",
        "Generated tokens of a sequence.",
        Reading::Histogram(|stats| &stats.request_generation_tokens),
    ),
    row(
        "nibble:request_params_max_tokens",
        "Tokens that a sequence was allowed to generate.",
        Reading::Histogram(|stats| &stats.request_max_tokens),
    ),
    row(
        "nibble:request_prefill_kv_computed_tokens",
        "Prompt tokens of a sequence that were computed, not found in the prefix cache.",
        Reading::Histogram(|stats| &stats.request_computed_prompt_tokens),
    ),
];

const CACHE_CONFIG: (&str, &str) = ("nibble:cache_config_info", "How the KV cache is set up; always 1.");

/// Reads the engine's statistics when metrics are gathered.
pub(super) struct EngineCollector {
    engine: EngineHandle,
    descriptions: Vec<Desc>,
}

impl EngineCollector {
    pub(super) fn new(engine: EngineHandle) -> prometheus::Result<Self> {
        let described = ROWS.iter().map(|row| (row.name, row.help)).chain([CACHE_CONFIG]);
        let descriptions = described
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
        let families = ROWS.iter().map(|row| family_of(row, &stats));
        // Prometheus refuses families of nothing.
        let mut families: Vec<MetricFamily> =
            families.filter(|family| !family.get_metric().is_empty()).collect();
        families.push(cache_config(self.engine.config(), &stats));
        families
    }
}

fn family_of(row: &Row, stats: &EngineStats) -> MetricFamily {
    let (kind, metrics) = match row.reading {
        Reading::Gauge(value) => (MetricType::GAUGE, vec![gauge(value(stats))]),
        Reading::Counter(value) => (MetricType::COUNTER, vec![counter(value(stats))]),
        Reading::Histogram(value) => (MetricType::HISTOGRAM, vec![histogram(value(stats))]),
        Reading::Gauges(label, values) => {
            let metrics = values(stats).into_iter();
            let metrics = metrics.map(|(of, value)| labelled(gauge(value), &[(label, of)]));
            (MetricType::GAUGE, metrics.collect())
        }
        Reading::Counters(label, values) => {
            let metrics = values(stats).into_iter();
            let metrics = metrics.map(|(of, value)| labelled(counter(value), &[(label, of)]));
            (MetricType::COUNTER, metrics.collect())
        }
        Reading::NumberedCounters(label, first, values) => {
            let metrics = values(stats).iter().zip(first..);
            let metrics =
                metrics.map(|(&value, number)| labelled(counter(value), &[(label, &number.to_string())]));
            (MetricType::COUNTER, metrics.collect())
        }
    };
    family(row.name, row.help, kind, metrics)
}

/// vLLM's labels, which are written as Python does.
fn cache_config(config: &EngineConfig, stats: &EngineStats) -> MetricFamily {
    let (blocks, block_size) = (stats.kv_blocks_total.to_string(), stats.block_size.to_string());
    let prefix_caching = if config.prefix_caching { "True" } else { "False" };
    let labels = [
        ("block_size", &*block_size),
        ("num_gpu_blocks", &*blocks),
        ("enable_prefix_caching", prefix_caching),
    ];
    let (name, help) = CACHE_CONFIG;
    family(name, help, MetricType::GAUGE, vec![labelled(gauge(1.0), &labels)])
}

/// A family of `metrics`.
pub(super) fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

/// `metric` with `labels`.
pub(super) fn labelled(mut metric: Metric, labels: &[(&str, &str)]) -> Metric {
    let pair = |&(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value.to_owned());
        pair
    };
    metric.set_label(labels.iter().map(pair).collect());
    metric
}

fn gauge(value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    Metric::from_gauge(gauge)
}

fn counter(value: u64) -> Metric {
    let (mut counter, mut metric) = (Counter::default(), Metric::default());
    counter.set_value(value as f64);
    metric.set_counter(counter);
    metric
}

/// The engine's counts by bucket as Prometheus' counts up to each bound.
fn histogram(counts: &nibble_engine::Histogram) -> Metric {
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
    let mut metric = Metric::default();
    metric.set_histogram(histogram);
    metric
}
