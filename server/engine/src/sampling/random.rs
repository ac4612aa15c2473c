//! Random numbers without a state: Philox4x32-10, keyed by a seed and counted by position.
//!
//! A request's random numbers depend on nothing but its seed and how many tokens it has generated: not on
//! its neighbours, its prefill chunks or its preemptions. Source: Salmon et al., "Parallel Random Numbers:
//! As Easy as 1, 2, 3", SC 2011; constants and test vectors from their library Random123.

/// What a counter is used for, so that no two uses share a number.
const SAMPLING: u32 = 0;
const SEEDING: u32 = 1;

/// A number in `[0, 1)`, a multiple of 2^-53, for the token at `position` of the completion.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let bits = block(seed, position, SAMPLING) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The seed of request number `request`, which brought none, under the engine's seed.
pub(crate) fn derived_seed(engine_seed: u64, request: u64) -> u64 {
    block(engine_seed, request, SEEDING)
}

fn block(key: u64, counter: u64, purpose: u32) -> u64 {
    let [low, high, ..] = philox([counter as u32, (counter >> 32) as u32, purpose, 0], halves(key));
    u64::from(high) << 32 | u64::from(low)
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Ten rounds of Philox with four 32-bit words.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [low_0, high_0] = halves(0xD251_1F53 * u64::from(counter[0]));
        let [low_1, high_1] = halves(0xCD9E_8D57 * u64::from(counter[2]));
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_test_vectors_of_random123() {
        let vectors = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in vectors {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let mut counts = [0u32; 16];
        for seed in 0..64 {
            for position in 0..1000 {
                counts[(uniform(seed, position) * 16.0) as usize] += 1;
            }
        }
        let expected = 64_000.0 / 16.0;
        let chi_square: f64 =
            counts.iter().map(|&count| (f64::from(count) - expected).powi(2) / expected).sum();
        // 99.9 % of such sums over 15 degrees of freedom are below 37.7.
        assert!(chi_square < 37.7, "{chi_square}");
    }

    #[test]
    fn seeds_that_the_engine_derives_differ_from_request_to_request_and_from_engine_to_engine() {
        let mut seeds: Vec<u64> =
            (0..8).flat_map(|engine| (0..100).map(move |request| derived_seed(engine, request))).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 800);
    }
}
