//! The compressed-tensors checkpoint format `pack-quantized`: up to five tensors for each linear layer `X`.
//!
//! ```text
//! X.weight_packed     I32 [out, ceil(in * bits / 32)]      each row: the codes of an output, packed without gaps
//! X.weight_scale      F16, BF16 or F32 [out, groups]
//! X.weight_zero_point I32 [ceil(out * bits / 32), groups]  each column: the zero points of a group, packed
//!                                                          without gaps; asymmetric layers only
//! X.weight_shape      I64 [2]                              out, in
//! X.weight_g_idx      I32 [in]                             group of each input, with `actorder: group`
//! ```
//!
//! Codes and zero points are signed numbers there, stored plus `2^(bits-1)`: what is stored is what a
//! [`QuantizedMatrix`] holds. 2 to 8 bits. Written: F16 scales, no `weight_g_idx`, groups that divide the inputs,
//! as the package demands. Before compressed-tensors 0.18 codes of 3, 5, 6 and 7 bits did not cross words; such
//! files have other shapes and are refused by them.
//!
//! Source: compressed-tensors 0.20 (`compressors/pack_quantized`), checked on layers that it packed.

mod config;

pub use config::CompressedTensorsConfig;
use nibble_kernels::tensor::QuantizedMatrix;
use safetensors::Dtype;

use super::ModuleSettings;
use super::bit_stream;
use super::layer::{LayerContents, LayerReader, LayerWriter, transposed};
use crate::checkpoint::TensorInfo;
use crate::error::CheckpointError;

/// The tensors of a layer; the first holds the codes.
pub(super) const PARTS: [&str; 5] =
    ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"];

/// `[out_features, in_features]` as the tensor `weight_shape` tells.
pub(super) fn shape(tensor: &TensorInfo<'_>) -> Option<[usize; 2]> {
    if tensor.shape != [2] || !matches!(tensor.dtype, Dtype::I64 | Dtype::I32) {
        return None;
    }
    let width = tensor.data.len() / 2;
    let size = |bytes: &[u8]| {
        // Little-endian, widened; a negative number is no size.
        let mut wide = [0; 8];
        wide.get_mut(..width)?.copy_from_slice(bytes);
        usize::try_from(u64::from_le_bytes(wide)).ok().filter(|&size| size <= i32::MAX as usize)
    };
    Some([size(&tensor.data[..width])?, size(&tensor.data[width..])?])
}

/// Why a layer cannot be stored: what was found and what was expected.
pub(super) fn misfit(settings: ModuleSettings, out: usize, inputs: usize) -> Option<(String, String)> {
    let group_size = settings.group_size.inputs(inputs);
    if !(2..=8).contains(&settings.bits) {
        let expected = "2 to 8 bits in the compressed-tensors format".to_owned();
        Some((format!("of {} bits", settings.bits), expected))
    } else if group_size == 0 || !inputs.is_multiple_of(group_size) {
        let expected =
            format!("inputs divisible by group_size {group_size} in the compressed-tensors format");
        Some((format!("[{out}, {inputs}]"), expected))
    } else {
        None
    }
}

/// Reads a layer.
pub(super) fn read(layer: LayerReader<'_>) -> Result<QuantizedMatrix, CheckpointError> {
    let (out, inputs, groups, bits) =
        (layer.out_features, layer.in_features, layer.groups(), layer.settings.bits);
    let stored = layer.checkpoint.raw(&layer.name("weight_shape"))?;
    if shape(&stored) != Some([out, inputs]) {
        let found = shape(&stored).map_or_else(|| "not two sizes".to_owned(), |shape| format!("{shape:?}"));
        return Err(layer.error("weight_shape", found, format!("[{out}, {inputs}]")));
    }
    let row = bit_stream::words(inputs, bits);
    let words = layer.words("weight_packed", &[out, row])?;
    let scales = layer.floats("weight_scale", [out, groups])?;
    let zero_points = match (layer.settings.symmetric, layer.has("weight_zero_point")) {
        (true, false) => vec![layer.middle(); out * groups],
        (true, true) => {
            return Err(layer.error("weight_zero_point", "there", "none: the scheme is symmetric"));
        }
        (false, _) => {
            let words = layer.words("weight_zero_point", &[bit_stream::words(out, bits), groups])?;
            (0..out)
                .flat_map(|output| (0..groups).map(move |group| (output, group)))
                .map(|(output, group)| bit_stream::code(|word| words[word * groups + group], bits, output))
                .collect()
        }
    };
    let order = layer.input_order("weight_g_idx")?;
    let mut codes = Vec::with_capacity(out * inputs);
    for output in 0..out {
        let words = &words[output * row..][..row];
        codes.extend((0..inputs).map(|position| {
            let input = order.as_ref().map_or(position, |order| order[position] as usize);
            bit_stream::code(|word| words[word], bits, input)
        }));
    }
    layer.matrix(LayerContents { codes, scales, zero_points, input_permutation: order })
}

/// Writes a layer; the scheme of its group says whether it is `symmetric`.
pub(super) fn write(mut layer: LayerWriter<'_>, symmetric: bool) -> Result<(), CheckpointError> {
    let matrix = layer.matrix;
    let (out, inputs, groups, bits) =
        (matrix.out_features(), matrix.in_features(), matrix.groups(), matrix.bits());
    let zero_points = transposed(layer.zero_points(0)?, out, groups);
    let words =
        matrix.codes().chunks_exact(inputs).flat_map(|row| bit_stream::pack(row.iter().copied(), bits));
    layer.words("weight_packed", &[out, bit_stream::words(inputs, bits)], words)?;
    layer.scales("weight_scale", false)?;
    let sizes: Vec<u8> = [out as i64, inputs as i64].into_iter().flat_map(i64::to_le_bytes).collect();
    layer.writer.tensor(&format!("{}.weight_shape", layer.prefix), Dtype::I64, &[2], &sizes)?;
    if symmetric {
        return Ok(());
    }
    let rows = bit_stream::words(out, bits);
    let words: Vec<u32> = zero_points
        .chunks_exact(out)
        .flat_map(|zero_points| bit_stream::pack(zero_points.iter().copied(), bits))
        .collect();
    layer.words("weight_zero_point", &[rows, groups], transposed(&words, groups, rows))
}
