//! How a quantized matrix lies in the memory of a CUDA device: in the order in which the threads of `kernel.cu` read.
//!
//! Outputs are cut into strips of 32, a warp's share, and padded to whole tiles of 256; inputs into steps of 128, padded
//! likewise.
//!
//! ```text
//! words        [strip][step][quarter][lane][4]   16 bytes a lane: 32 inputs of its outputs
//! scales       [strip][group][32]                elements of the device
//! zero_points  [strip][group][32]                bytes; none when all are 8
//! ```
//!
//! Word `2 h + t` of a lane is its part of a 16x16 operand of `mma.m16n8k16`: inputs `16 h` to `16 h + 15` of the
//! quarter, and of its sixteen rows those that tile `t` of the strip consists of. Row `r` of tile `t` is output
//! `4 (r % 8) + 2 t + r / 8` of the strip: so a lane holds four outputs that follow each other, and writes them at once.
//!
//! ```text
//!  lane 4 g + c, register i, element e:   row g + 8 (i % 2), input 2 c + 8 (i / 2) + e
//!  in the word:                           bits 4 i + 16 e to 4 i + 16 e + 3
//! ```
//!
//! One LOP3 with a mask of two nibbles therefore gives both elements of a register.
//!
//! Source of the fragment's layout: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".

use crate::device::cuda::Element;
use crate::error::KernelError;
use crate::tensor::QuantizedMatrix;

/// Outputs of a warp.
pub(crate) const STRIP_OUTPUTS: usize = 32;
/// Outputs of a block: eight warps.
pub(crate) const TILE_OUTPUTS: usize = 256;
/// Inputs of a step.
pub(crate) const STEP_INPUTS: usize = 128;
/// Most bits of a code.
const BITS: u32 = 4;
/// The zero point of symmetric matrices.
const MIDDLE: u8 = 8;
/// Words of a strip and step.
const STRIP_STEP_WORDS: usize = STRIP_OUTPUTS * STEP_INPUTS / 8;

/// A quantized matrix as it is copied to the device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PackedParts {
    /// Packed codes.
    pub(crate) words: Vec<u32>,
    /// Bits of the scales in the device's element type.
    pub(crate) scales: Vec<u16>,
    /// Zero points; empty when all are 8.
    pub(crate) zero_points: Vec<u8>,
    /// The input of each stored position; absent: the position itself.
    pub(crate) permutation: Option<Vec<u32>>,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// 32, 64, 128, or a multiple of 128.
    pub(crate) group_size: usize,
}

/// Groups of a strip in device form: whole steps.
pub(crate) fn packed_groups(in_features: usize, group_size: usize) -> usize {
    in_features.next_multiple_of(STEP_INPUTS).div_ceil(group_size)
}

/// Packs `matrix` for a device with activations of type `element`.
///
/// # Errors
/// When its codes have more than four bits, it has minimums, its groups are none that the kernel reads, or its inputs
/// are no multiple of eight.
pub(crate) fn pack(matrix: &QuantizedMatrix, element: Element) -> Result<PackedParts, KernelError> {
    const NAME: &str = "w4a16_matmul";
    let (outputs, inputs) = (matrix.out_features(), matrix.in_features());
    let bits = matrix.bits();
    KernelError::require(bits <= BITS, NAME, "bits", bits, "must be at most 4 on a CUDA device")?;
    let Some(of_groups) = matrix.zero_points() else {
        return Err(KernelError::Value {
            operation: NAME,
            argument: "offsets",
            found: "minimums".to_owned(),
            requirement: "must be zero points on a CUDA device: quantize the model to a format that has them",
        });
    };
    KernelError::require(
        inputs > 0 && inputs.is_multiple_of(8),
        NAME,
        "in_features",
        inputs,
        "must be a multiple of 8 on a CUDA device",
    )?;
    // One group for all inputs is a group of all steps.
    let whole = matrix.groups() == 1;
    let group_size = if whole { inputs.next_multiple_of(STEP_INPUTS) } else { matrix.group_size() };
    KernelError::require(
        matches!(group_size, 32 | 64) || group_size.is_multiple_of(STEP_INPUTS),
        NAME,
        "group_size",
        group_size,
        "must be 32, 64, a multiple of 128, or all inputs on a CUDA device",
    )?;

    let strips = outputs.next_multiple_of(TILE_OUTPUTS) / STRIP_OUTPUTS;
    let steps = inputs.div_ceil(STEP_INPUTS);
    let groups = packed_groups(inputs, group_size);

    let mut words = vec![0u32; strips * steps * STRIP_STEP_WORDS];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = strips.div_ceil(threads);
    std::thread::scope(|scope| {
        for (index, strips) in words.chunks_mut(share * steps * STRIP_STEP_WORDS).enumerate() {
            scope.spawn(move || pack_strips(matrix, index * share, steps, strips));
        }
    });

    let mut scales = vec![0u16; strips * groups * STRIP_OUTPUTS];
    let symmetric = of_groups.iter().all(|&zero| zero == MIDDLE);
    let mut zero_points = vec![MIDDLE; if symmetric { 0 } else { scales.len() }];
    for output in 0..outputs {
        for group in 0..matrix.groups() {
            let from = output * matrix.groups() + group;
            let to = (output / STRIP_OUTPUTS * groups + group) * STRIP_OUTPUTS + output % STRIP_OUTPUTS;
            scales[to] = element.round(matrix.scales()[from]);
            if !symmetric {
                zero_points[to] = of_groups[from];
            }
        }
    }
    Ok(PackedParts {
        words,
        scales,
        zero_points,
        permutation: matrix.input_permutation().map(<[u32]>::to_vec),
        out_features: outputs,
        in_features: inputs,
        group_size,
    })
}

/// Packs the strips from `first_strip` on that `words` has room for.
fn pack_strips(matrix: &QuantizedMatrix, first_strip: usize, steps: usize, words: &mut [u32]) {
    for (strip, of_strip) in words.chunks_exact_mut(steps * STRIP_STEP_WORDS).enumerate() {
        for (step, of_step) in of_strip.chunks_exact_mut(STRIP_STEP_WORDS).enumerate() {
            for (at, word) in of_step.iter_mut().enumerate() {
                let (quarter, lane, index) = (at / 128, at / 4 % 32, at % 4);
                let (half, tile) = (index / 2, index % 2);
                let first_output = (first_strip + strip) * STRIP_OUTPUTS + lane / 4 * 4 + tile * 2;
                let first_input = step * STEP_INPUTS + quarter * 32 + half * 16 + lane % 4 * 2;
                for register in 0..4 {
                    for element in 0..2 {
                        let output = first_output + register % 2;
                        let input = first_input + register / 2 * 8 + element;
                        *word |= code(matrix, output, input) << (4 * register + 16 * element);
                    }
                }
            }
        }
    }
}

/// The code of a weight. Padded ones are 0: their inputs are zeros, or their scales are.
fn code(matrix: &QuantizedMatrix, output: usize, input: usize) -> u32 {
    let (outputs, inputs) = (matrix.out_features(), matrix.in_features());
    if output < outputs && input < inputs { u32::from(matrix.codes()[output * inputs + input]) } else { 0 }
}
