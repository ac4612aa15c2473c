//! Priorities, tenants and salts.

use std::collections::BTreeMap;

use proptest::prelude::{prop, proptest};

use super::*;

fn submit_as(scheduler: &mut Scheduler, id: u64, tenant: &str, priority: i32, tokens: (usize, usize)) {
    let (prompt_tokens, max_tokens) = tokens;
    let first = 1000 * (id as u32 + 1);
    let prompt = (first..first + prompt_tokens as u32).collect();
    let sampling = SamplingParameters { max_tokens, ..Default::default() };
    let request = Request { priority, tenant: tenant.into(), ..Request::new(prompt, sampling) };
    scheduler.submit(RequestId(id), request, Duration::ZERO);
}

#[test]
fn lower_priority_numbers_go_first_and_equal_ones_in_the_order_of_arrival() {
    let mut scheduler = scheduler(100, EngineConfig { max_running_sequences: 1, ..config(100, 100) });
    for (id, priority) in [1, 0, 1, -5, 0].into_iter().enumerate() {
        submit_as(&mut scheduler, id as u64, "a", priority, (4, 1));
    }
    let order: Vec<_> = (0..5).flat_map(|_| step(&mut scheduler)).map(|(id, _)| id).collect();
    assert_eq!(order, [3, 1, 4, 0, 2]);
}

#[test]
fn a_request_with_priority_takes_the_place_of_the_last_one_without() {
    let mut scheduler = scheduler(100, EngineConfig { max_running_sequences: 2, ..config(100, 100) });
    submit_as(&mut scheduler, 0, "a", 1, (4, 3));
    submit_as(&mut scheduler, 1, "a", 1, (4, 3));
    assert_eq!(step(&mut scheduler), [(0, 4), (1, 4)]);
    submit_as(&mut scheduler, 2, "a", 1, (4, 2));
    submit_as(&mut scheduler, 3, "a", 0, (8, 2));
    assert_eq!(step(&mut scheduler), [(0, 1), (3, 8)], "1 came last of those without priority");
    assert_eq!(scheduler.stats().preemptions, 1);
    assert_eq!(step(&mut scheduler), [(3, 1), (0, 1)]);
    assert_eq!(step(&mut scheduler), [(1, 1), (2, 4)], "the cache still has the prompt of 1");
}

#[test]
fn nobody_makes_way_in_vain_or_for_an_equal() {
    let mut scheduler = scheduler(8, config(100, 100));
    submit_as(&mut scheduler, 0, "a", 0, (16, 4));
    submit_as(&mut scheduler, 1, "a", 1, (4, 4));
    assert_eq!(step(&mut scheduler), [(0, 16), (1, 4)]);
    submit_as(&mut scheduler, 2, "a", 0, (20, 4));
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1)], "without 1 there would still be no room for 2");
    assert_eq!(scheduler.stats().preemptions, 0);
}

#[test]
fn a_tenant_with_many_requests_does_not_keep_another_waiting() {
    let mut scheduler = scheduler(100, EngineConfig { max_running_sequences: 1, ..config(100, 100) });
    for id in 0..6 {
        submit_as(&mut scheduler, id, "many", 0, (4, 1));
    }
    step(&mut scheduler);
    submit_as(&mut scheduler, 6, "few", 0, (4, 1));
    submit_as(&mut scheduler, 7, "few", 0, (4, 1));
    let order: Vec<_> = (0..7).flat_map(|_| step(&mut scheduler)).map(|(id, _)| id).collect();
    assert_eq!(order, [1, 6, 2, 7, 3, 4, 5], "in turns, and nobody has saved up for later");
}

#[test]
fn equal_tokens_after_different_salts_are_not_shared() {
    let mut scheduler = scheduler(100, config(100, 100));
    let mut computed = |id: u64, salt: Option<&str>| {
        let sampling = SamplingParameters { max_tokens: 1, ..Default::default() };
        let cache_salt = salt.map(Into::into);
        let request = Request { cache_salt, ..Request::new((0..9).collect(), sampling) };
        scheduler.submit(RequestId(id), request, Duration::ZERO);
        step(&mut scheduler)
    };
    for (round, salt) in [None, Some("a"), Some("b")].into_iter().enumerate() {
        let id = 2 * round as u64;
        assert_eq!(computed(id, salt), [(id, 9)]);
        assert_eq!(computed(id + 1, salt), [(id + 1, 1)]);
    }
}

proptest! {
    /// The bound of the virtual token counter: over any time in which two tenants always have requests waiting, what
    /// they get over their weights differs by no more than what one admission and the running requests can add.
    #[test]
    fn tenants_that_always_wait_get_tokens_by_their_weights(
        (weight, longest, running) in (1..5u32, 2..30usize, 1..6usize),
        lengths in prop::collection::vec((1..30usize, 1..30usize), 40..80),
    ) {
        let tenant_weights = BTreeMap::from([("heavy".to_owned(), weight)]);
        let config = EngineConfig { max_running_sequences: running, tenant_weights, ..config(64, 16) };
        let mut scheduler = scheduler(64, config);
        let mut lengths = lengths.into_iter().cycle();
        let mut id = 0;
        for _ in 0..400 {
            for tenant in ["heavy", "light"] {
                while scheduler.waiting.lines().filter(|line| {
                    line.clone().next().is_some_and(|sequence| &*sequence.tenant == tenant)
                }).flatten().count() < 2 {
                    let (prompt_tokens, max_tokens) = lengths.next().unwrap();
                    let tokens = (prompt_tokens.min(longest), max_tokens.min(longest));
                    submit_as(&mut scheduler, id, tenant, 0, tokens);
                    id += 1;
                }
            }
            step(&mut scheduler);
            let (heavy, light) = (scheduler.waiting.service("heavy"), scheduler.waiting.service("light"));
            let bound = longest as f64 + 2.0 * (longest * running) as f64;
            assert!((heavy - light).abs() <= bound, "{heavy} and {light} tokens, at most {bound} apart");
        }
    }
}
