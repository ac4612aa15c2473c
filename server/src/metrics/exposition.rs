//! The text that Prometheus reads; with vLLM's names beside ours, if they are wanted.

use prometheus::proto::MetricFamily;
use prometheus::{Encoder, Registry, TextEncoder};

/// The prefix of our names, and vLLM's.
const OURS: &str = "nibble:";
const VLLM: &str = "vllm:";

/// What vLLM has nothing like.
const ONLY_OURS: &[&str] = &["last_step_age_seconds"];

/// What only vLLM's older dashboards ask for.
const ONLY_VLLM: &[&str] = &["num_requests_swapped", "cpu_cache_usage_perc", "tokens_total"];

/// Names of today and those that vLLM gave the same things earlier.
const RETIRED: &[(&str, &str)] = &[
    ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total"),
    ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
    ("inter_token_latency_seconds", "time_per_output_token_seconds"),
];

/// All metrics of `registries` as text.
///
/// # Errors
/// When a family has no metric or no name.
pub(super) fn text(registries: [&Registry; 2], vllm_names: bool) -> prometheus::Result<Vec<u8>> {
    let mut families: Vec<MetricFamily> = registries
        .iter()
        .flat_map(|registry| registry.gather())
        .filter(|f| !f.get_metric().is_empty())
        .collect();
    let named: Vec<_> = families.iter().filter(|_| vllm_names).flat_map(under_vllm_names).collect();
    families.retain(|family| family.name().strip_prefix(OURS).is_none_or(|name| !ONLY_VLLM.contains(&name)));
    families.extend(named);
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(text)
}

/// `family` under each name that vLLM has or had for it.
fn under_vllm_names(family: &MetricFamily) -> Vec<MetricFamily> {
    let Some(name) = family.name().strip_prefix(OURS).filter(|name| !ONLY_OURS.contains(name)) else {
        return Vec::new();
    };
    let retired = RETIRED.iter().filter(|(today, _)| *today == name).map(|&(_, retired)| retired);
    let renamed = |name: &str| {
        let mut family = family.clone();
        family.set_name(format!("{VLLM}{name}"));
        family
    };
    std::iter::once(name).chain(retired).map(renamed).collect()
}
