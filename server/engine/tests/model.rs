//! The engine over a real model on the CPU: a request's tokens and log probabilities have the same bits
//! alone, among others, in chunks, after preemption and with its prefix cached.

mod support;

use std::path::Path;

use nibble_engine::{Engine, EngineConfig, EngineStats, ModelRunner, Pooling, Request, SamplingParameters};
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::Model;
use nibble_tests::tiny_model::{TinyModel, VOCABULARY};
use support::{Completion, Stream, gated, mix};

const MAX_POSITIONS: usize = 128;

/// Request number `seed`: its prompt is of some length, its completion of another.
fn request(seed: u64) -> Request {
    let prompt_tokens = 5 + mix(seed, 1) % 40;
    let prompt = (0..prompt_tokens).map(|at| (mix(seed, 100 + at) % VOCABULARY as u64) as u32).collect();
    let sampling = SamplingParameters {
        max_tokens: 10 + (mix(seed, 2) % 20) as usize,
        temperature: if seed.is_multiple_of(3) { 0.0 } else { 0.9 },
        // Greedy ones repeat themselves.
        repetition_penalty: if seed.is_multiple_of(3) { 1.0 } else { 1.1 },
        seed: Some(seed),
        ignore_eos: true,
        logprobs: Some(4),
        prompt_logprobs: seed.is_multiple_of(2).then_some(3),
        ..Default::default()
    };
    match seed % 10 {
        8 => Request::embedding(prompt, Pooling::Mean),
        9 => Request::embedding(prompt, Pooling::Last),
        _ => Request::new(prompt, sampling),
    }
}

/// Runs requests together on a new engine.
fn run(
    directory: &Path,
    blocks: usize,
    config: EngineConfig,
    seeds: &[u64],
) -> (Vec<Completion>, EngineStats) {
    let checkpoint = Checkpoint::open(directory).expect("a valid checkpoint");
    let model = Model::load(Cpu::new(2), &checkpoint, MAX_POSITIONS).expect("a valid model");
    let (runner, gate) = gated(ModelRunner::new(model, blocks).unwrap());
    let engine = Engine::start(Box::new(runner), config).expect("a valid engine");
    let handle = engine.handle();
    let limits = handle.limits();
    assert_eq!((limits.blocks, limits.vocabulary_size), (blocks, VOCABULARY));
    assert_eq!(limits.maximum_sequence_tokens, MAX_POSITIONS);
    assert_eq!(limits.eos_token_ids, [2]);
    let submit = || -> Vec<Stream> {
        let submit = |&seed| Stream::submit(&handle, request(seed)).expect("accepted");
        seeds.iter().map(submit).collect()
    };
    let finish =
        |streams: Vec<Stream>| -> Vec<Completion> { streams.into_iter().map(Stream::finish).collect() };
    let streams = submit();
    // All are there before the first step is done.
    drop(gate);
    let completions = finish(streams);
    let hits = handle.stats().prefix_cache_hits;
    // Once more: what the cache still has is not computed again.
    assert_eq!(finish(submit()), completions, "with prefixes cached");
    let stats = handle.stats();
    // Prompts have at least 5 tokens, and those of 17 and more fill a block before their last token.
    let reads_cache = |request: &Request| {
        request.sampling.prompt_logprobs.is_none() && request.pooling != Some(Pooling::Mean)
    };
    let may_hit = |&seed: &u64| reads_cache(&request(seed)) && request(seed).prompt.len() > 16;
    let room = blocks >= 16 && seeds.iter().any(may_hit);
    assert!(!room || stats.prefix_cache_hits > hits, "prefixes are found");
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
    (completions, stats)
}

#[test]
fn tokens_and_logprobs_have_the_same_bits_alone_among_16_others_in_chunks_preempted_cached_and_drafted() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    TinyModel::named("llama").write(directory.path());
    let seeds: Vec<u64> = (0..17).collect();
    let alone: Vec<Completion> = seeds
        .iter()
        .map(|&seed| run(directory.path(), 16, EngineConfig::default(), &[seed]).0.remove(0))
        .collect();
    for (request_seed, completion) in seeds.iter().zip(&alone) {
        assert_eq!(completion.token_ids.len(), request(*request_seed).sampling.max_tokens);
        assert_eq!(completion.embedding.is_some(), request(*request_seed).pooling.is_some());
        assert!(completion.logprobs.iter().flatten().all(|logprobs| logprobs.logprob.is_finite()));
        let request = request(*request_seed);
        let is_scored = request.sampling.prompt_logprobs.is_some();
        let scored = if is_scored { request.prompt.len() - 1 } else { 0 };
        assert_eq!(completion.prompt_logprobs.len(), scored);
        assert!(completion.prompt_logprobs.iter().all(|logprobs| logprobs.logprob.is_finite()));
    }
    let tiny = EngineConfig { max_step_tokens: 19, max_prefill_chunk_tokens: 3, ..Default::default() };
    let drafts = EngineConfig { max_draft_tokens: 6, max_step_tokens_with_drafts: 60, ..Default::default() };
    let tiny_drafts = EngineConfig { max_draft_tokens: 3, max_step_tokens_with_drafts: 19, ..tiny.clone() };
    // 12 blocks of 16 tokens hold three or four of these sequences.
    for (blocks, config, preempts) in [
        (200, EngineConfig::default(), false),
        (200, tiny.clone(), false),
        (200, drafts.clone(), false),
        (12, EngineConfig::default(), true),
        (12, tiny, true),
        (8, drafts, true),
        (6, tiny_drafts, true),
    ] {
        let (together, stats) = run(directory.path(), blocks, config.clone(), &seeds);
        assert_eq!(together, alone, "{blocks} blocks, {config:?}");
        assert_eq!(stats.preemptions > 0, preempts, "{} preemptions, {config:?}", stats.preemptions);
        assert_eq!(stats.kv_blocks_used, 0);
        let right: u64 = stats.accepted_draft_tokens.iter().sum();
        assert_eq!(right > 0, config.max_draft_tokens > 0, "{right} of {} are right", stats.draft_tokens);
        assert_eq!(right < stats.draft_tokens, config.max_draft_tokens > 0, "and not all");
    }
}
