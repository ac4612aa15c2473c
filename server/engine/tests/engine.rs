//! The engine over a runner whose logits are a known function of the tokens in its cache.

mod support;

use std::time::{Duration, Instant};

use nibble_engine::{
    Engine, EngineConfig, EngineHandle, EventSink, FinishReason, Health, Request, RequestEvent,
    SamplingParameters, SinkState, StartError, StepRunner, SubmitError,
};
use support::{Completion, Fault, ScriptedRunner, Stream, eventually, expected_greedy, gated, greedy, mix};

const VOCABULARY: usize = 40;
const EOS: &[u32] = &[3];

fn start(runner: impl StepRunner + 'static, config: EngineConfig) -> (Engine, EngineHandle) {
    let engine = Engine::start(Box::new(runner), config).expect("a valid configuration");
    let handle = engine.handle();
    (engine, handle)
}

fn runner(blocks: usize) -> ScriptedRunner {
    ScriptedRunner::new(blocks, 4, VOCABULARY, EOS)
}

fn prompt(length: usize, seed: u64) -> Vec<u32> {
    (0..length as u64).map(|at| (mix(seed, at) % VOCABULARY as u64) as u32).collect()
}

/// A request with everything that sampling offers, chosen by `seed`.
fn sampled(seed: u64) -> Request {
    let pick = |at: u64, of: u64| mix(seed, 1000 + at) % of;
    let sampling = SamplingParameters {
        max_tokens: 1 + pick(0, 30) as usize,
        min_tokens: pick(1, 5) as usize,
        temperature: [0.0, 0.7, 1.3][pick(2, 3) as usize],
        top_p: [1.0, 0.9][pick(3, 2) as usize],
        top_k: [None, Some(10)][pick(4, 2) as usize],
        min_p: [0.0, 0.05][pick(5, 2) as usize],
        repetition_penalty: [1.0, 1.2][pick(6, 2) as usize],
        frequency_penalty: [0.0, 0.3][pick(7, 2) as usize],
        presence_penalty: [0.0, -0.2][pick(8, 2) as usize],
        logit_bias: vec![(pick(9, 40) as u32, 1.5)],
        seed: Some(seed),
        stop_token_ids: vec![pick(10, 40) as u32],
        ignore_eos: pick(11, 2) == 0,
        logprobs: [None, Some(3)][pick(12, 2) as usize],
    };
    Request { prompt: prompt(1 + pick(13, 40) as usize, seed), sampling }
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
            prompt_tokens,
            completion_tokens: token_ids.len() + usize::from(stop),
        };
        assert_eq!(completion.end, end);
    }
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
}

#[test]
fn a_request_gets_the_same_events_alone_among_64_others_after_preemption_and_in_any_chunks() {
    let requests: Vec<Request> = (0..65).map(sampled).collect();
    let alone: Vec<Completion> =
        requests.iter().map(|request| run_alone(request.clone(), 64, EngineConfig::default())).collect();
    let tiny = EngineConfig { max_step_tokens: 7, max_prefill_chunk_tokens: 3, ..Default::default() };
    let one = EngineConfig { max_prefill_chunk_tokens: 1, ..Default::default() };
    // 18 blocks of 4 hold the longest request and little else: sequences are preempted again and again.
    for (blocks, config, preempts) in [
        (2000, EngineConfig::default(), false),
        (2000, tiny, false),
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
        assert_eq!(stats.decode_seconds.count, 65);
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
    let request = |seed| Request {
        prompt: vec![5, 6],
        sampling: SamplingParameters { seed, ignore_eos: true, ..Default::default() },
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
fn a_closed_sink_ends_its_sequence_within_one_step_and_frees_its_blocks() {
    let (runner, gate) = gated(runner(64));
    let (_engine, handle) = start(runner, EngineConfig::default());
    let request = sampled_long(1);
    let stream = Stream::submit(&handle, request.clone()).expect("accepted");
    gate.step_has_begun();
    gate.let_go();
    assert!(matches!(stream.next(), RequestEvent::Token { .. }));
    drop(stream);
    gate.step_has_begun();
    gate.let_go();
    eventually("the sequence ends", || handle.stats().finished.aborted == 1);
    let stats = handle.stats();
    assert_eq!((stats.steps, stats.running, stats.kv_blocks_used), (2, 0, 0));
    // The engine serves on.
    drop(gate);
    assert_eq!(Stream::submit(&handle, request).expect("accepted").finish().token_ids.len(), 100);
}

#[test]
fn an_abort_during_a_step_ends_the_request_with_that_step_and_without_its_token() {
    let (runner, gate) = gated(runner(64));
    let (_engine, handle) = start(runner, EngineConfig { max_running_sequences: 1, ..Default::default() });
    let stream = Stream::submit(&handle, greedy(vec![1, 2, 3], 10)).expect("accepted");
    let queued = Stream::submit(&handle, greedy(vec![1, 2], 10)).expect("accepted");
    gate.step_has_begun();
    handle.abort(stream.id);
    handle.abort(queued.id);
    gate.let_go();
    for (stream, prompt_tokens) in [(stream, 3), (queued, 2)] {
        let end = RequestEvent::Finished {
            reason: FinishReason::Aborted,
            stop_token: None,
            prompt_tokens,
            completion_tokens: 0,
        };
        assert_eq!(stream.finish(), Completion { token_ids: vec![], logprobs: vec![], end });
    }
    assert_eq!(handle.stats().steps, 1);
    assert_eq!(handle.stats().kv_blocks_used, 0);
    // Aborting what has ended does nothing.
    handle.abort(nibble_engine::RequestId(0));
    let next = Stream::submit(&handle, greedy(vec![1], 1)).expect("accepted");
    gate.step_has_begun();
    gate.let_go();
    next.finish();
    assert_eq!(handle.stats().finished.aborted, 2);
}

#[test]
fn requests_that_can_never_run_are_refused_at_once() {
    let (_engine, handle) = start(runner(4), EngineConfig::default());
    let submit = |request| Stream::submit(&handle, request).map(Stream::finish);
    // 4 blocks of 4 tokens, and a last token that needs no place.
    assert_eq!(handle.maximum_tokens(), 17);
    assert!(submit(greedy(prompt(10, 1), 7)).is_ok());
    let error = submit(greedy(prompt(10, 1), 8)).expect_err("too long");
    assert_eq!(error, SubmitError::TooLong { prompt_tokens: 10, max_tokens: 8, maximum_tokens: 17 });
    assert!(matches!(submit(greedy(prompt(10, 1), usize::MAX)), Err(SubmitError::TooLong { .. })));
    assert_eq!(submit(greedy(vec![], 1)), Err(SubmitError::EmptyPrompt));
    assert!(matches!(submit(greedy(vec![VOCABULARY as u32], 1)), Err(SubmitError::Invalid(_))));
    assert!(matches!(submit(greedy(vec![1], 0)), Err(SubmitError::Invalid(_))));
    assert_eq!(handle.stats().finished.length + handle.stats().finished.stop, 1);
}

#[test]
fn a_full_queue_refuses_and_accepts_again_later() {
    let (runner, gate) = gated(runner(64));
    let config = EngineConfig { max_running_sequences: 1, max_waiting_requests: 2, ..Default::default() };
    let (_engine, handle) = start(runner, config);
    let first = Stream::submit(&handle, greedy(vec![1], 3)).expect("accepted");
    gate.step_has_begun();
    let second = Stream::submit(&handle, greedy(vec![2], 3)).expect("accepted");
    let third = Stream::submit(&handle, greedy(vec![3], 3)).expect("accepted");
    assert_eq!(handle.stats().waiting, 2, "those that the engine has not taken yet count too");
    let refused = Stream::submit(&handle, greedy(vec![4], 3)).err();
    assert_eq!(refused, Some(SubmitError::QueueFull { waiting: 2, limit: 2 }));
    drop(gate);
    for stream in [first, second, third] {
        stream.finish();
    }
    assert!(Stream::submit(&handle, greedy(vec![4], 3)).is_ok());
}

#[test]
fn a_drain_finishes_what_was_accepted_and_takes_nothing_more() {
    let (runner, gate) = gated(runner(64));
    let (engine, handle) = start(runner, EngineConfig { max_running_sequences: 1, ..Default::default() });
    let requests: Vec<Request> = (0..3).map(|seed| greedy(prompt(5, seed), 4)).collect();
    let streams: Vec<Stream> =
        requests.iter().map(|request| Stream::submit(&handle, request.clone()).expect("accepted")).collect();
    gate.step_has_begun();
    handle.drain(Instant::now() + support::PATIENCE);
    assert_eq!(handle.health(), Health::Draining);
    assert_eq!(Stream::submit(&handle, greedy(vec![1], 1)).err(), Some(SubmitError::ShuttingDown));
    drop(gate);
    for (stream, request) in streams.into_iter().zip(&requests) {
        assert_eq!(stream.finish().token_ids, expected_greedy(request, VOCABULARY, EOS).0);
    }
    // The handle is still there: the drain alone ends the engine.
    assert_eq!(engine.join(), Ok(()));
    assert_eq!(handle.health(), Health::Stopped);
    assert_eq!(Stream::submit(&handle, greedy(vec![1], 1)).err(), Some(SubmitError::ShuttingDown));
}

#[test]
fn a_drain_aborts_what_is_open_at_its_deadline() {
    let (runner, gate) = gated(runner(64));
    let (engine, handle) = start(runner, EngineConfig { max_running_sequences: 1, ..Default::default() });
    let streams: Vec<Stream> =
        (0..2).map(|seed| Stream::submit(&handle, greedy(prompt(5, seed), 200)).expect("accepted")).collect();
    gate.step_has_begun();
    handle.drain(Instant::now() + support::PATIENCE);
    // A second, more urgent drain wins.
    handle.drain(Instant::now());
    gate.let_go();
    for stream in streams {
        assert_eq!(stream.finish().reason(), Some(FinishReason::Aborted));
    }
    assert_eq!(engine.join(), Ok(()));
    assert_eq!(handle.stats().finished.aborted, 2);
    assert_eq!(handle.stats().kv_blocks_used, 0);
}

#[test]
fn an_engine_whose_handles_are_gone_finishes_and_stops() {
    let (engine, handle) = start(runner(64), EngineConfig::default());
    let stream = Stream::submit(&handle, greedy(vec![1, 2], 5)).expect("accepted");
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
    assert!(matches!(stream.finish().reason(), Some(FinishReason::Stop | FinishReason::Length)));
}

#[test]
fn a_runner_that_fails_panics_or_answers_nonsense_fails_every_open_request() {
    for (fault, message) in [
        (Fault::Error, "the device is gone"),
        (Fault::Panic, "the runner is broken"),
        (Fault::WrongShape, "rows"),
    ] {
        let (runner, gate) = gated(runner(64).with_fault(2, fault));
        let (engine, handle) = start(runner, EngineConfig { max_running_sequences: 2, ..Default::default() });
        let submit = |seed| Stream::submit(&handle, sampled_long(seed)).expect("accepted");
        let mut streams: Vec<Stream> = (0..3).map(submit).collect();
        for _ in 0..2 {
            gate.step_has_begun();
            gate.let_go();
        }
        gate.step_has_begun();
        // Not even taken from the channel when the step fails.
        streams.push(submit(3));
        gate.let_go();
        for stream in streams {
            let end = stream.finish().end;
            assert!(
                matches!(&end, RequestEvent::Failed { message: found } if found.contains(message)),
                "{end:?}"
            );
        }
        let failure = engine.join().expect_err("failed");
        assert!(failure.message.contains(message), "{failure}");
        assert_eq!(handle.health(), Health::Failed { message: failure.message.clone() });
        let refused = Stream::submit(&handle, greedy(vec![1], 1)).err();
        assert_eq!(refused, Some(SubmitError::EngineFailed { message: failure.message }));
        let stats = handle.stats();
        assert_eq!((stats.finished.failed, stats.running, stats.waiting), (4, 0, 0));
        assert_eq!(stats.last_step_age, None);
    }
}

#[test]
fn a_sink_that_panics_fails_the_engine_and_every_other_request_hears_of_it() {
    struct PanickingSink;
    impl EventSink for PanickingSink {
        fn send(&mut self, event: RequestEvent) -> SinkState {
            panic!("no place for {event:?}");
        }
    }
    let (runner, gate) = gated(runner(64));
    let (engine, handle) = start(runner, EngineConfig::default());
    let before = Stream::submit(&handle, sampled_long(1)).expect("accepted");
    handle.submit(sampled_long(2), Box::new(PanickingSink)).expect("accepted");
    let after = Stream::submit(&handle, sampled_long(3)).expect("accepted");
    drop(gate);
    for stream in [before, after] {
        let end = stream.finish().end;
        assert!(matches!(&end, RequestEvent::Failed { message } if message.contains("no place")), "{end:?}");
    }
    assert!(engine.join().is_err_and(|failure| failure.message.contains("no place")));
    assert!(matches!(handle.health(), Health::Failed { .. }));
}

fn sampled_long(seed: u64) -> Request {
    let mut request = greedy(prompt(3, seed), 100);
    request.sampling.ignore_eos = true;
    request
}

#[test]
fn logits_that_are_not_numbers_fail_the_request_alone() {
    let (engine, handle) = start(runner(64).with_fault(0, Fault::NotANumber), EngineConfig::default());
    let end = Stream::submit(&handle, greedy(vec![1], 5)).expect("accepted").finish().end;
    assert!(matches!(&end, RequestEvent::Failed { message } if message.contains("not finite")), "{end:?}");
    let request = greedy(vec![1], 5);
    let completion = Stream::submit(&handle, request.clone()).expect("accepted").finish();
    assert_eq!(completion.token_ids, expected_greedy(&request, VOCABULARY, EOS).0);
    assert_eq!(handle.stats().finished.failed, 1);
    assert_eq!(handle.stats().kv_blocks_used, 0);
    drop(handle);
    assert_eq!(engine.join(), Ok(()));
}

#[test]
fn the_age_of_the_last_step_grows_while_a_step_hangs_and_is_absent_when_idle() {
    let (runner, gate) = gated(runner(64));
    let (_engine, handle) = start(runner, EngineConfig::default());
    assert_eq!(handle.stats().last_step_age, None);
    let stream = Stream::submit(&handle, greedy(vec![1], 1)).expect("accepted");
    gate.step_has_begun();
    let hangs = Duration::from_millis(20);
    std::thread::sleep(hangs);
    assert!(handle.stats().last_step_age.is_some_and(|age| age >= hangs));
    assert_eq!((handle.stats().running, handle.stats().waiting), (1, 0));
    gate.let_go();
    stream.finish();
    assert_eq!(handle.stats().last_step_age, None);
}

#[test]
fn a_configuration_or_a_runner_that_allows_no_step_is_refused() {
    let refused = |runner, config| Engine::start(Box::new(runner), config).err();
    let config = EngineConfig { max_step_tokens: 0, ..Default::default() };
    let error = refused(runner(4), config);
    assert!(matches!(error, Some(StartError::Config { field: "max_step_tokens" })));
    for limits in [
        runner(0),
        ScriptedRunner::new(4, 0, VOCABULARY, EOS),
        ScriptedRunner::new(4, 4, 0, &[]),
        ScriptedRunner::new(4, 4, VOCABULARY, &[VOCABULARY as u32]),
    ] {
        assert!(matches!(refused(limits, EngineConfig::default()), Some(StartError::Limits(_))));
    }
}

#[test]
fn after_ten_thousand_requests_aborts_and_hang_ups_from_many_threads_nothing_is_left() {
    let config = EngineConfig { max_step_tokens: 64, max_running_sequences: 16, ..Default::default() };
    let (engine, handle) = start(runner(100), config);
    const THREADS: u64 = 8;
    const REQUESTS: u64 = 1250;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let handle = handle.clone();
            scope.spawn(move || {
                let mut streams = Vec::new();
                for number in 0..REQUESTS {
                    let seed = thread * REQUESTS + number;
                    let request = sampled(seed);
                    let stream = loop {
                        match Stream::submit(&handle, request.clone()) {
                            Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                            submitted => break submitted.expect("accepted"),
                        }
                    };
                    match mix(seed, 77) % 6 {
                        0 => handle.abort(stream.id),
                        1 => drop(stream),
                        2 => {
                            stream.next();
                            // Hangs up after its first event.
                        }
                        3 => streams.push((request, stream)),
                        _ => {
                            let aborted = stream.id;
                            streams.push((request, stream));
                            if mix(seed, 78).is_multiple_of(2) {
                                handle.abort(aborted);
                            }
                        }
                    }
                }
                for (request, stream) in streams {
                    let completion = stream.finish();
                    let RequestEvent::Finished { prompt_tokens, completion_tokens, reason, .. } =
                        completion.end
                    else {
                        panic!("{:?}", completion.end)
                    };
                    assert_eq!(prompt_tokens, request.prompt.len());
                    let stop = usize::from(reason == FinishReason::Stop);
                    assert_eq!(completion_tokens, completion.token_ids.len() + stop);
                }
            });
        }
    });
    handle.drain(Instant::now() + support::PATIENCE);
    assert_eq!(engine.join(), Ok(()));
    let stats = handle.stats();
    let finished = stats.finished;
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    assert_eq!(finished.stop + finished.length + finished.aborted, THREADS * REQUESTS);
    assert_eq!(finished.failed, 0);
    assert!(finished.aborted > 1000, "{finished:?}");
}
