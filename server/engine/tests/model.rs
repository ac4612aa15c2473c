//! The engine over a real model on the CPU: a request's tokens and log probabilities have the same bits
//! alone, among others, in chunks, after preemption and with its prefix cached.

mod support;

use std::path::Path;

use nibble_engine::{Engine, EngineConfig, EngineStats, ModelRunner, Request, SamplingParameters};
use nibble_kernels::device::cpu::Cpu;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::Model;
use safetensors::tensor::{Dtype, TensorView};
use support::{Completion, Stream, gated, mix};

const VOCABULARY: usize = 96;
const HIDDEN: usize = 48;
const INTERMEDIATE: usize = 80;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const LAYERS: usize = 2;
const MAX_POSITIONS: usize = 128;

/// Reproducible values in -0.5..0.5.
fn random(count: usize, seed: u64) -> Vec<f32> {
    (0..count as u64).map(|at| (mix(seed << 32, at) >> 40) as f32 / (1u64 << 24) as f32 - 0.5).collect()
}

/// A Llama of random weights.
fn write_model(directory: &Path) {
    let (query, key) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![query, HIDDEN]),
            ("self_attn.k_proj", vec![key, HIDDEN]),
            ("self_attn.v_proj", vec![key, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, query]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let values = random(shape.iter().product(), index as u64 + 1);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("written");
    let config = format!(
        r#"{{"architectures":["LlamaForCausalLM"],"vocab_size":{VOCABULARY},"hidden_size":{HIDDEN},
        "intermediate_size":{INTERMEDIATE},"num_hidden_layers":{LAYERS},"num_attention_heads":{HEADS},
        "num_key_value_heads":{KV_HEADS},"head_dim":{HEAD_DIM},"rms_norm_eps":1e-5,"rope_theta":10000.0,
        "max_position_embeddings":256,"tie_word_embeddings":true,"hidden_act":"silu",
        "torch_dtype":"float32","bos_token_id":1,"eos_token_id":2}}"#
    );
    std::fs::write(directory.join("config.json"), config).expect("written");
}

/// Request number `seed`: its prompt is of some length, its completion of another.
fn request(seed: u64) -> Request {
    let prompt_tokens = 5 + mix(seed, 1) % 40;
    let prompt = (0..prompt_tokens).map(|at| (mix(seed, 100 + at) % VOCABULARY as u64) as u32).collect();
    let sampling = SamplingParameters {
        max_tokens: 10 + (mix(seed, 2) % 20) as usize,
        temperature: if seed.is_multiple_of(3) { 0.0 } else { 0.9 },
        repetition_penalty: 1.1,
        seed: Some(seed),
        ignore_eos: true,
        logprobs: Some(4),
        ..Default::default()
    };
    Request { prompt, sampling }
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
    let (runner, gate) = gated(ModelRunner::new(model, blocks));
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
    let room = blocks >= 16 && seeds.iter().any(|&seed| request(seed).prompt.len() > 16);
    assert!(!room || stats.prefix_cache_hits > hits, "prefixes are found");
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
    (completions, stats)
}

#[test]
fn tokens_and_logprobs_have_the_same_bits_alone_among_16_others_in_chunks_preempted_and_cached() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    write_model(directory.path());
    let seeds: Vec<u64> = (0..17).collect();
    let alone: Vec<Completion> = seeds
        .iter()
        .map(|&seed| run(directory.path(), 16, EngineConfig::default(), &[seed]).0.remove(0))
        .collect();
    for (request_seed, completion) in seeds.iter().zip(&alone) {
        assert_eq!(completion.token_ids.len(), request(*request_seed).sampling.max_tokens);
        assert!(completion.logprobs.iter().flatten().all(|logprobs| logprobs.logprob.is_finite()));
    }
    let tiny = EngineConfig { max_step_tokens: 19, max_prefill_chunk_tokens: 3, ..Default::default() };
    // 12 blocks of 16 tokens hold three or four of these sequences.
    for (blocks, config, preempts) in [
        (200, EngineConfig::default(), false),
        (200, tiny.clone(), false),
        (12, EngineConfig::default(), true),
        (12, tiny, true),
    ] {
        let (together, stats) = run(directory.path(), blocks, config.clone(), &seeds);
        assert_eq!(together, alone, "{blocks} blocks, {config:?}");
        assert_eq!(stats.preemptions > 0, preempts, "{} preemptions", stats.preemptions);
        assert_eq!(stats.kv_blocks_used, 0);
    }
}
