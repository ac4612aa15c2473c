//! Blocks of 32 elements with one scale.
//!
//! Byte `i` of the codes holds element `i` in its low half and element `i + 16` in its high half. The fifth bit
//! of element `i` is bit `i` of a little-endian `u32`.

use super::half;

/// `d | 16 bytes of codes`.
pub(super) fn q4_0(block: &[u8; 18], output: &mut [f32; 32]) {
    let [d0, d1, codes @ ..] = block;
    let d = half(*d0, *d1);
    for (i, &pair) in codes.iter().enumerate() {
        output[i] = d * f32::from((pair & 15) as i8 - 8);
        output[i + 16] = d * f32::from((pair >> 4) as i8 - 8);
    }
}

/// `d | m | 16 bytes of codes`.
pub(super) fn q4_1(block: &[u8; 20], output: &mut [f32; 32]) {
    let [d0, d1, m0, m1, codes @ ..] = block;
    let (d, m) = (half(*d0, *d1), half(*m0, *m1));
    for (i, &pair) in codes.iter().enumerate() {
        output[i] = d * f32::from(pair & 15) + m;
        output[i + 16] = d * f32::from(pair >> 4) + m;
    }
}

/// `d | fifth bits u32 | 16 bytes of codes`.
pub(super) fn q5_0(block: &[u8; 22], output: &mut [f32; 32]) {
    let [d0, d1, h0, h1, h2, h3, codes @ ..] = block;
    let (d, high) = (half(*d0, *d1), u32::from_le_bytes([*h0, *h1, *h2, *h3]));
    for (i, &pair) in codes.iter().enumerate() {
        output[i] = d * f32::from((pair & 15 | fifth_bit(high, i)) as i8 - 16);
        output[i + 16] = d * f32::from((pair >> 4 | fifth_bit(high, i + 16)) as i8 - 16);
    }
}

/// `d | m | fifth bits u32 | 16 bytes of codes`.
pub(super) fn q5_1(block: &[u8; 24], output: &mut [f32; 32]) {
    let [d0, d1, m0, m1, h0, h1, h2, h3, codes @ ..] = block;
    let (d, m, high) = (half(*d0, *d1), half(*m0, *m1), u32::from_le_bytes([*h0, *h1, *h2, *h3]));
    for (i, &pair) in codes.iter().enumerate() {
        output[i] = d * f32::from(pair & 15 | fifth_bit(high, i)) + m;
        output[i + 16] = d * f32::from(pair >> 4 | fifth_bit(high, i + 16)) + m;
    }
}

/// `d | 32 signed codes`.
pub(super) fn q8_0(block: &[u8; 34], output: &mut [f32; 32]) {
    let [d0, d1, codes @ ..] = block;
    let d = half(*d0, *d1);
    for (value, &code) in output.iter_mut().zip(codes) {
        *value = d * f32::from(code as i8);
    }
}

fn fifth_bit(high: u32, element: usize) -> u8 {
    ((high >> element & 1) << 4) as u8
}
