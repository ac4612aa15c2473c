//! How requests and engines end: hang-ups, aborts, refusals, drains, failures.

mod support;

use std::time::{Duration, Instant};

use nibble_engine::{
    Blame, Engine, EngineConfig, EventSink, Failure, FinishReason, Health, Request, RequestEvent, RequestId,
    SinkState, StartError, SubmitError,
};
use support::requests::{EOS, VOCABULARY, prompt, runner, sampled, start};
use support::{
    Completion, Fault, PATIENCE, ScriptedRunner, Stream, eventually, expected_greedy, gated, greedy, mix,
};

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
            stop_logprobs: None,
            prompt_tokens,
            completion_tokens: 0,
        };
        let nothing =
            Completion { token_ids: vec![], logprobs: vec![], prompt_logprobs: vec![], embedding: None, end };
        assert_eq!(stream.finish(), nothing);
    }
    assert_eq!(handle.stats().steps, 1);
    assert_eq!(handle.stats().kv_blocks_used, 0);
    // Aborting what has ended does nothing.
    handle.abort(RequestId(0));
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
    let of_another = Request { tenant: "another".into(), ..greedy(vec![4], 3) };
    let fourth = Stream::submit(&handle, of_another).expect("the queue of one tenant does not stop another");
    drop(gate);
    for stream in [first, second, third, fourth] {
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
    handle.drain(Instant::now() + PATIENCE);
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
    handle.drain(Instant::now() + PATIENCE);
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
                matches!(&end, RequestEvent::Failed(failure) if failure.message.contains(message)),
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
        assert!(
            matches!(&end, RequestEvent::Failed(failure) if failure.message.contains("no place")),
            "{end:?}"
        );
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
    let RequestEvent::Failed(Failure { message, blame: Blame::Engine }) = end else { panic!("{end:?}") };
    assert!(message.contains("not finite"), "{message}");
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
    handle.drain(Instant::now() + PATIENCE);
    assert_eq!(engine.join(), Ok(()));
    let stats = handle.stats();
    let finished = stats.finished;
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    assert_eq!(finished.stop + finished.length + finished.aborted, THREADS * REQUESTS);
    assert_eq!(finished.failed, 0);
    assert!(finished.aborted > 1000, "{finished:?}");
}
