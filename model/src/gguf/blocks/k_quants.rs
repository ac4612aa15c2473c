//! Super-blocks of 256 elements: groups of 16 or 32 with small integer scales under one F16 scale.
//!
//! Codes of less than 8 bits lie in planes: 32 consecutive bytes hold, in each of their bit fields from low to
//! high, 32 consecutive elements. So the elements of a plane share their group scales.

use super::{Parts, SUPER_BLOCK, half};

/// `scales 16 | codes 64 | d | dmin`: a scale byte is `scale | min << 4`; codes of 2 bits in planes of 128.
pub(super) fn q2_k(block: &[u8; 84], parts: &mut Parts<SUPER_BLOCK, 16>) {
    let [scales_and_codes @ .., d0, d1, m0, m1] = block;
    let (d, d_min) = (half(*d0, *d1), half(*m0, *m1));
    let (scales, codes) = scales_and_codes.split_at(16);
    for (group, &packed) in scales.iter().enumerate() {
        parts.scales[group] = d * f32::from(packed & 15);
        parts.minimums[group] = -(d_min * f32::from(packed >> 4));
    }
    for (i, code) in parts.codes.iter_mut().enumerate() {
        *code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    }
}

/// `inverted third bits 32 | low codes 64 | scales 12 | d`: codes of 2 bits in planes of 128, third bits in
/// planes of 256, where a bit that is not set subtracts 4.
pub(super) fn q3_k(block: &[u8; 110], parts: &mut Parts<SUPER_BLOCK, 16>) {
    let [codes_and_scales @ .., d0, d1] = block;
    let d = half(*d0, *d1);
    let (high, rest) = codes_and_scales.split_at(32);
    let (codes, scales) = rest.split_at(64);
    for (group, scale) in parts.scales.iter_mut().enumerate() {
        *scale = d * f32::from(six_bit_scale(scales, group) as i8 - 32);
    }
    for (i, code) in parts.codes.iter_mut().enumerate() {
        let low = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *code = low | (high[i % 32] >> (i / 32) & 1) << 2;
    }
}

/// Scale `group` of the 16 of a Q3_K block: low 4 bits in the first 8 bytes, two halves each, then the high
/// 2 bits in 4 bytes, four fields each.
fn six_bit_scale(scales: &[u8], group: usize) -> u8 {
    let low = scales[group % 8] >> (group / 8 * 4) & 15;
    let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    low | high << 4
}

/// `d | dmin | scales and mins 12 | codes 128`: codes of 4 bits in planes of 64.
pub(super) fn q4_k(block: &[u8; 144], parts: &mut Parts<SUPER_BLOCK, 8>) {
    let [d0, d1, m0, m1, rest @ ..] = block;
    let (packed, codes) = rest.split_at(12);
    scales_and_minimums([half(*d0, *d1), half(*m0, *m1)], packed, parts);
    for (group, output) in parts.codes.chunks_exact_mut(32).enumerate() {
        for (code, &byte) in output.iter_mut().zip(&codes[group / 2 * 32..]) {
            *code = byte >> (group % 2 * 4) & 15;
        }
    }
}

/// `d | dmin | scales and mins 12 | fifth bits 32 | low codes 128`: low codes of 4 bits in planes of 64, fifth
/// bits in planes of 256.
pub(super) fn q5_k(block: &[u8; 176], parts: &mut Parts<SUPER_BLOCK, 8>) {
    let [d0, d1, m0, m1, rest @ ..] = block;
    let (packed, rest) = rest.split_at(12);
    let (high, codes) = rest.split_at(32);
    scales_and_minimums([half(*d0, *d1), half(*m0, *m1)], packed, parts);
    for (group, output) in parts.codes.chunks_exact_mut(32).enumerate() {
        let low = &codes[group / 2 * 32..];
        for ((code, &low), &high) in output.iter_mut().zip(low).zip(high) {
            *code = low >> (group % 2 * 4) & 15 | (high >> group & 1) << 4;
        }
    }
}

fn scales_and_minimums([d, d_min]: [f32; 2], packed: &[u8], parts: &mut Parts<SUPER_BLOCK, 8>) {
    for group in 0..8 {
        let (scale, min) = scale_and_min(packed, group);
        parts.scales[group] = d * f32::from(scale);
        parts.minimums[group] = -(d_min * f32::from(min));
    }
}

/// Scale and minimum of group `group` of the 8 of a Q4_K or Q5_K block, 6 bits each. Groups 0 to 3 have their
/// own bytes (scales in bytes 0..4, minima in 4..8); groups 4 to 7 have 4 low bits in bytes 8..12 and the 2 high
/// bits on top of the bytes of groups 0 to 3.
fn scale_and_min(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
}

/// `low codes 128 | high codes 64 | scales 16, signed | d`: low codes of 4 bits in planes of 128 (64 bytes), high
/// ones of 2 bits in planes of 128 (32 bytes).
pub(super) fn q6_k(block: &[u8; 210], parts: &mut Parts<SUPER_BLOCK, 16>) {
    let [codes_and_scales @ .., d0, d1] = block;
    let d = half(*d0, *d1);
    let (low, rest) = codes_and_scales.split_at(128);
    let (high, scales) = rest.split_at(64);
    for (scale, &signed) in parts.scales.iter_mut().zip(scales) {
        *scale = d * f32::from(signed as i8);
    }
    for (i, code) in parts.codes.iter_mut().enumerate() {
        let low = low[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        let high = high[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *code = low | high << 4;
    }
}
