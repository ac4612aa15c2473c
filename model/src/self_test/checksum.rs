//! A checksum of weights, written as hexadecimal digits.

use std::fmt::{Display, Formatter};

use nibble_kernels::tensor::{QuantizedMatrix, checksum};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 64-bit checksum: finds damage, not forgery. JSON numbers do not hold 64 bits, so that it is a text there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u64);

impl Checksum {
    /// Of the dequantized weights: equal for equal weights, whatever format they lie in.
    pub fn of(matrix: &QuantizedMatrix) -> Self {
        Self(matrix.checksum())
    }

    /// Of bytes, padded with zeros to whole words of 32 bits.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        };
        Self(checksum(bytes.chunks(4).map(word)))
    }
}

impl Display for Checksum {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u64::from_str_radix(&text, 16) {
            Ok(value) if digits => Ok(Self(value)),
            _ => Err(D::Error::custom(format!("\"{text}\" is not a checksum of 16 hexadecimal digits"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_written_and_read_as_sixteen_digits() {
        let checksum = Checksum::of_bytes(&[1, 2, 3, 4, 5]);
        let text = serde_json::to_string(&checksum).unwrap();
        assert_eq!(text.len(), 18);
        assert_eq!(serde_json::from_str::<Checksum>(&text).unwrap(), checksum);
        assert_ne!(Checksum::of_bytes(&[1, 2, 3, 4, 4]), checksum);
        for wrong in ["\"12\"", "\"+123456789abcdef\"", "12"] {
            assert!(serde_json::from_str::<Checksum>(wrong).is_err(), "{wrong}");
        }
    }
}
