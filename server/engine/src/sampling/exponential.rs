//! Exponentials and sums over a row of logits: the same bits on every machine, and fast.
//!
//! A row has up to 150,000 values and is sampled on the host, so these loops are written for the compiler to
//! vectorize: no branches, and reductions over a fixed number of lanes, which also fixes their order.

const LANES: usize = 16;

/// The largest of `values`; `None` if there is none, if it is infinite, or if any value is not a number.
pub(crate) fn finite_maximum(values: &[f32]) -> Option<f32> {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut is_nan = [false; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let value = chunk[lane];
            largest[lane] = if value > largest[lane] { value } else { largest[lane] };
            is_nan[lane] |= value.is_nan();
        }
    }
    let maximum = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |maximum, &value| maximum.max(value));
    let nan = is_nan.contains(&true) || rest.iter().any(|value| value.is_nan());
    (maximum.is_finite() && !nan).then_some(maximum)
}

/// Writes `exp((value - maximum) / temperature)` of each value to `weights`; `maximum` is the largest value,
/// so that weights are from 0 to 1.
pub(crate) fn weights(values: &[f32], maximum: f32, temperature: f32, weights: &mut Vec<f32>) {
    weights.clear();
    weights.extend(values.iter().map(|&value| exp_of_negative((value - maximum) / temperature)));
}

/// `exp(x)` for `x` not above 0, to two units in the last place; 0 below -87, where results would leave the
/// normal numbers.
///
/// `x = n ln 2 + r` with `r` within half of ln 2, and exp(r) by the polynomial of Cephes' `expf`.
fn exp_of_negative(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.max(-87.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    // ln 2 in two parts, the first with few bits, so that its product with n is exact.
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let polynomial = ((((1.987_569_2e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r
        + 1.666_666_5e-1)
        * r
        + 0.5;
    let exp_r = polynomial * r * r + r + 1.0;
    let power_of_two = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { exp_r * power_of_two }
}

/// The sum of `weights`.
pub(crate) fn sum(weights: &[f32]) -> f64 {
    let mut sums = [0.0f64; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(chunk[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&weight| f64::from(weight)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_agree_with_double_precision_over_their_whole_range() {
        let mut worst: f64 = 0.0;
        for step in 0..2_000_000 {
            let x = -87.0 * (step as f32 / 2_000_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_of_negative(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}"); // measured 1.2e-7
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-87.1), 0.0);
        assert_eq!(exp_of_negative(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn exponentials_never_fall_where_their_argument_rises() {
        let mut previous = 0.0;
        for step in (0..2_000_000).rev() {
            let value = exp_of_negative(-20.0 * (step as f32 / 2_000_000.0));
            // Rounding of the polynomial may cost a unit in the last place, no more.
            assert!(value >= previous * (1.0 - 2.0 * f32::EPSILON), "at {step}: {value} after {previous}");
            previous = value;
        }
    }

    #[test]
    fn a_maximum_is_found_in_every_place_and_nonsense_is_refused() {
        for length in [1, 15, 16, 17, 40] {
            for place in 0..length {
                let mut values = vec![-2.5; length];
                values[place] = 7.0;
                assert_eq!(finite_maximum(&values), Some(7.0));
                for nonsense in [f32::NAN, f32::INFINITY] {
                    values[place] = nonsense;
                    assert_eq!(finite_maximum(&values), None);
                }
                values[place] = f32::NEG_INFINITY;
                assert_eq!(finite_maximum(&values).is_some(), length > 1);
            }
        }
        assert_eq!(finite_maximum(&[]), None);
    }
}
