//! The AWQ checkpoint format, version `gemm`: three tensors for each linear layer `X`, 4 bits.
//!
//! ```text
//! X.qweight I32 [in, out / 8]      nibble i of column c: output 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]
//! X.qzeros  I32 [groups, out / 8]  the same order; the zero point itself
//! X.scales  F16 [groups, out]
//! ```
//!
//! Groups are consecutive inputs. The activation scales are folded into the operation before the layer, so that a
//! reader needs nothing else. There is no symmetric form: zero points are stored in any case.
//!
//! Written: groups that divide the inputs, as AutoAWQ demands. Refused: other numbers of bits, other versions
//! (`gemv`, `gemv_fast`, `marlin`), `zero_point: false`, which has no `gemm` form.
//!
//! Source: AutoAWQ (`WQLinear_GEMM.from_linear`), checked on layers packed by its version 0.2.7.

mod config;

pub use config::AwqConfig;
use nibble_kernels::tensor::QuantizedMatrix;

use super::ModuleSettings;
use super::layer::{LayerContents, LayerReader, LayerWriter, transposed};
use crate::checkpoint::TensorInfo;
use crate::error::CheckpointError;

/// The tensors of a layer; the first holds the codes.
pub(super) const PARTS: [&str; 3] = ["qweight", "qzeros", "scales"];
/// The only number of bits.
pub(super) const BITS: u32 = 4;
const PER_WORD: usize = 8;
/// The output, counted from the first of a word, in each nibble.
const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// `[out_features, in_features]` of the layer with these codes.
pub(super) fn shape(codes: &TensorInfo<'_>) -> Option<[usize; 2]> {
    match codes.shape {
        &[in_features, words] => Some([words.checked_mul(PER_WORD)?, in_features]),
        _ => None,
    }
}

/// Why a layer cannot be stored: what was found and what was expected.
pub(super) fn misfit(settings: ModuleSettings, out: usize, inputs: usize) -> Option<(String, String)> {
    let group_size = settings.group_size.inputs(inputs);
    if settings.bits != BITS {
        Some((format!("of {} bits", settings.bits), "4 bits in the AWQ format".to_owned()))
    } else if !out.is_multiple_of(PER_WORD) {
        Some((format!("[{out}, {inputs}]"), format!("outputs divisible by {PER_WORD} in the AWQ format")))
    } else if group_size == 0 || !inputs.is_multiple_of(group_size) {
        let expected = format!("inputs divisible by group_size {group_size} in the AWQ format");
        Some((format!("[{out}, {inputs}]"), expected))
    } else {
        None
    }
}

/// Reads a layer.
pub(super) fn read(layer: LayerReader<'_>) -> Result<QuantizedMatrix, CheckpointError> {
    let (out, inputs, groups) = (layer.out_features, layer.in_features, layer.groups());
    if !out.is_multiple_of(PER_WORD) {
        return Err(layer.error("qweight", format!("of {out} outputs"), format!("a multiple of {PER_WORD}")));
    }
    let codes = unpack(&layer.words("qweight", &[inputs, out / PER_WORD])?);
    let zero_points = unpack(&layer.words("qzeros", &[groups, out / PER_WORD])?);
    let scales = layer.floats("scales", [groups, out])?;
    layer.matrix(LayerContents {
        codes: transposed(&codes, inputs, out),
        scales: transposed(&scales, groups, out),
        zero_points: transposed(&zero_points, groups, out),
        input_permutation: None,
    })
}

/// Writes a layer.
pub(super) fn write(mut layer: LayerWriter<'_>) -> Result<(), CheckpointError> {
    let matrix = layer.matrix;
    let (out, inputs, groups) = (matrix.out_features(), matrix.in_features(), matrix.groups());
    let zero_points = transposed(layer.zero_points(0)?, out, groups);
    let words = pack(&transposed(matrix.codes(), out, inputs));
    layer.words("qweight", &[inputs, out / PER_WORD], words)?;
    layer.words("qzeros", &[groups, out / PER_WORD], pack(&zero_points))?;
    layer.scales("scales", true)
}

fn unpack(words: &[u32]) -> Vec<u8> {
    let mut codes = vec![0; words.len() * PER_WORD];
    for (codes, word) in codes.chunks_exact_mut(PER_WORD).zip(words) {
        for (nibble, &output) in ORDER.iter().enumerate() {
            codes[output] = (word >> (BITS as usize * nibble) & 0xf) as u8;
        }
    }
    codes
}

fn pack(codes: &[u8]) -> Vec<u32> {
    let word = |codes: &[u8]| {
        let nibbles = ORDER.iter().enumerate();
        nibbles.fold(0, |word, (nibble, &output)| word | u32::from(codes[output]) << (BITS as usize * nibble))
    };
    codes.chunks_exact(PER_WORD).map(word).collect()
}
