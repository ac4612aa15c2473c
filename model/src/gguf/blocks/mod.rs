//! ggml's block formats: fixed groups of elements that share scales, decoded to `f32`.
//!
//! | type | elements | bytes | element |
//! |------|---------:|------:|---------|
//! | F32, F16, BF16 | 1 | 4, 2, 2 | itself |
//! | Q4_0 | 32 | 18 | `d * (q - 8)`, q of 4 bits |
//! | Q4_1 | 32 | 20 | `d * q + m`, q of 4 bits |
//! | Q5_0 | 32 | 22 | `d * (q - 16)`, q of 5 bits |
//! | Q5_1 | 32 | 24 | `d * q + m`, q of 5 bits |
//! | Q8_0 | 32 | 34 | `d * q`, q signed, of 8 bits |
//! | Q2_K | 256 | 84 | `d * scale * q - dmin * min`, by 16; q of 2 bits, scale and min of 4 |
//! | Q3_K | 256 | 110 | `d * (scale - 32) * (q - 4)`, by 16; q of 3 bits, scale of 6 |
//! | Q4_K | 256 | 144 | `d * scale * q - dmin * min`, by 32; q of 4 bits, scale and min of 6 |
//! | Q5_K | 256 | 176 | the same with q of 5 bits |
//! | Q6_K | 256 | 210 | `d * scale * (q - 32)`, by 16; q of 6 bits, scale signed, of 8 |
//!
//! `d`, `m` and `dmin` are F16. Every type is taken apart into codes without sign, scales and zero point or minimums
//! ([`BlockType::split`]); `d * scale` and `dmin * min` are exact in `f32`. Products are rounded to `f32` one by one in
//! the order written, without fused operations, so that the values have the bits that ggml's C code and its Python
//! package `gguf` give.
//!
//! Source: `ggml-common.h` (layouts) and `dequantize_row_*` of `ggml-quants.c`, <https://github.com/ggml-org/ggml>.

mod k_quants;
mod legacy;

use half::{bf16, f16};

/// Elements of a super-block of the K formats.
const SUPER_BLOCK: usize = 256;

/// A block format that can be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs, reason = "ggml's own names, explained in the module's table")]
pub enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl BlockType {
    /// Every one.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Its number in `ggml_type`.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// Elements of a block.
    pub fn elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => SUPER_BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// How the codes of a quantized type are made into elements; `None` for a floating-point type.
    pub fn groups(self) -> Option<BlockGroups> {
        let of = |bits, elements, zero_point| Some(BlockGroups { bits, elements, zero_point });
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q4_0 => of(4, 32, Some(8)),
            Self::Q5_0 => of(5, 32, Some(16)),
            Self::Q8_0 => of(8, 32, Some(128)),
            Self::Q3_K => of(3, 16, Some(4)),
            Self::Q6_K => of(6, 16, Some(32)),
            Self::Q2_K => of(2, 16, None),
            Self::Q4_1 | Self::Q4_K => of(4, 32, None),
            Self::Q5_1 | Self::Q5_K => of(5, 32, None),
        }
    }

    /// Takes whole blocks of a quantized type apart: calls `take` with the codes of each block, and with the scales and
    /// the minimums of its groups (zeros where the type has a zero point, see [`BlockType::groups`]). Blocks of a
    /// floating-point type have no parts: nothing is called for them.
    pub fn split(self, blocks: &[u8], take: &mut impl FnMut(&[u8], &[f32], &[f32])) {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => {}
            Self::Q4_0 => each_split(blocks, take, legacy::q4_0),
            Self::Q4_1 => each_split(blocks, take, legacy::q4_1),
            Self::Q5_0 => each_split(blocks, take, legacy::q5_0),
            Self::Q5_1 => each_split(blocks, take, legacy::q5_1),
            Self::Q8_0 => each_split(blocks, take, legacy::q8_0),
            Self::Q2_K => each_split(blocks, take, k_quants::q2_k),
            Self::Q3_K => each_split(blocks, take, k_quants::q3_k),
            Self::Q4_K => each_split(blocks, take, k_quants::q4_k),
            Self::Q5_K => each_split(blocks, take, k_quants::q5_k),
            Self::Q6_K => each_split(blocks, take, k_quants::q6_k),
        }
    }

    /// Decodes whole blocks: `blocks` to `output`, which must have room for exactly their elements.
    ///
    /// # Panics
    /// When the lengths disagree: the caller took both from one checked shape.
    pub fn decode(self, blocks: &[u8], output: &mut [f32]) {
        let (count, rest) = (blocks.len() / self.bytes(), blocks.len() % self.bytes());
        assert!(
            rest == 0 && output.len() == count * self.elements(),
            "{} bytes of {} do not give {} elements",
            blocks.len(),
            self.name(),
            output.len()
        );
        let Some(BlockGroups { elements, zero_point, .. }) = self.groups() else {
            return match self {
                Self::F16 => each(blocks, output, |[a, b]| half(*a, *b)),
                Self::BF16 => each(blocks, output, |[a, b]| bf16::from_le_bytes([*a, *b]).to_f32()),
                _ => each(blocks, output, |bytes| f32::from_le_bytes(*bytes)),
            };
        };
        let mut output = output.chunks_exact_mut(elements);
        self.split(blocks, &mut |codes, scales, minimums| {
            let groups = codes.chunks_exact(elements).zip(scales.iter().zip(minimums));
            for ((codes, (scale, minimum)), output) in groups.zip(&mut output) {
                for (value, &code) in output.iter_mut().zip(codes) {
                    *value = match zero_point {
                        Some(zero) => (f32::from(code) - f32::from(zero)) * scale,
                        None => f32::from(code) * scale + minimum,
                    };
                }
            }
        });
    }
}

/// How the codes of a type are made into elements: `(code - zero_point) * scale`, or `code * scale + minimum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGroups {
    /// Bits of a code.
    pub bits: u32,
    /// Elements of a group, which share a scale.
    pub elements: usize,
    /// The zero point of every group; `None`: each has a minimum.
    pub zero_point: Option<u8>,
}

/// A block of `ELEMENTS` elements in `GROUPS` groups, taken apart.
struct Parts<const ELEMENTS: usize, const GROUPS: usize> {
    codes: [u8; ELEMENTS],
    scales: [f32; GROUPS],
    /// Zeros for a type that has a zero point.
    minimums: [f32; GROUPS],
}

/// Takes block after block apart.
fn each_split<const BYTES: usize, const ELEMENTS: usize, const GROUPS: usize>(
    blocks: &[u8],
    take: &mut impl FnMut(&[u8], &[f32], &[f32]),
    split: impl Fn(&[u8; BYTES], &mut Parts<ELEMENTS, GROUPS>),
) {
    let mut parts = Parts { codes: [0; ELEMENTS], scales: [0.0; GROUPS], minimums: [0.0; GROUPS] };
    for block in blocks.as_chunks::<BYTES>().0 {
        split(block, &mut parts);
        take(&parts.codes, &parts.scales, &parts.minimums);
    }
}

/// Decodes element after element.
fn each<const BYTES: usize>(bytes: &[u8], output: &mut [f32], decode: impl Fn(&[u8; BYTES]) -> f32) {
    for (bytes, value) in bytes.as_chunks::<BYTES>().0.iter().zip(output) {
        *value = decode(bytes);
    }
}

/// An F16 of the file.
fn half(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}
