//! The GPTQ checkpoint format: four tensors for each linear layer `X`.
//!
//! ```text
//! X.qweight I32 [in * bits / 32, out]      code i of word r, column c: input r * 32 / bits + i, output c
//! X.qzeros  I32 [groups, out * bits / 32]  code i of column c: the zero point of output c * 32 / bits + i
//! X.scales  F16 [groups, out]
//! X.g_idx   I32 [in]                       group of each input; not monotonic after act-order
//! ```
//!
//! Version 1 (`checkpoint_format: gptq`) stores the zero point minus one, modulo `2^bits`; version 2 stores
//! it as it is. Files exist whose metadata says one and whose data is the other: in a symmetric checkpoint
//! every zero point must be `2^(bits-1)`, so the data decides.
//!
//! Written: 2, 4 and 8 bits, `g_idx` monotonic, a zero point of 0 only in version 2 (in version 1 it would
//! wrap around, and readers disagree about what that means). Refused: 3 bits, whose codes cross words; groups
//! of unequal size; sizes that do not fill whole words.
//!
//! Source: AutoGPTQ and GPTQModel (`QuantLinear.pack`), checked on files of GPTQModel 7.7.

use half::f16;
use nibble_kernels::tensor::{QuantizedMatrix, QuantizedParts};
use safetensors::Dtype;

use super::{GptqVersion, QuantizationConfig};
use crate::checkpoint::{Checkpoint, CheckpointWriter, TensorInfo};
use crate::error::CheckpointError;

const HELP: &str =
    "the tensors do not fit config.json and its quantization_config; write the checkpoint again";

/// Reads the linear layer `prefix`, `[out_features, in_features]`, of a checkpoint quantized as `config` says.
///
/// # Errors
/// Names the tensor that is missing, malformed or contradicts `config`.
pub fn read(
    checkpoint: &Checkpoint,
    config: &QuantizationConfig,
    prefix: &str,
    out_features: usize,
    in_features: usize,
) -> Result<QuantizedMatrix, CheckpointError> {
    let group_size = config.group_size.inputs(in_features);
    let groups = in_features.div_ceil(group_size);
    let codes_per_word = codes_per_word(checkpoint, prefix, config.bits)?;
    let tensor = |part: &str, shape: [usize; 2]| integers(checkpoint, &format!("{prefix}.{part}"), &shape);

    let words = tensor("qweight", [in_features.div_ceil(codes_per_word), out_features])?;
    let zero_words = tensor("qzeros", [groups, out_features.div_ceil(codes_per_word)])?;
    let scales = checkpoint.matrix(&format!("{prefix}.scales"), groups, out_features)?;
    let group_of_input = match checkpoint.has(&format!("{prefix}.g_idx")) {
        true => integers(checkpoint, &format!("{prefix}.g_idx"), &[in_features])?,
        false => Vec::new(),
    };
    let order = input_order(checkpoint, prefix, &group_of_input, group_size, groups)?;

    let mask = (1u32 << config.bits) - 1;
    let code = |word: u32, index: usize| ((word >> (config.bits as usize * index)) & mask) as u8;
    let mut codes = vec![0; out_features * in_features];
    for position in 0..in_features {
        let input = order.as_ref().map_or(position, |order| order[position] as usize);
        let row = &words[input / codes_per_word * out_features..][..out_features];
        for (output, &word) in row.iter().enumerate() {
            codes[output * in_features + position] = code(word, input % codes_per_word);
        }
    }
    let zero_row = out_features.div_ceil(codes_per_word);
    let stored = |group: usize, output: usize| {
        code(zero_words[group * zero_row + output / codes_per_word], output % codes_per_word)
    };
    let by_output = || (0..out_features).flat_map(|output| (0..groups).map(move |group| (group, output)));
    let stored_zeros: Vec<u8> = by_output().map(|(group, output)| stored(group, output)).collect();
    let version = version_of(checkpoint, config, prefix, &stored_zeros)?;
    let zero_points = stored_zeros.into_iter().map(|stored| match version {
        GptqVersion::V1 => ((u32::from(stored) + 1) & mask) as u8,
        GptqVersion::V2 => stored,
    });
    QuantizedMatrix::new(QuantizedParts {
        out_features,
        in_features,
        bits: config.bits,
        group_size,
        codes,
        zero_points: zero_points.collect(),
        scales: by_output().map(|(group, output)| scales[group * out_features + output]).collect(),
        input_permutation: order,
    })
    .map_err(|error| CheckpointError::tensor(checkpoint.directory(), prefix, error, "a valid matrix", HELP))
}

/// Writes the linear layer `prefix` in format `version`.
///
/// # Errors
/// When the matrix cannot be expressed (see the module text), or the file cannot be written.
pub fn write(
    writer: &mut CheckpointWriter,
    prefix: &str,
    matrix: &QuantizedMatrix,
    version: GptqVersion,
) -> Result<(), CheckpointError> {
    let (out, inputs, groups, bits) =
        (matrix.out_features(), matrix.in_features(), matrix.groups(), matrix.bits() as usize);
    let refuse = |found: String, expected: &str| {
        let help = "choose other quantization settings for this matrix";
        Err(CheckpointError::tensor(writer.path(), prefix, found, expected, help))
    };
    if !matches!(bits, 2 | 4 | 8) {
        return refuse(format!("of {bits} bits"), "2, 4 or 8 bits in the GPTQ format");
    }
    let per_word = 32 / bits;
    if !inputs.is_multiple_of(per_word) || !out.is_multiple_of(per_word) {
        return refuse(format!("[{out}, {inputs}]"), &format!("both sizes divisible by {per_word}"));
    }
    if matrix.input_permutation().is_some() {
        return refuse("permuted".to_owned(), "inputs in their original order");
    }
    if version == GptqVersion::V1 && matrix.zero_points().contains(&0) {
        return refuse("with a zero point of 0".to_owned(), "1 or more, which version 1 can express");
    }
    let pack = |codes: &mut dyn Iterator<Item = u8>| -> u32 {
        codes.enumerate().fold(0, |word, (index, code)| word | u32::from(code) << (bits * index))
    };
    let mut words = Vec::with_capacity(out * inputs / per_word * 4);
    for row in 0..inputs / per_word {
        for output in 0..out {
            let first = output * inputs + row * per_word;
            let word = pack(&mut matrix.codes()[first..first + per_word].iter().copied());
            words.extend(word.to_le_bytes());
        }
    }
    let mask = ((1u32 << bits) - 1) as u8;
    let stored = |group: usize, output: usize| match version {
        GptqVersion::V1 => matrix.zero_points()[output * groups + group].wrapping_sub(1) & mask,
        GptqVersion::V2 => matrix.zero_points()[output * groups + group] & mask,
    };
    let mut zero_words = Vec::new();
    let mut scales = Vec::with_capacity(out * groups * 2);
    for group in 0..groups {
        for column in 0..out / per_word {
            let word = pack(&mut (0..per_word).map(|index| stored(group, column * per_word + index)));
            zero_words.extend(word.to_le_bytes());
        }
        for output in 0..out {
            scales.extend(f16::from_f32(matrix.scales()[output * groups + group]).to_le_bytes());
        }
    }
    let group_of_input: Vec<u8> =
        (0..inputs).flat_map(|input| ((input / matrix.group_size()) as u32).to_le_bytes()).collect();
    writer.tensor(&format!("{prefix}.g_idx"), Dtype::I32, &[inputs], &group_of_input)?;
    writer.tensor(&format!("{prefix}.qweight"), Dtype::I32, &[inputs / per_word, out], &words)?;
    writer.tensor(&format!("{prefix}.qzeros"), Dtype::I32, &[groups, out / per_word], &zero_words)?;
    writer.tensor(&format!("{prefix}.scales"), Dtype::F16, &[groups, out], &scales)
}

fn codes_per_word(checkpoint: &Checkpoint, prefix: &str, bits: u32) -> Result<usize, CheckpointError> {
    if 32 % bits == 0 {
        return Ok(32 / bits as usize);
    }
    let found = format!("of {bits} bits");
    Err(CheckpointError::tensor(checkpoint.directory(), prefix, found, "2, 4 or 8 bits", HELP))
}

/// An I32 tensor as words.
fn integers(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<Vec<u32>, CheckpointError> {
    let TensorInfo { dtype, shape: found, data, file, .. } = checkpoint.raw(name)?;
    if dtype != Dtype::I32 || found != shape {
        let (found, expected) = (format!("{dtype:?} {found:?}"), format!("I32 {shape:?}"));
        return Err(CheckpointError::tensor(file, name, found, expected, HELP));
    }
    let words =
        data.chunks_exact(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    Ok(words.collect())
}

/// The input at each stored position, groups one after the other; `None` when that is the inputs' own order.
fn input_order(
    checkpoint: &Checkpoint,
    prefix: &str,
    group_of_input: &[u32],
    group_size: usize,
    groups: usize,
) -> Result<Option<Vec<u32>>, CheckpointError> {
    let in_order = |(input, &group): (usize, &u32)| group as usize == input / group_size;
    if group_of_input.iter().enumerate().all(in_order) {
        return Ok(None);
    }
    let name = format!("{prefix}.g_idx");
    let mut order: Vec<u32> = (0..group_of_input.len() as u32).collect();
    order.sort_by_key(|&input| group_of_input[input as usize]);
    for (position, &input) in order.iter().enumerate() {
        let (found, expected) = (group_of_input[input as usize] as usize, position / group_size);
        if found != expected {
            let found = format!("a permutation of unequal groups (group {found} of {groups})");
            let expected = format!("{group_size} inputs in each group");
            return Err(CheckpointError::tensor(checkpoint.directory(), &name, found, expected, HELP));
        }
    }
    Ok(Some(order))
}

/// What `qzeros` of this layer holds: the metadata's word, unless symmetric data contradict it.
fn version_of(
    checkpoint: &Checkpoint,
    config: &QuantizationConfig,
    prefix: &str,
    stored: &[u8],
) -> Result<GptqVersion, CheckpointError> {
    if !config.symmetric {
        return Ok(config.version);
    }
    let middle = 1u8 << (config.bits - 1);
    let found = if stored.iter().all(|&zero| zero == middle - 1) {
        GptqVersion::V1
    } else if stored.iter().all(|&zero| zero == middle) {
        GptqVersion::V2
    } else {
        let name = format!("{prefix}.qzeros");
        let expected = format!("{} or {middle} everywhere, because the checkpoint says sym", middle - 1);
        let found = "other zero points";
        return Err(CheckpointError::tensor(checkpoint.directory(), &name, found, expected, HELP));
    };
    if found != config.version {
        tracing::warn!(
            tensor = prefix,
            metadata = config.version.name(),
            data = found.name(),
            "qzeros contradict checkpoint_format; the data are taken"
        );
    }
    Ok(found)
}
