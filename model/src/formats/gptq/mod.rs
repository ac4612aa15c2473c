//! The GPTQ checkpoint format: four tensors for each linear layer `X`.
//!
//! ```text
//! X.qweight I32 [in * bits / 32, out]      each column: the codes of an output, packed without gaps
//! X.qzeros  I32 [groups, out * bits / 32]  each row: the zero points of a group, packed without gaps
//! X.scales  F16 [groups, out]
//! X.g_idx   I32 [in]                       group of each input; not monotonic after act-order
//! ```
//!
//! Version 1 (`checkpoint_format: gptq`) stores the zero point minus one, modulo `2^bits`; version 2 stores
//! it as it is. Files exist whose metadata says one and whose data is the other: in a symmetric checkpoint
//! every zero point must be `2^(bits-1)`, so the data decides.
//!
//! Bits: 2, 3, 4 and 8; codes of 3 bits cross words, 32 of them in 3 words. Written: `g_idx` monotonic, a zero
//! point of 0 only in version 2 (in version 1 it would wrap around, and readers disagree about what that means).
//! Refused: groups of unequal size; sizes that do not fill whole words.
//!
//! Source: AutoGPTQ and GPTQModel (`QuantLinear.pack`), checked on files of GPTQModel 7.7 and on layers packed by
//! AutoGPTQ 0.7.1.

mod config;

pub use config::{GptqConfig, GptqVersion};
use nibble_kernels::tensor::QuantizedMatrix;

use super::ModuleSettings;
use super::bit_stream;
use super::layer::{LayerContents, LayerReader, LayerWriter, transposed};
use crate::checkpoint::TensorInfo;
use crate::error::CheckpointError;

/// The tensors of a layer; the first holds the codes.
pub(super) const PARTS: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// `[out_features, in_features]` of the layer with these codes.
pub(super) fn shape(codes: &TensorInfo<'_>, settings: ModuleSettings) -> Option<[usize; 2]> {
    match codes.shape {
        &[words, out_features] => Some([out_features, words.checked_mul(32)? / settings.bits as usize]),
        _ => None,
    }
}

/// Why a layer cannot be stored: what was found and what was expected.
pub(super) fn misfit(settings: ModuleSettings, out: usize, inputs: usize) -> Option<(String, String)> {
    if !matches!(settings.bits, 2 | 3 | 4 | 8) {
        return Some((
            format!("of {} bits", settings.bits),
            "2, 3, 4 or 8 bits in the GPTQ format".to_owned(),
        ));
    }
    // Codes that fill whole words: 32 / bits of them, or 32 where bits does not divide 32.
    let step = if 32 % settings.bits == 0 { 32 / settings.bits as usize } else { 32 };
    if inputs.is_multiple_of(step) && out.is_multiple_of(step) {
        return None;
    }
    Some((format!("[{out}, {inputs}]"), format!("both sizes divisible by {step} in the GPTQ format")))
}

/// Reads a layer.
pub(super) fn read(layer: LayerReader<'_>, version: GptqVersion) -> Result<QuantizedMatrix, CheckpointError> {
    let (out, inputs, groups, bits) =
        (layer.out_features, layer.in_features, layer.groups(), layer.settings.bits);
    if let Some((found, expected)) = misfit(layer.settings, out, inputs) {
        return Err(layer.error("qweight", found, expected));
    }
    let words = layer.words("qweight", &[bit_stream::words(inputs, bits), out])?;
    let zero_words = layer.words("qzeros", &[groups, bit_stream::words(out, bits)])?;
    let scales = layer.floats("scales", [groups, out])?;
    let order = layer.input_order("g_idx")?;
    let mut codes = vec![0; out * inputs];
    for position in 0..inputs {
        let input = order.as_ref().map_or(position, |order| order[position] as usize);
        for output in 0..out {
            let code = bit_stream::code(|word| words[word * out + output], bits, input);
            codes[output * inputs + position] = code;
        }
    }
    let zero_row = bit_stream::words(out, bits);
    let stored: Vec<u8> = (0..out)
        .flat_map(|output| (0..groups).map(move |group| (output, group)))
        .map(|(output, group)| bit_stream::code(|word| zero_words[group * zero_row + word], bits, output))
        .collect();
    let largest = ((1u32 << bits) - 1) as u8;
    let zero_points = match version_of(&layer, version, &stored)? {
        GptqVersion::V1 => stored.into_iter().map(|stored| stored.wrapping_add(1) & largest).collect(),
        GptqVersion::V2 => stored,
    };
    layer.matrix(LayerContents {
        codes,
        scales: transposed(&scales, groups, out),
        zero_points,
        input_permutation: order,
    })
}

/// What `qzeros` of this layer holds: the metadata's word, unless symmetric data contradict it.
fn version_of(
    layer: &LayerReader<'_>,
    metadata: GptqVersion,
    stored: &[u8],
) -> Result<GptqVersion, CheckpointError> {
    if !layer.settings.symmetric {
        return Ok(metadata);
    }
    let middle = layer.middle();
    let data = if stored.iter().all(|&zero| zero == middle - 1) {
        GptqVersion::V1
    } else if stored.iter().all(|&zero| zero == middle) {
        GptqVersion::V2
    } else {
        let expected = format!("{} or {middle} everywhere, because the checkpoint says sym", middle - 1);
        return Err(layer.error("qzeros", "other zero points", expected));
    };
    if data != metadata {
        tracing::warn!(
            tensor = layer.prefix,
            metadata = metadata.name(),
            data = data.name(),
            "qzeros contradict checkpoint_format; the data are taken"
        );
    }
    Ok(data)
}

/// Writes a layer.
pub(super) fn write(mut layer: LayerWriter<'_>, version: GptqVersion) -> Result<(), CheckpointError> {
    let matrix = layer.matrix;
    let (out, inputs, groups, bits) =
        (matrix.out_features(), matrix.in_features(), matrix.groups(), matrix.bits());
    // What version 1 takes off: it cannot store a zero point of 0.
    let less = match version {
        GptqVersion::V1 => 1,
        GptqVersion::V2 => 0,
    };
    let zero_points = transposed(layer.zero_points(less)?, out, groups);
    let group_of_input = (0..inputs).map(|input| (input / matrix.group_size()) as u32);
    layer.words("g_idx", &[inputs], group_of_input)?;
    let rows = bit_stream::words(inputs, bits);
    let by_output = matrix.codes().chunks_exact(inputs);
    let words: Vec<u32> = by_output.flat_map(|codes| bit_stream::pack(codes.iter().copied(), bits)).collect();
    layer.words("qweight", &[rows, out], transposed(&words, out, rows))?;
    let stored = zero_points.into_iter().map(|zero| zero - less);
    // Outputs fill whole words, so the rows of the groups follow each other without gaps.
    layer.words("qzeros", &[groups, bit_stream::words(out, bits)], bit_stream::pack(stored, bits))?;
    layer.scales("scales", true)
}
