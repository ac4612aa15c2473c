//! The sampler against definitions written down plainly in double precision.

use std::collections::BTreeMap;

use nibble_kernels::ops::sample::reference::{self, Interval};
use nibble_kernels::ops::sample::{NoToken, Wanted};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::distribution::{Distribution, Workspace};
use super::sampler::{LogitRow, NextToken, SamplingError, SamplingRow, Scratch};
use super::{Sampler, SamplingParameters, on_device, random};
use crate::constraint::TokenMask;

const SEED: u64 = 11;

fn row<'a>(logits: &'a [f32], parameters: &'a SamplingParameters) -> SamplingRow<'a> {
    SamplingRow {
        logits,
        parameters,
        seed: SEED,
        prompt: &[],
        completion: &[],
        stop_tokens: &[],
        allowed: None,
    }
}

fn sample(row: &SamplingRow<'_>) -> usize {
    Scratch::default().sample(row).expect("a token").token_id as usize
}

/// Reproducible values, about normally distributed, with deviation `spread`.
fn logits(count: usize, seed: u64, spread: f64) -> Vec<f32> {
    let uniform = |at: usize| random::uniform(seed, at as u64);
    let normal = |at: usize| (0..12).map(|part| uniform(12 * at + part)).sum::<f64>() - 6.0;
    (0..count).map(|at| (normal(at) * spread) as f32).collect()
}

/// The logits after bias, penalties and mask, from the definitions.
fn adjusted(row: &SamplingRow<'_>) -> Vec<f64> {
    let parameters = row.parameters;
    let mut logits: Vec<f64> = row.logits.iter().copied().map(f64::from).collect();
    for &(token, bias) in &parameters.logit_bias {
        logits[token as usize] += f64::from(bias);
    }
    let occurrences = |tokens: &[u32], token: usize| tokens.iter().filter(|&&t| t as usize == token).count();
    for (token, logit) in logits.iter_mut().enumerate() {
        let generated = occurrences(row.completion, token);
        if generated + occurrences(row.prompt, token) > 0 {
            let penalty = f64::from(parameters.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        *logit -= f64::from(parameters.frequency_penalty) * generated as f64;
        *logit -= if generated > 0 { f64::from(parameters.presence_penalty) } else { 0.0 };
    }
    if row.completion.len() < parameters.min_tokens {
        for &token in row.stop_tokens {
            logits[token as usize] = f64::NEG_INFINITY;
        }
    }
    for (token, logit) in logits.iter_mut().enumerate() {
        let token = token as u32;
        let is_allowed = parameters.allowed_token_ids.as_ref().is_none_or(|allowed| allowed.contains(&token));
        let with_it = [row.completion, &[token]].concat();
        let ends_a_bad_word = parameters.bad_words.iter().any(|word| with_it.ends_with(word));
        if !is_allowed || ends_a_bad_word {
            *logit = f64::NEG_INFINITY;
        }
    }
    logits
}

/// The distribution that a token is drawn from, by token; absent when a filter's border is too near to call
/// in single precision.
fn distribution(row: &SamplingRow<'_>) -> Option<BTreeMap<usize, f64>> {
    const NEAR: f64 = 1e-5;
    let parameters = row.parameters;
    let logits = adjusted(row);
    let maximum = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let temperature = f64::from(parameters.temperature);
    let mut kept: Vec<(usize, f64)> =
        logits.iter().map(|logit| ((logit - maximum) / temperature).exp()).enumerate().collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let min_p = f64::from(parameters.min_p);
    if min_p > 0.0 && kept.iter().any(|(_, weight)| (weight / min_p - 1.0).abs() < NEAR) {
        return None;
    }
    kept.retain(|&(_, weight)| weight >= min_p);
    kept.truncate(parameters.top_k.unwrap_or(usize::MAX));
    let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut reached = 0.0;
    let mut count = 0;
    for (_, weight) in &kept {
        if parameters.top_p < 1.0 && (reached / sum - f64::from(parameters.top_p)).abs() < NEAR {
            return None;
        }
        if parameters.top_p < 1.0 && reached / sum >= f64::from(parameters.top_p) {
            break;
        }
        reached += weight;
        count += 1;
    }
    kept.truncate(count);
    Some(kept.into_iter().map(|(token, weight)| (token, weight / reached)).collect())
}

/// The token that the inverse of the cumulative distribution gives; absent when too near to call.
fn expected(row: &SamplingRow<'_>) -> Option<usize> {
    let uniform = random::uniform(row.seed, row.completion.len() as u64);
    let mut cumulative = 0.0;
    let mut token = None;
    for (candidate, probability) in distribution(row)? {
        cumulative += probability;
        if (cumulative - uniform).abs() < 1e-5 {
            return None;
        }
        if token.is_none() && cumulative > uniform {
            token = Some(candidate);
        }
    }
    token
}

fn parameters() -> impl Strategy<Value = SamplingParameters> {
    let filters = (0.05f32..3.0, 0.01f32..1.0, any::<bool>(), prop::option::of(1..40usize), 0.0f32..0.3);
    let penalties = (0.5f32..2.0, -1.0f32..1.0, -1.0f32..1.0, 0..4usize);
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let bias = prop::collection::vec((0..300u32, -3.0f32..3.0), 0..3);
    let allowed = prop::option::of(prop::collection::vec(0..300u32, 1..40));
    // Few distinct tokens in words and completions: beginnings of words occur.
    let bad_words = prop::collection::vec(prop::collection::vec(0..12u32, 1..4), 0..30);
    let masks = (allowed, bad_words);
    (filters, penalties, switches, bias, masks).prop_map(
        |(filters, penalties, switches, logit_bias, masks)| {
            let (temperature, top_p, all, top_k, min_p) = filters;
            let (repetition_penalty, frequency_penalty, presence_penalty, min_tokens) = penalties;
            let (repeats, counts, filters_small, biased) = switches;
            SamplingParameters {
                temperature,
                top_p: if all { 1.0 } else { top_p },
                top_k,
                min_p: if filters_small { min_p } else { 0.0 },
                repetition_penalty: if repeats { repetition_penalty } else { 1.0 },
                frequency_penalty: if counts { frequency_penalty } else { 0.0 },
                presence_penalty: if counts { presence_penalty } else { 0.0 },
                min_tokens,
                logit_bias: if biased { logit_bias } else { Vec::new() },
                allowed_token_ids: masks.0,
                bad_words: masks.1,
                ..Default::default()
            }
        },
    )
}

proptest! {
    #[test]
    fn any_row_gives_the_token_of_the_reference(
        parameters in parameters(),
        (seed, count, spread) in (0..1_000_000u64, 300..3000usize, 0.0f64..6.0),
        prompt in prop::collection::vec(0..300u32, 1..20),
        completion in prop::collection::vec(prop_oneof![0..300u32, 0..12u32], 0..20),
    ) {
        let logits = logits(count, seed, spread);
        let row = SamplingRow {
            logits: &logits,
            parameters: &parameters,
            seed,
            prompt: &prompt,
            completion: &completion,
            stop_tokens: &[3, 9],
            allowed: None,
        };
        if adjusted(&row).iter().all(|logit| *logit == f64::NEG_INFINITY) {
            assert_eq!(Scratch::default().sample(&row), Err(SamplingError::NothingLeft));
            return Ok(());
        }
        if let Some(expected) = expected(&row) {
            assert_eq!(sample(&row), expected);
        }
        let greedy = SamplingParameters { temperature: 0.0, ..parameters.clone() };
        let chosen = sample(&SamplingRow { parameters: &greedy, ..row });
        let adjusted = adjusted(&row);
        let best = adjusted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!(best - adjusted[chosen] < 1e-5, "{best} {}", adjusted[chosen]);
    }

    #[test]
    fn the_most_likely_tokens_are_the_first_of_a_sorted_row(
        // Few distinct values: ties, within chunks and across them.
        values in prop::collection::vec((-40i32..4).prop_map(|value| value as f32 * 1.5), 1..900),
        count in 0..1000usize,
    ) {
        let mut tokens: Vec<u32> = (0..values.len() as u32).collect();
        let value = |token: u32| values[token as usize];
        tokens.sort_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
        let mut workspace = Workspace::default();
        let mut distribution = Distribution::new(&values, 1.0, &mut workspace).expect("numbers");
        assert_eq!(distribution.most_likely_token(), tokens[0] as usize);
        let found: Vec<u32> = distribution.most_likely(count).iter().map(|found| found.token).collect();
        assert_eq!(found, tokens[..count.min(tokens.len())]);
        for (place, &token) in tokens.iter().enumerate().step_by(7) {
            assert_eq!(distribution.rank(token as usize), place + 1);
        }
        let cut = (count > 0).then(|| distribution.top_k_cut(count)).flatten();
        let last = if count < tokens.len() && count > 0 { Some(tokens[count - 1]) } else { None };
        assert_eq!(cut.map(|cut| cut.token), last);
    }
}

#[test]
fn the_reference_can_nearly_always_be_called() {
    let called = (0..1000u64).filter(|&seed| {
        let logits = logits(1000, seed, 2.0);
        let parameters =
            SamplingParameters { top_p: 0.9, min_p: 0.01, top_k: Some(100), ..Default::default() };
        expected(&SamplingRow { seed, ..row(&logits, &parameters) }).is_some()
    });
    assert!(called.count() > 900);
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let parameters = SamplingParameters { temperature: 0.0, ..Default::default() };
    assert_eq!(sample(&row(&[0.0, 2.0, 1.0, 2.0, 2.0], &parameters)), 1);
    assert_eq!(sample(&row(&[f32::NEG_INFINITY, -3.0], &parameters)), 1);
    let biased = SamplingParameters { logit_bias: vec![(3, 0.5), (4, 0.5)], ..parameters };
    assert_eq!(sample(&row(&[0.0, 2.0, 1.0, 2.0, 2.0], &biased)), 3);
}

#[test]
fn draws_have_the_frequencies_of_the_distribution() {
    let logits = logits(40, 5, 1.5);
    for parameters in [
        SamplingParameters::default(),
        SamplingParameters { temperature: 0.7, top_k: Some(12), ..Default::default() },
        SamplingParameters { temperature: 1.4, top_p: 0.8, min_p: 0.02, ..Default::default() },
    ] {
        let row = row(&logits, &parameters);
        let distribution = distribution(&row).expect("far from every border");
        const DRAWS: u64 = 40_000;
        let mut counts = BTreeMap::new();
        for seed in 0..DRAWS {
            *counts.entry(sample(&SamplingRow { seed, ..row })).or_insert(0u64) += 1;
        }
        assert!(counts.keys().all(|token| distribution.contains_key(token)), "only kept tokens are drawn");
        // Tokens too rare for the chi-square approximation count as one.
        let (mut chi_square, mut degrees, mut rare, mut rare_expected) = (0.0, 0.0, 0.0, 0.0);
        for (token, probability) in &distribution {
            let expected = probability * DRAWS as f64;
            let count = counts.get(token).copied().unwrap_or(0) as f64;
            if expected < 10.0 {
                rare += count;
                rare_expected += expected;
            } else {
                chi_square += (count - expected).powi(2) / expected;
                degrees += 1.0;
            }
        }
        if rare_expected >= 10.0 {
            chi_square += (rare - rare_expected).powi(2) / rare_expected;
            degrees += 1.0;
        }
        // Four standard deviations above the mean of the chi-square distribution.
        let bound = degrees - 1.0 + 4.0 * f64::sqrt(2.0 * (degrees - 1.0));
        assert!(chi_square < bound, "{chi_square} is not below {bound}");
    }
}

#[test]
fn a_token_depends_on_the_seed_and_its_position_only() {
    let logits = logits(500, 1, 1.0);
    let parameters = SamplingParameters::default();
    let at = |seed, length: usize| {
        let completion = vec![1; length];
        sample(&SamplingRow { seed, completion: &completion, ..row(&logits, &parameters) })
    };
    let tokens: Vec<usize> = (0..50).map(|length| at(1, length)).collect();
    assert_eq!(tokens, (0..50).map(|length| at(1, length)).collect::<Vec<_>>());
    assert_ne!(tokens, (0..50).map(|length| at(2, length)).collect::<Vec<_>>());
    assert!(tokens.iter().any(|token| *token != tokens[0]));
}

#[test]
fn logprobs_are_the_model_s_own_whatever_the_sampling_changes() {
    let logits = logits(5000, 9, 3.0);
    let normalizer = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
    let plain = SamplingParameters { logprobs: Some(7), ..Default::default() };
    let changed = SamplingParameters {
        temperature: 0.3,
        top_k: Some(1),
        repetition_penalty: 1.3,
        logit_bias: vec![(17, 50.0)],
        ..plain.clone()
    };
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    tokens.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    for parameters in [plain, changed] {
        let sampled = Scratch::default().sample(&row(&logits, &parameters)).expect("a token");
        let logprobs = sampled.logprobs.expect("asked for");
        let close = |found: f32, token: usize| {
            (f64::from(found) - (f64::from(logits[token]) - normalizer)).abs() < 1e-5
        };
        assert!(close(logprobs.logprob, sampled.token_id as usize));
        assert_eq!(tokens[logprobs.rank - 1], sampled.token_id as usize);
        let top: Vec<usize> = logprobs.top.iter().map(|top| top.token_id as usize).collect();
        assert_eq!(top, tokens[..7]);
        assert!(logprobs.top.iter().all(|top| close(top.logprob, top.token_id as usize)));
    }
    let mut parameters = SamplingParameters { logprobs: Some(0), ..Default::default() };
    let none = Scratch::default().sample(&row(&logits, &parameters)).expect("a token");
    assert_eq!(none.logprobs.map(|logprobs| logprobs.top), Some(vec![]));
    parameters.logprobs = Some(logits.len());
    let all = Scratch::default().sample(&row(&logits, &parameters)).expect("a token");
    assert_eq!(all.logprobs.map(|logprobs| logprobs.top.len()), Some(logits.len()));
    parameters.logprobs = None;
    let absent = Scratch::default().sample(&row(&logits, &parameters)).expect("a token");
    assert_eq!(absent, NextToken { token_id: none.token_id, logprobs: None });
}

#[test]
fn stop_tokens_are_masked_until_min_tokens_and_no_bias_brings_them_back() {
    let logits = [5.0, 1.0, 0.0];
    let parameters = SamplingParameters {
        temperature: 0.0,
        min_tokens: 2,
        logit_bias: vec![(0, 100.0)],
        ..Default::default()
    };
    let at = |completion: &[u32]| {
        sample(&SamplingRow { completion, stop_tokens: &[0], ..row(&logits, &parameters) })
    };
    assert_eq!([at(&[]), at(&[1]), at(&[1, 1])], [1, 1, 0]);
}

#[test]
fn a_constraint_comes_before_everything_and_its_end_before_min_tokens() {
    let logits = [5.0, 1.0, 0.0, 2.0];
    let parameters = SamplingParameters {
        temperature: 0.0,
        min_tokens: 2,
        logit_bias: vec![(0, 100.0)],
        ..Default::default()
    };
    let with = |word: u32| {
        let allowed = Ok(TokenMask::from_words(vec![word]));
        sample(&SamplingRow { stop_tokens: &[3], allowed: Some(&allowed), ..row(&logits, &parameters) })
    };
    assert_eq!([with(0b1111), with(0b0110), with(0b1100), with(0b1000)], [0, 1, 2, 3]);
}

#[test]
fn what_is_allowed_banned_constrained_and_too_early_leaves_what_all_of_them_leave() {
    let logits = [5.0, 4.0, 3.0, 2.0, 1.0];
    let parameters = SamplingParameters {
        temperature: 0.0,
        min_tokens: 1,
        allowed_token_ids: Some(vec![0, 1, 2, 3]),
        bad_words: vec![vec![1], vec![7, 3], vec![8, 2]],
        logit_bias: vec![(1, 90.0), (4, 90.0)],
        ..Default::default()
    };
    let allowed = Ok(TokenMask::from_words(vec![0b11110]));
    let row = SamplingRow { stop_tokens: &[0], allowed: Some(&allowed), ..row(&logits, &parameters) };
    assert_eq!(sample(&row), 2, "0 is too early, 1 is banned, 4 is not among those allowed");
    assert_eq!(sample(&SamplingRow { completion: &[8], ..row }), 3, "2 would end a bad word");
    let nothing = Ok(TokenMask::from_words(vec![0b10010]));
    let row = SamplingRow { allowed: Some(&nothing), ..row };
    assert_eq!(Scratch::default().sample(&row), Err(SamplingError::NothingLeft));
}

#[test]
fn where_nothing_is_left_a_completion_that_may_end_does() {
    let logits = [5.0, 4.0, 3.0, 2.0];
    let parameters = SamplingParameters {
        temperature: 0.0,
        min_tokens: 9,
        allowed_token_ids: Some(vec![0, 3]),
        bad_words: vec![vec![0]],
        stop_token_ids: vec![3],
        ..Default::default()
    };
    let with = |word: u32, logits: &[f32; 4]| {
        let allowed = Ok(TokenMask::from_words(vec![word]));
        let row =
            SamplingRow { stop_tokens: &[1, 2, 3], allowed: Some(&allowed), ..row(logits, &parameters) };
        if logits.iter().all(|logit| logit.is_finite()) {
            check_that_a_device_is_asked_for_the_same(&row);
        }
        Scratch::default().sample(&row).map(|next| next.token_id)
    };
    assert_eq!(with(0b0111, &logits), Ok(1), "the first of the ends, allowed_token_ids or not");
    assert_eq!(with(0b0101, &logits), Ok(2));
    assert_eq!(
        with(0b1001, &logits),
        Err(SamplingError::NothingLeft),
        "a stop token of the request is no end"
    );
    assert_eq!(with(0b0111, &[5.0, f32::NAN, 3.0, 2.0]), Err(SamplingError::NotFinite));
}

#[test]
fn a_row_without_a_finite_logit_is_an_error_of_this_row() {
    let mut scratch = Scratch::default();
    let parameters = SamplingParameters { temperature: 0.0, min_tokens: 1, ..Default::default() };
    for logits in [[f32::NAN, 0.0], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
        assert_eq!(scratch.sample(&row(&logits, &parameters)), Err(SamplingError::NotFinite));
    }
    let masked = SamplingRow { stop_tokens: &[0, 1], ..row(&[1.0, 2.0], &parameters) };
    assert_eq!(scratch.sample(&masked), Err(SamplingError::NothingLeft));
    assert_eq!(scratch.sample(&row(&[1.0, 2.0], &parameters)).map(|sampled| sampled.token_id), Ok(1));
}

#[test]
fn rows_give_the_same_tokens_on_any_number_of_threads() {
    // Enough logits for the threads to be used.
    let rows: Vec<Vec<f32>> = (0..107).map(|seed| logits(30_000, seed, 2.0)).collect();
    let parameters = SamplingParameters {
        top_p: 0.95,
        top_k: Some(2000),
        repetition_penalty: 3.0,
        frequency_penalty: 1.0,
        logprobs: Some(2),
        ..Default::default()
    };
    // Each row has a history of its own, which must not reach the next one.
    let histories: Vec<Vec<u32>> = (0..107).map(|row| (row * 40..row * 40 + 40).collect()).collect();
    let rows: Vec<SamplingRow<'_>> = rows
        .iter()
        .enumerate()
        .map(|(seed, logits)| SamplingRow {
            seed: seed as u64,
            completion: &histories[seed],
            ..row(logits, &parameters)
        })
        .collect();
    assert!(rows.len() * 30_000 > 3 * super::LOGITS_PER_THREAD);
    let rows: Vec<LogitRow<'_>> = rows
        .into_iter()
        .flat_map(|row| [LogitRow::Sample(row), LogitRow::Score { logits: row.logits, token_id: 77, top: 3 }])
        .collect();
    let alone: Vec<_> = rows.iter().map(|row| Scratch::default().run(row)).collect();
    for threads in [0, 1, 3, 64] {
        assert_eq!(Sampler::new(threads).sample(&rows), alone);
    }
    assert_eq!(Sampler::new(2).sample(&[]), []);
}

/// The same rows by the host's sampler and, as a device is asked for them, by the definition of the device's operation.
fn check_that_a_device_is_asked_for_the_same(row: &SamplingRow<'_>) {
    let wanted = on_device::request(&LogitRow::Sample(*row), row.logits.len()).expect("no constraint failed");
    let found = Scratch::default().sample(row);
    let choice = match wanted.wanted {
        Wanted::Choice(choice) => choice,
        Wanted::Known(end) => return assert_eq!(found.map(|next| next.token_id), Ok(end)),
    };
    match (reference::intervals(row.logits, &choice), found) {
        (Ok(intervals), Ok(found)) => {
            let near = |interval: &&Interval| {
                (interval.from - 1e-4..interval.to + 1e-4).contains(&choice.uniform)
                    && interval.token_id == found.token_id
            };
            assert!(intervals.iter().any(|interval| near(&interval)), "{found:?}, {intervals:?}");
        }
        (Err(NoToken::NothingLeft), Err(SamplingError::NothingLeft)) => {}
        (expected, found) => panic!("{found:?} instead of {expected:?}"),
    }
}

proptest! {
    #[test]
    fn a_device_is_asked_for_what_the_host_would_do(
        parameters in parameters(),
        (seed, count) in (0..1_000_000u64, 300..800usize),
        prompt in prop::collection::vec(0..300u32, 1..20),
        completion in prop::collection::vec(prop_oneof![0..300u32, 0..12u32], 0..20),
        mask in prop::option::of(prop::collection::vec(any::<u32>(), 5..20)),
    ) {
        let logits = logits(count, seed, 3.0);
        let allowed = mask.map(|words| Ok(TokenMask::from_words(words)));
        let row = SamplingRow {
            logits: &logits,
            parameters: &parameters,
            seed,
            prompt: &prompt,
            completion: &completion,
            stop_tokens: &[3, 9],
            allowed: allowed.as_ref(),
        };
        // Where a filter's border is too near to call the two may differ.
        if expected(&row).is_some() || allowed.is_some() && parameters.top_p == 1.0 && parameters.min_p == 0.0 {
            check_that_a_device_is_asked_for_the_same(&row);
        }
        let greedy = SamplingParameters { temperature: 0.0, ..parameters.clone() };
        check_that_a_device_is_asked_for_the_same(&SamplingRow { parameters: &greedy, ..row });
    }
}
