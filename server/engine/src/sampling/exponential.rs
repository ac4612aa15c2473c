//! The exponential function: the same bits on every machine, and fast.
//!
//! A row has up to 150,000 logits and is sampled on the host, so this is written for the compiler to
//! vectorize: no branches, no calls.

/// `exp(x)` for `x` not above 0, to two units in the last place; 0 below -87, where results would leave the
/// normal numbers.
///
/// `x = n ln 2 + r` with `r` within half of ln 2, and exp(r) by the polynomial of Cephes' `expf`.
#[inline]
pub(crate) fn exp_of_negative(x: f32) -> f32 {
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
}
