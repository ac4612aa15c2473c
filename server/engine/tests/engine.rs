//! The engine over a runner whose logits are a known function of the tokens in its cache: what comes out.

mod support;

use nibble_engine::{
    Blame, ConstraintError, EngineConfig, Failure, FinishReason, Request, RequestEvent, SamplingParameters,
    TokenConstraint, TokenMask,
};
use support::requests::{Alternating, EOS, VOCABULARY, prompt, runner, sampled, start};
use support::{Completion, Stream, expected_greedy, gated, greedy};

/// Allows nothing, after the first token.
#[derive(Clone)]
struct Broken;

impl TokenConstraint for Broken {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        match completion {
            [] => Ok(TokenMask::from_words(vec![1 << 7])),
            _ => Err(ConstraintError { message: "it is broken".to_owned() }),
        }
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

#[test]
fn a_constraint_holds_for_every_token_and_logprobs_do_not_know_of_it() {
    let free = Request {
        sampling: SamplingParameters { logprobs: Some(0), ..greedy(vec![5], 20).sampling },
        ..greedy(vec![5], 20)
    };
    let constrained = Request { constraint: Some(Box::new(Alternating::default())), ..free.clone() };
    let completion = run_alone(constrained, 64, EngineConfig::default());
    assert!(!completion.token_ids.is_empty());
    for (at, token) in completion.token_ids.iter().enumerate() {
        assert_eq!(*token as usize % 2, at % 2, "{:?}", completion.token_ids);
        assert!((*token as usize) < u32::BITS as usize);
    }
    // The first token's place is the same with and without: so is the sum of the model's probabilities there.
    let all = |request: Request| Request {
        sampling: SamplingParameters { logprobs: Some(VOCABULARY), ..request.sampling },
        ..request
    };
    let first =
        |request: Request| match run_alone(all(request), 64, EngineConfig::default()).logprobs.swap_remove(0)
        {
            Some(logprobs) => logprobs.top,
            None => panic!("log probabilities were asked for"),
        };
    let constrained = Request { constraint: Some(Box::new(Alternating::default())), ..free.clone() };
    assert_eq!(first(constrained), first(free));
}

#[test]
fn a_constraint_that_cannot_go_on_fails_its_request_alone() {
    let (_engine, handle) = start(runner(64), EngineConfig::default());
    let neighbour = Stream::submit(&handle, greedy(vec![1, 2], 10)).expect("accepted");
    let broken = Request { constraint: Some(Box::new(Broken)), ..greedy(vec![5], 20) };
    let completion = Stream::submit(&handle, broken).expect("accepted").finish();
    assert_eq!(completion.token_ids, [7]);
    let message = "the structured output cannot go on: it is broken".to_owned();
    assert_eq!(completion.end, RequestEvent::Failed(Failure { message, blame: Blame::Request }));
    assert_eq!(neighbour.finish(), run_alone(greedy(vec![1, 2], 10), 64, EngineConfig::default()));
}

/// Leaves one token in each place, in runs of 3 that come again and again and are cut short at times; guesses at what it
/// leaves, not always right.
#[derive(Clone)]
struct Runs {
    guesses: bool,
}

impl Runs {
    fn token(at: usize) -> u32 {
        let cut = at / 7;
        [5, 6, 7][(at + cut) % 3]
    }
}

impl TokenConstraint for Runs {
    fn allowed_after(&mut self, completion: &[u32]) -> Result<TokenMask, ConstraintError> {
        let expected: Vec<u32> = (0..completion.len()).map(Self::token).collect();
        assert_eq!(completion, expected, "no token comes that is not allowed");
        Ok(TokenMask::from_words(vec![1 << Self::token(completion.len())]))
    }

    fn forced_after(&mut self, completion: &[u32]) -> Vec<u32> {
        let at = completion.len();
        // Nothing, or four tokens of which the last is wrong at times.
        let guess = if self.guesses && at.is_multiple_of(2) { 4 } else { 0 };
        (at..at + guess).map(|place| if place % 5 == 4 { 1 } else { Self::token(place) }).collect()
    }

    fn boxed_clone(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

#[test]
fn drafts_are_made_under_a_constraint_and_change_nothing() {
    let config = EngineConfig { max_draft_tokens: 6, ..Default::default() };
    let mut right = Vec::new();
    for guesses in [false, true] {
        for temperature in [0.0, 1.0] {
            let sampling = SamplingParameters {
                temperature,
                max_tokens: 60,
                seed: Some(7),
                logprobs: Some(2),
                ..Default::default()
            };
            let request =
                Request { constraint: Some(Box::new(Runs { guesses })), ..Request::new(vec![9], sampling) };
            let without = run_alone(request.clone(), 64, EngineConfig::default());
            assert_eq!(without.token_ids, (0..60).map(Runs::token).collect::<Vec<_>>());
            let (_engine, handle) = start(runner(64), config.clone());
            assert_eq!(Stream::submit(&handle, request).expect("accepted").finish(), without);
            let stats = handle.stats();
            let accepted = stats.accepted_draft_tokens.iter().sum::<u64>();
            assert!(stats.draft_tokens > accepted, "some drafts are wrong: {stats:?}");
            assert_eq!(stats.steps + accepted, 60, "each token that was right saves a step");
            right.push(accepted);
        }
    }
    assert!(right[0] > 10 && right[2] > right[0], "{right:?}");
}

fn run_alone(request: Request, blocks: usize, config: EngineConfig) -> Completion {
    let (_engine, handle) = start(runner(blocks), config);
    Stream::submit(&handle, request).expect("accepted").finish()
}

#[test]
fn greedy_completions_are_those_of_the_script() {
    let (engine, handle) = start(runner(64), EngineConfig::default());
    for seed in 0..20 {
        let request = greedy(prompt(1 + seed as usize * 3, seed), 25);
        let (token_ids, reason) = expected_greedy(&request, VOCABULARY, EOS);
        let prompt_tokens = request.prompt.len();
        let completion = Stream::submit(&handle, request).expect("accepted").finish();
        assert_eq!(completion.token_ids, token_ids);
        let stop = reason == FinishReason::Stop;
        let end = RequestEvent::Finished {
            reason,
            stop_token: stop.then_some(EOS[0]),
            stop_logprobs: None,
            prompt_tokens,
            completion_tokens: token_ids.len() + usize::from(stop),
        };
        assert_eq!(completion.end, end);
    }
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
}

#[test]
fn a_request_gets_the_same_events_alone_among_64_others_after_preemption_in_any_chunks_and_with_drafts() {
    let requests: Vec<Request> = (0..65).map(sampled).collect();
    let alone: Vec<Completion> =
        requests.iter().map(|request| run_alone(request.clone(), 64, EngineConfig::default())).collect();
    let tiny = EngineConfig { max_step_tokens: 7, max_prefill_chunk_tokens: 3, ..Default::default() };
    let one = EngineConfig { max_prefill_chunk_tokens: 1, ..Default::default() };
    let few_logits = EngineConfig { max_prompt_logit_rows: 4, ..Default::default() };
    let drafts = EngineConfig { max_draft_tokens: 4, max_step_tokens_with_drafts: 300, ..Default::default() };
    // 18 blocks of 4 hold the longest request and little else: sequences are preempted again and again.
    for (blocks, config, preempts) in [
        (2000, EngineConfig::default(), false),
        (2000, tiny, false),
        (2000, few_logits, false),
        (2000, drafts.clone(), false),
        (60, drafts, true),
        (18, one.clone(), true),
        (60, one, true),
    ] {
        let (runner, gate) = gated(runner(blocks));
        let (engine, handle) = start(runner, config);
        let streams: Vec<Stream> = requests
            .iter()
            .map(|request| Stream::submit(&handle, request.clone()).expect("accepted"))
            .collect();
        // All are there before the first step is done.
        drop(gate);
        for (stream, alone) in streams.into_iter().zip(&alone) {
            assert_eq!(&stream.finish(), alone, "{blocks} blocks");
        }
        let stats = handle.stats();
        assert_eq!(stats.preemptions > 0, preempts, "{} preemptions with {blocks} blocks", stats.preemptions);
        assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
        let prompt_tokens: usize = requests.iter().map(|request| request.prompt.len()).sum();
        assert_eq!(stats.prompt_tokens, prompt_tokens as u64, "counted once, preempted or not");
        let generated = |completion: &Completion| match completion.end {
            RequestEvent::Finished { completion_tokens, .. } => completion_tokens as u64,
            _ => 0,
        };
        assert_eq!(stats.generation_tokens, alone.iter().map(generated).sum::<u64>());
        assert_eq!(stats.finished.stop + stats.finished.length, 65);
        assert_eq!(stats.queue_seconds.count, 65);
        assert_eq!(stats.prefill_seconds.count, 65);
        let generating = requests.iter().filter(|request| request.pooling.is_none()).count();
        assert!((50..65).contains(&generating), "the others are embeddings");
        assert_eq!(stats.decode_seconds.count, generating as u64);
        assert_eq!(stats.step_tokens.count, stats.steps);
        assert_eq!(stats.last_step_age, None);
        // Once more: what the cache still has is not computed again.
        for (request, alone) in requests.iter().zip(&alone) {
            let stream = Stream::submit(&handle, request.clone()).expect("accepted");
            assert_eq!(&stream.finish(), alone, "{blocks} blocks, with prefixes cached");
        }
        let hits = handle.stats().prefix_cache_hits - stats.prefix_cache_hits;
        assert_eq!(hits > 500, blocks == 2000, "{hits} of {prompt_tokens} tokens found in {blocks} blocks");
        drop(handle);
        assert_eq!(engine.join(), Ok(()));
    }
}

#[test]
fn seeds_that_requests_do_not_bring_follow_from_the_engine_s_seed() {
    let request = |seed| {
        let sampling = SamplingParameters { seed, ignore_eos: true, ..Default::default() };
        Request::new(vec![5, 6], sampling)
    };
    let run = |seed| {
        let (_engine, handle) = start(runner(64), EngineConfig { seed, ..Default::default() });
        let streams: Vec<Stream> =
            (0..4).map(|_| Stream::submit(&handle, request(None)).expect("accepted")).collect();
        streams.into_iter().map(|stream| stream.finish().token_ids).collect::<Vec<_>>()
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    assert_ne!(first[0], first[1]);
}

#[test]
fn log_probabilities_of_a_prompt_are_those_that_its_tokens_have_as_a_completion() {
    let (_engine, handle) = start(runner(64), EngineConfig::default());
    let whole = prompt(30, 4);
    let run = |prompt: &[u32], sampling: SamplingParameters| {
        let request = Request::new(prompt.to_vec(), SamplingParameters { ignore_eos: true, ..sampling });
        Stream::submit(&handle, request).expect("accepted").finish()
    };
    let score = SamplingParameters { max_tokens: 0, prompt_logprobs: Some(VOCABULARY), ..Default::default() };
    let scored = run(&whole, score);
    assert_eq!((scored.token_ids.len(), scored.reason()), (0, Some(FinishReason::Length)));
    assert_eq!(scored.prompt_logprobs.len(), 29);
    for (before, logprobs) in scored.prompt_logprobs.iter().enumerate() {
        let next = whole[before + 1];
        // A bias leaves no other choice; log probabilities are those before it.
        let forced = SamplingParameters {
            max_tokens: 1,
            temperature: 0.0,
            logit_bias: vec![(next, 100.0)],
            logprobs: Some(VOCABULARY),
            ..Default::default()
        };
        let generated = run(&whole[..=before], forced);
        assert_eq!((generated.token_ids, generated.logprobs), (vec![next], vec![Some(logprobs.clone())]));
        let place = logprobs.top.iter().position(|top| top.token_id == next);
        assert_eq!(place, Some(logprobs.rank - 1));
    }
}

#[test]
fn a_stop_token_brings_its_log_probability_with_the_end() {
    let (_engine, handle) = start(runner(64), EngineConfig::default());
    let sampling = SamplingParameters {
        temperature: 0.0,
        logit_bias: vec![(EOS[0], 100.0)],
        logprobs: Some(0),
        ..Default::default()
    };
    let completion = Stream::submit(&handle, Request::new(vec![1], sampling)).expect("accepted").finish();
    let RequestEvent::Finished { stop_token, stop_logprobs: Some(logprobs), .. } = completion.end else {
        panic!("{:?}", completion.end)
    };
    assert_eq!((stop_token, completion.token_ids.len()), (Some(EOS[0]), 0));
    assert!(logprobs.logprob < 0.0);
}
