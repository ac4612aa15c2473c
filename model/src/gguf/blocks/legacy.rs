//! Blocks of 32 elements with one scale.
//!
//! Byte `i` of the codes holds element `i` in its low half and element `i + 16` in its high half. The fifth bit
//! of element `i` is bit `i` of a little-endian `u32`.

use super::{Parts, half};

/// A block.
type Block = Parts<32, 1>;

/// `d | 16 bytes of codes`.
pub(super) fn q4_0(block: &[u8; 18], parts: &mut Block) {
    let [d0, d1, codes @ ..] = block;
    parts.scales = [half(*d0, *d1)];
    nibbles(codes, 0, &mut parts.codes);
}

/// `d | m | 16 bytes of codes`.
pub(super) fn q4_1(block: &[u8; 20], parts: &mut Block) {
    let [d0, d1, m0, m1, codes @ ..] = block;
    (parts.scales, parts.minimums) = ([half(*d0, *d1)], [half(*m0, *m1)]);
    nibbles(codes, 0, &mut parts.codes);
}

/// `d | fifth bits u32 | 16 bytes of codes`.
pub(super) fn q5_0(block: &[u8; 22], parts: &mut Block) {
    let [d0, d1, h0, h1, h2, h3, codes @ ..] = block;
    parts.scales = [half(*d0, *d1)];
    nibbles(codes, u32::from_le_bytes([*h0, *h1, *h2, *h3]), &mut parts.codes);
}

/// `d | m | fifth bits u32 | 16 bytes of codes`.
pub(super) fn q5_1(block: &[u8; 24], parts: &mut Block) {
    let [d0, d1, m0, m1, h0, h1, h2, h3, codes @ ..] = block;
    (parts.scales, parts.minimums) = ([half(*d0, *d1)], [half(*m0, *m1)]);
    nibbles(codes, u32::from_le_bytes([*h0, *h1, *h2, *h3]), &mut parts.codes);
}

/// `d | 32 signed codes`.
pub(super) fn q8_0(block: &[u8; 34], parts: &mut Block) {
    let [d0, d1, codes @ ..] = block;
    parts.scales = [half(*d0, *d1)];
    for (code, &signed) in parts.codes.iter_mut().zip(codes) {
        // Two's complement plus 128.
        *code = signed ^ 128;
    }
}

fn nibbles(pairs: &[u8; 16], high: u32, codes: &mut [u8; 32]) {
    let fifth_bit = |element: usize| ((high >> element & 1) << 4) as u8;
    for (i, &pair) in pairs.iter().enumerate() {
        codes[i] = pair & 15 | fifth_bit(i);
        codes[i + 16] = pair >> 4 | fifth_bit(i + 16);
    }
}
