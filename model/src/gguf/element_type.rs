//! ggml's element types: those that can be decoded, those known by name and size, and numbers.

use super::BlockType;

/// How the elements of a tensor are stored: ggml's `ggml_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// A type that can be decoded.
    Block(BlockType),
    /// A type of ggml that Nibble knows by name and size only.
    Undecoded(UndecodedType),
    /// A number that no known type has.
    Unknown(u32),
}

/// A type of ggml that Nibble cannot decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UndecodedType {
    number: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements of a block.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// Source: `ggml_type` of `ggml.h` and `type_traits` of `ggml.c`.
const UNDECODED: [UndecodedType; 21] = [
    undecoded(9, "Q8_1", 32, 36),
    undecoded(15, "Q8_K", 256, 292),
    undecoded(16, "IQ2_XXS", 256, 66),
    undecoded(17, "IQ2_XS", 256, 74),
    undecoded(18, "IQ3_XXS", 256, 98),
    undecoded(19, "IQ1_S", 256, 50),
    undecoded(20, "IQ4_NL", 32, 18),
    undecoded(21, "IQ3_S", 256, 110),
    undecoded(22, "IQ2_S", 256, 82),
    undecoded(23, "IQ4_XS", 256, 136),
    undecoded(24, "I8", 1, 1),
    undecoded(25, "I16", 1, 2),
    undecoded(26, "I32", 1, 4),
    undecoded(27, "I64", 1, 8),
    undecoded(28, "F64", 1, 8),
    undecoded(29, "IQ1_M", 256, 56),
    undecoded(34, "TQ1_0", 256, 54),
    undecoded(35, "TQ2_0", 256, 66),
    undecoded(39, "MXFP4", 32, 17),
    undecoded(40, "NVFP4", 64, 36),
    undecoded(41, "Q1_0", 128, 18),
];

const fn undecoded(number: u32, name: &'static str, elements: usize, bytes: usize) -> UndecodedType {
    UndecodedType { number, name, elements, bytes }
}

impl ElementType {
    /// The type with the number `number` in `ggml_type`.
    pub(super) fn from_number(number: u32) -> Self {
        if let Some(block) = BlockType::ALL.into_iter().find(|block| block.number() == number) {
            return Self::Block(block);
        }
        match UNDECODED.into_iter().find(|known| known.number == number) {
            Some(known) => Self::Undecoded(known),
            None => Self::Unknown(number),
        }
    }

    /// Elements and bytes of a block, if they are known.
    pub fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::Block(block) => Some((block.elements(), block.bytes())),
            Self::Undecoded(known) => Some((known.elements, known.bytes)),
            Self::Unknown(_) => None,
        }
    }
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Block(block) => f.write_str(block.name()),
            Self::Undecoded(known) => f.write_str(known.name),
            Self::Unknown(number) => write!(f, "ggml type {number}"),
        }
    }
}
