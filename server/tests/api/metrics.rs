//! Every family of metrics is right after a workload whose numbers are known.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use nibble_engine::EngineConfig;
use nibble_server::ServerOptions;
use serde_json::json;

use crate::support::{CHAT, COMPLETIONS, Options, Server, post};

/// All samples: name and labels, to the value.
async fn samples(server: &Server) -> BTreeMap<String, f64> {
    let (_, body) = server.get("/metrics").await;
    let lines = body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

fn value(samples: &BTreeMap<String, f64>, name: &str) -> Option<f64> {
    let labels = ["engine=\"0\"", "model_name=\"alphabet\""];
    let (name, own) = name.split_once('{').unwrap_or((name, ""));
    let own = own.trim_end_matches('}');
    let wanted: BTreeSet<&str> = own
        .split(',')
        .filter(|label| !label.is_empty())
        .chain(labels.into_iter().filter(|_| name.contains(':')))
        .collect();
    samples.iter().find_map(|(sample, value)| {
        let (found, labels) = sample.split_once('{').unwrap_or((sample, ""));
        let labels: BTreeSet<&str> =
            labels.trim_end_matches('}').split(',').filter(|l| !l.is_empty()).collect();
        (found == name && labels == wanted).then_some(*value)
    })
}

/// Two completions alone, and one prompt for three.
async fn workload(server: &Server) {
    server.ok(COMPLETIONS, json!({"prompt": "abx", "temperature": 0})).await;
    server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "max_tokens": 4})).await;
    // 17 tokens: of the second choice and the third, a block of 16 may be cached.
    let prompt = "abcdefghijklmnopx";
    server.ok(COMPLETIONS, json!({"prompt": prompt, "temperature": 0, "max_tokens": 5})).await;
    server
        .ok(COMPLETIONS, json!({"prompt": prompt, "temperature": 0, "n": 2, "max_tokens": 5, "stop": "z"}))
        .await;
    server.post(CHAT, json!({})).await;
}

#[tokio::test]
async fn families_of_the_model_are_right() {
    let server = Server::new();
    workload(&server).await;
    server.eventually("all have ended", |stats| stats.running == 0).await;
    let samples = samples(&server).await;
    for (name, expected) in [
        ("num_requests_running", 0.0),
        ("num_requests_waiting", 0.0),
        ("num_requests_waiting_by_reason{reason=\"capacity\"}", 0.0),
        ("num_requests_waiting_by_reason{reason=\"deferred\"}", 0.0),
        ("engine_sleep_state{sleep_state=\"awake\"}", 1.0),
        ("engine_sleep_state{sleep_state=\"weights_offloaded\"}", 0.0),
        ("engine_sleep_state{sleep_state=\"discard_all\"}", 0.0),
        ("external_prefix_cache_queries_total", 0.0),
        ("external_prefix_cache_hits_total", 0.0),
        ("mm_cache_queries_total", 0.0),
        ("mm_cache_hits_total", 0.0),
        ("kv_cache_usage_perc", 0.0),
        ("last_step_age_seconds", 0.0),
        ("num_preemptions_total", 0.0),
        ("cache_config_info{block_size=\"16\",num_gpu_blocks=\"64\",enable_prefix_caching=\"True\"}", 1.0),
        ("prompt_tokens_total", 3.0 + 1.0 + 3.0 * 17.0),
        ("prompt_tokens_by_source_total{source=\"local_compute\"}", 3.0 + 1.0 + 17.0 + 2.0),
        ("prompt_tokens_by_source_total{source=\"local_cache_hit\"}", 32.0),
        ("prompt_tokens_by_source_total{source=\"external_kv_transfer\"}", 0.0),
        ("prompt_tokens_cached_total", 32.0),
        ("prompt_tokens_recomputed_total", 0.0),
        ("prefix_cache_queries_total", 3.0 + 1.0 + 3.0 * 17.0),
        ("prefix_cache_hits_total", 32.0),
        ("request_success_total{finished_reason=\"stop\"}", 4.0),
        ("request_success_total{finished_reason=\"length\"}", 1.0),
        ("request_success_total{finished_reason=\"abort\"}", 0.0),
        ("request_success_total{finished_reason=\"error\"}", 0.0),
        ("time_to_first_token_seconds_count", 5.0),
        ("e2e_request_latency_seconds_count", 5.0),
        ("request_queue_time_seconds_count", 5.0),
        ("request_prefill_time_seconds_count", 5.0),
        ("request_decode_time_seconds_count", 5.0),
        ("request_inference_time_seconds_count", 5.0),
        ("request_time_per_output_token_seconds_count", 5.0),
        ("request_prompt_tokens_count", 5.0),
        ("request_prompt_tokens_sum", 55.0),
        ("request_prompt_tokens_bucket{le=\"1\"}", 1.0),
        ("request_prompt_tokens_bucket{le=\"5\"}", 2.0),
        ("request_prompt_tokens_bucket{le=\"20\"}", 5.0),
        ("request_prompt_tokens_bucket{le=\"200\"}", 5.0),
        ("request_params_max_tokens_sum", 16.0 + 4.0 + 3.0 * 5.0),
        ("request_params_n_count", 4.0),
        ("request_params_n_sum", 5.0),
        ("request_params_n_bucket{le=\"1\"}", 3.0),
        ("request_prefill_kv_computed_tokens_sum", 3.0 + 1.0 + 17.0 + 1.0 + 1.0),
        ("request_max_num_generation_tokens_count", 4.0),
        // "yz" and the end, "bcde", "yz" and the end, "yz" whose z is the stop string.
        ("request_max_num_generation_tokens_sum", 3.0 + 4.0 + 3.0 + 2.0),
        // Tokens that were under way beside the stop string do not reach a client: between the tokens of the
        // first three there are 1, 3 and 1 intervals, and 1 in each of the two choices.
        ("inter_token_latency_seconds_count", 1.0 + 3.0 + 1.0 + 2.0),
    ] {
        assert_eq!(value(&samples, &format!("nibble:{name}")), Some(expected), "{name} in {samples:#?}");
    }
    // Steps that follow a stop string are the engine's own affair; each generates at most one token a choice.
    for (name, least) in [
        ("nibble:generation_tokens_total", 14.0),
        ("nibble:request_generation_tokens_sum", 14.0),
        ("nibble:iteration_tokens_total_count", 3.0 + 4.0 + 3.0 + 2.0),
    ] {
        let found = value(&samples, name).unwrap();
        assert!((least..=least + 4.0).contains(&found), "{name} is {found}");
    }
    assert_eq!(
        value(&samples, "nibble:request_prompt_tokens_bucket{le=\"500\"}"),
        None,
        "256 is the longest"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn times_are_those_that_passed() {
    let (server, gate) = Server::gated(Options::default());
    let pause = Duration::from_millis(60);
    let running = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "a", "temperature": 0, "max_tokens": 2})).await }
    });
    gate.step_has_begun();
    // Comes while the first step runs, and waits for its end.
    let queued = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "b", "temperature": 0, "max_tokens": 1})).await }
    });
    server.eventually("the second waits", |stats| stats.waiting == 1).await;
    tokio::time::sleep(pause).await;
    gate.let_go();
    gate.step_has_begun();
    tokio::time::sleep(pause).await;
    gate.let_go();
    running.await.unwrap();
    queued.await.unwrap();
    server.eventually("all have ended", |stats| stats.running == 0).await;
    let samples = samples(&server).await;
    // The first took two pauses, the second waited one and took one.
    for (name, pauses) in [
        ("time_to_first_token_seconds", 3.0),
        ("inter_token_latency_seconds", 1.0),
        ("e2e_request_latency_seconds", 4.0),
        ("request_queue_time_seconds", 1.0),
        ("request_prefill_time_seconds", 2.0),
        ("request_decode_time_seconds", 1.0),
        ("request_inference_time_seconds", 3.0),
        ("request_time_per_output_token_seconds", 1.0),
    ] {
        let (found, expected) =
            (value(&samples, &format!("nibble:{name}_sum")).unwrap(), pauses * pause.as_secs_f64());
        assert!(found >= expected && found < expected + 1.0, "{name}: {found}, expected about {expected}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gauges_tell_what_runs_and_what_waits() {
    let engine = EngineConfig { max_running_sequences: 1, ..Default::default() };
    let (server, gate) = Server::gated(Options { engine, ..Options::default() });
    let request = tokio::spawn({
        let server = server.clone();
        async move { server.ok(COMPLETIONS, json!({"prompt": "a", "n": 2, "max_tokens": 1})).await }
    });
    gate.step_has_begun();
    server.eventually("one waits", |stats| stats.waiting == 1).await;
    let samples = samples(&server).await;
    assert_eq!(value(&samples, "nibble:num_requests_running"), Some(1.0));
    assert_eq!(value(&samples, "nibble:num_requests_waiting"), Some(1.0));
    assert_eq!(value(&samples, "nibble:num_requests_waiting_by_reason{reason=\"capacity\"}"), Some(1.0));
    assert_eq!(value(&samples, "nibble:kv_cache_usage_perc"), Some(1.0 / 64.0));
    drop(gate);
    request.await.unwrap();
}

#[tokio::test]
async fn families_of_http_have_the_instrumentators_names_and_no_other_labels() {
    let server = Server::new();
    workload(&server).await;
    let request = Request::get("/nowhere").body(Body::empty()).unwrap();
    server.send(request).await;
    let (_, _, answer) = server.send(post(CHAT, "{")).await;
    let samples = samples(&server).await;
    for (name, expected) in [
        ("http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"}", 4.0),
        ("http_requests_total{handler=\"/v1/chat/completions\",method=\"POST\",status=\"4xx\"}", 2.0),
        ("http_requests_total{handler=\"none\",method=\"GET\",status=\"4xx\"}", 1.0),
        ("http_request_duration_seconds_count{handler=\"/v1/completions\",method=\"POST\"}", 4.0),
        ("http_request_duration_highr_seconds_count", 7.0),
        ("http_request_size_bytes_count{handler=\"/v1/chat/completions\"}", 2.0),
        ("http_request_size_bytes_sum{handler=\"/v1/chat/completions\"}", 3.0),
        ("http_response_size_bytes_count{handler=\"/v1/chat/completions\"}", 2.0),
    ] {
        assert_eq!(value(&samples, name), Some(expected), "{name}");
    }
    let sent = value(&samples, "http_response_size_bytes_sum{handler=\"/v1/chat/completions\"}").unwrap();
    assert!(sent > answer.len() as f64, "both answers are counted: {sent}");
    if cfg!(target_os = "linux") {
        assert!(value(&samples, "process_resident_memory_bytes").unwrap() > 1e6);
        assert!(value(&samples, "process_open_fds").unwrap() > 2.0);
    }
}

#[tokio::test]
async fn vllms_names_come_when_they_are_wanted_and_say_the_same() {
    let plain = Server::new();
    workload(&plain).await;
    assert!(!plain.get("/metrics").await.1.contains("vllm:"));
    let server = ServerOptions { vllm_metrics: true, ..ServerOptions::default() };
    let server = Server::with(Options { server, ..Options::default() });
    workload(&server).await;
    server.eventually("all have ended", |stats| stats.running == 0).await;
    let samples = samples(&server).await;
    let ours: Vec<&String> = samples.keys().filter(|name| name.starts_with("nibble:")).collect();
    assert!(ours.len() > 100);
    for name in ours {
        let under_vllm = samples.get(&name.replace("nibble:", "vllm:"));
        let expected = (!name.contains("last_step_age")).then_some(&samples[name]);
        assert_eq!(under_vllm, expected, "{name}");
    }
    for (retired, today) in [
        ("gpu_cache_usage_perc", "kv_cache_usage_perc"),
        ("gpu_prefix_cache_queries_total", "prefix_cache_queries_total"),
        ("gpu_prefix_cache_hits_total", "prefix_cache_hits_total"),
        ("time_per_output_token_seconds_count", "inter_token_latency_seconds_count"),
    ] {
        let today = value(&samples, &format!("vllm:{today}"));
        assert!(today.is_some());
        assert_eq!(value(&samples, &format!("vllm:{retired}")), today, "{retired}");
        assert_eq!(value(&samples, &format!("nibble:{retired}")), None);
    }
    let both = ["prompt_tokens_total", "generation_tokens_total"]
        .map(|name| value(&samples, &format!("vllm:{name}")));
    assert_eq!(
        value(&samples, "vllm:tokens_total"),
        both[0].zip(both[1]).map(|(prompt, generated)| prompt + generated)
    );
    for nothing in ["num_requests_swapped", "cpu_cache_usage_perc"] {
        assert_eq!(value(&samples, &format!("vllm:{nothing}")), Some(0.0));
        assert_eq!(value(&samples, &format!("nibble:{nothing}")), None);
    }
}

#[tokio::test]
async fn drafts_are_counted_and_change_no_answer() {
    let engine = EngineConfig { max_draft_tokens: 4, ..EngineConfig::default() };
    let server = Server::with(Options { engine, ..Options::default() });
    let body = json!({"prompt": "abcdefgab", "temperature": 0, "max_tokens": 8});
    assert_eq!(server.ok(COMPLETIONS, body).await["choices"][0]["text"], "cdefghij");
    let samples = samples(&server).await;
    // "d" after "bc" is right, and so is "fg" after "bcde".
    for (name, expected) in [
        ("num_drafts_total", 2.0),
        ("num_draft_tokens_total", 3.0),
        ("num_accepted_tokens_total", 3.0),
        ("num_accepted_tokens_per_pos_total{position=\"0\"}", 2.0),
        ("num_accepted_tokens_per_pos_total{position=\"1\"}", 1.0),
        ("num_accepted_tokens_per_pos_total{position=\"2\"}", 0.0),
        ("num_accepted_tokens_per_pos_total{position=\"3\"}", 0.0),
        ("num_drafts_by_draft_length_total{draft_length=\"1\"}", 1.0),
        ("num_drafts_by_draft_length_total{draft_length=\"2\"}", 1.0),
        ("num_drafts_by_draft_length_total{draft_length=\"4\"}", 0.0),
    ] {
        let name = format!("nibble:spec_decode_{name}");
        assert_eq!(value(&samples, &name), Some(expected), "{name}");
    }
}
