//! Codes of a few bits, one after the other without gaps, in little-endian 32-bit words.
//!
//! ```text
//! code i occupies bits i * bits .. (i + 1) * bits of the stream; bit b is bit b % 32 of word b / 32
//! ```
//!
//! Where `bits` does not divide 32 a code may begin in one word and end in the next. GPTQ packs 3 bits so
//! (32 codes in 3 words), compressed-tensors any number of bits.

/// How many words hold `codes` codes. 32 codes fill `bits` words, so that no product can overflow.
pub(super) fn words(codes: usize, bits: u32) -> usize {
    codes / 32 * bits as usize + (codes % 32 * bits as usize).div_ceil(32)
}

/// Code `index` of the stream whose words `word` gives.
pub(super) fn code(word: impl Fn(usize) -> u32, bits: u32, index: usize) -> u8 {
    let bit = index * bits as usize;
    let (first, shift) = (bit / 32, bit % 32);
    let low = word(first) >> shift;
    let high = if shift + bits as usize > 32 { word(first + 1) << (32 - shift) } else { 0 };
    ((low | high) & ((1 << bits) - 1)) as u8
}

/// The words of a stream of `codes`; the last one ends in zeros.
pub(super) fn pack(codes: impl IntoIterator<Item = u8>, bits: u32) -> Vec<u32> {
    let mut words = Vec::new();
    let (mut pending, mut filled) = (0u64, 0);
    for code in codes {
        pending |= u64::from(code) << filled;
        filled += bits;
        if filled >= 32 {
            words.push(pending as u32);
            pending >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words.push(pending as u32);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn three_bit_codes_cross_words() {
        let packed = pack((0..32).map(|index| (index % 8) as u8), 3);
        assert_eq!(packed, [0x88fa_c688, 0xc688_fac6, 0xfac6_88fa]);
    }

    proptest! {
        #[test]
        fn every_code_comes_back(bits in 2u32..=8, bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let codes: Vec<u8> = bytes.into_iter().map(|byte| byte & ((1u32 << bits) - 1) as u8).collect();
            let packed = pack(codes.iter().copied(), bits);
            prop_assert_eq!(packed.len(), words(codes.len(), bits));
            let found: Vec<u8> = (0..codes.len()).map(|index| code(|word| packed[word], bits, index)).collect();
            prop_assert_eq!(found, codes);
        }
    }
}
