use half::f16;

use super::{Args, Product, W4a16Matmul, reference};
use crate::backend::{Activations, Device};
use crate::device::cpu::{Cpu, InstructionSet};
use crate::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};
use crate::testing::{random, upload};

#[derive(Clone, Copy, Debug)]
struct Shape {
    out_features: usize,
    in_features: usize,
    group_size: usize,
    bits: u32,
    permuted: bool,
    offsets: OffsetKind,
    /// Whether F16 holds every scale and minimum.
    half: bool,
}

#[derive(Clone, Copy, Debug)]
enum OffsetKind {
    /// The same zero point everywhere.
    Middle,
    ZeroPoints,
    Minimums,
}

fn matrix(shape: &Shape) -> QuantizedMatrix {
    let Shape { out_features, in_features, group_size, bits, permuted, offsets, half } = *shape;
    let groups = in_features.div_ceil(group_size);
    let levels = (1u32 << bits) as f32;
    let codes = random(out_features * in_features, 7);
    let rounded = |value: f32| if half { f16::from_f32(value).to_f32() } else { value };
    let zero_point = |value: &f32| ((value + 1.0) / 2.0 * levels) as u8;
    let of_groups = random(out_features * groups, 8);
    QuantizedMatrix::new(QuantizedParts {
        out_features,
        in_features,
        bits,
        group_size,
        codes: codes.iter().map(|value| ((value + 1.0) / 2.0 * levels) as u8).collect(),
        scales: random(out_features * groups, 9).into_iter().map(rounded).collect(),
        offsets: match offsets {
            OffsetKind::Middle => GroupOffsets::ZeroPoints(vec![1 << (bits - 1); out_features * groups]),
            OffsetKind::ZeroPoints => GroupOffsets::ZeroPoints(of_groups.iter().map(zero_point).collect()),
            OffsetKind::Minimums => {
                GroupOffsets::Minimums(of_groups.iter().map(|value| rounded(value * levels / 2.0)).collect())
            }
        },
        input_permutation: permuted.then(|| (0..in_features as u32).rev().collect()),
    })
    .unwrap()
}

fn every_cpu() -> impl Iterator<Item = (InstructionSet, Activations)> {
    let sets = InstructionSet::available().into_iter();
    sets.flat_map(|set| [Activations::Float, Activations::Integer].map(|activations| (set, activations)))
}

fn multiply(cpu: &Cpu, input: &[f32], matrix: &QuantizedMatrix, rows: usize) -> Vec<f32> {
    let weight = cpu.pack_quantized("w", matrix).unwrap();
    let mut output = cpu.buffer(rows * matrix.out_features()).unwrap();
    let products = &mut [Product { weight: &weight, bias: None, output: &mut output }];
    cpu.w4a16_matmul(Args { input: &upload(cpu, input), products, rows }).unwrap();
    output.to_vec()
}

const fn shape(out_features: usize, in_features: usize, group_size: usize) -> Shape {
    let (offsets, half) = (OffsetKind::ZeroPoints, false);
    Shape { out_features, in_features, group_size, bits: 4, permuted: false, offsets, half }
}

/// The forms that GGUF files hold, by the types that have them; ragged in outputs and in panels.
const GGUF_FORMS: [Shape; 9] = [
    Shape { offsets: OffsetKind::Middle, half: true, ..shape(40, 192, 32) }, // Q4_0
    Shape { offsets: OffsetKind::Minimums, half: true, ..shape(100, 160, 32) }, // Q4_1
    Shape { bits: 5, offsets: OffsetKind::Middle, half: true, ..shape(33, 224, 32) }, // Q5_0
    Shape { bits: 5, offsets: OffsetKind::Minimums, half: true, ..shape(70, 192, 32) }, // Q5_1
    Shape { bits: 8, offsets: OffsetKind::Middle, half: true, ..shape(50, 160, 32) }, // Q8_0
    Shape { bits: 2, offsets: OffsetKind::Minimums, ..shape(40, 256, 16) },  // Q2_K
    Shape { bits: 3, offsets: OffsetKind::Middle, ..shape(40, 256, 16) },    // Q3_K
    Shape { offsets: OffsetKind::Minimums, ..shape(40, 256, 32) },           // Q4_K, Q5_K with 5 bits
    Shape { bits: 6, offsets: OffsetKind::Middle, ..shape(40, 512, 16) },    // Q6_K
];

/// What the CPU device rounds activations to: eight bits for each row and chunk of at most 128 inputs.
fn rounded(input: &[f32], shape: &Shape) -> Vec<f32> {
    let order = |at: usize| if shape.permuted { shape.in_features - 1 - at } else { at };
    let mut rounded = input.to_vec();
    for row in rounded.chunks_exact_mut(shape.in_features) {
        let mut start = 0;
        while start < shape.in_features {
            let in_group = shape.group_size - start % shape.group_size;
            let end = start + in_group.min(128).min(shape.in_features - start);
            let largest = (start..end).fold(0.0f32, |most, at| most.max(row[order(at)].abs()));
            let scale = largest / 127.0;
            for at in start..end {
                row[order(at)] = (row[order(at)] * (1.0 / scale)).round_ties_even() * scale;
            }
            start = end;
        }
    }
    rounded
}

#[test]
fn every_shape_and_instruction_set_agrees_with_the_reference() {
    let mut shapes = vec![
        shape(1, 8, 8),
        shape(33, 64, 32),
        shape(64, 576, 64),
        shape(40, 200, 128),
        shape(40, 600, 600),
        shape(40, 90, 30),
        shape(40, 90, 90),
        Shape { bits: 8, ..shape(70, 160, 32) },
        Shape { bits: 8, ..shape(40, 200, 128) },
        Shape { bits: 8, ..shape(40, 90, 30) },
        Shape { bits: 3, ..shape(32, 96, 32) },
        Shape { permuted: true, ..shape(50, 128, 32) },
        Shape { bits: 5, ..shape(40, 90, 30) },
        Shape { bits: 5, ..shape(40, 120, 40) },
        Shape { bits: 5, offsets: OffsetKind::Minimums, ..shape(40, 256, 32) },
        Shape { bits: 7, ..shape(40, 200, 128) },
        Shape { offsets: OffsetKind::Minimums, ..shape(40, 90, 30) },
        Shape { offsets: OffsetKind::Minimums, permuted: true, ..shape(50, 128, 32) },
    ];
    shapes.extend(GGUF_FORMS);
    for (set, activations) in every_cpu() {
        let cpu = Cpu::with_instruction_set(2, set).with_activations(activations);
        for shape in &shapes {
            let matrix = matrix(shape);
            for rows in [1, 2, 3, 8, 25, 260] {
                let input = random(rows * shape.in_features, 2);
                let found = multiply(&cpu, &input, &matrix, rows);
                let steps_fit = shape.group_size.is_multiple_of(8) || shape.group_size == shape.in_features;
                let of_integers = activations == Activations::Integer && steps_fit;
                let multiplied = if of_integers { rounded(&input, shape) } else { input };
                let expected = reference::w4a16_matmul(&multiplied, &matrix, None);
                let magnitude =
                    matrix.dequantize().iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
                let tolerance = 2e-6 * magnitude * (shape.in_features as f32).sqrt();
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{set:?} {activations:?} {shape:?}, {rows} rows: {found} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for (set, activations) in every_cpu() {
        for threads in [1, 2] {
            let cpu = Cpu::with_instruction_set(threads, set).with_activations(activations);
            let of_gptq = [false, true].map(|permuted| Shape { permuted, ..shape(100, 320, 64) });
            for shape in of_gptq.into_iter().chain(GGUF_FORMS) {
                let matrix = matrix(&shape);
                let input = random(300 * shape.in_features, 2);
                let whole = multiply(&cpu, &input, &matrix, 300);
                for batch in [1, 2, 3, 5, 12, 64, 257] {
                    let part = multiply(&cpu, &input, &matrix, batch);
                    assert_eq!(
                        part,
                        whole[..batch * shape.out_features],
                        "{set:?} {activations:?} {shape:?}, batch {batch}"
                    );
                }
            }
        }
    }
}

/// Sums of integers are exact, and what follows them is the same multiplications and additions.
#[test]
fn rounded_activations_give_the_same_bits_on_every_instruction_set_that_fuses_multiply_and_add() {
    for bits in [4, 5, 8] {
        let shapes =
            [(576, 64), (320, 32), (200, 128), (90, 90), (72, 8), (1200, 128), (1100, 256), (648, 72)];
        for (in_features, group_size) in shapes {
            let shape = Shape { bits, ..shape(100, in_features, group_size) };
            let (matrix, input) = (matrix(&shape), random(150 * in_features, 2));
            let sets = InstructionSet::available().into_iter().filter(|&set| set != InstructionSet::Portable);
            let outputs: Vec<_> = sets
                .map(|set| {
                    let cpu = Cpu::with_instruction_set(2, set).with_activations(Activations::Integer);
                    (set, [1, 2, 3, 4, 9, 16, 150].map(|rows| multiply(&cpu, &input, &matrix, rows)))
                })
                .collect();
            for pair in outputs.windows(2) {
                assert!(pair[0].1 == pair[1].1, "{:?} and {:?}, {bits} bits", pair[0].0, pair[1].0);
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_when_activations_are_rounded() {
    let minimums = Shape { offsets: OffsetKind::Minimums, ..shape(40, 128, 64) };
    for ((set, activations), shape) in
        every_cpu().flat_map(|cpu| [shape(40, 128, 64), minimums].map(|shape| (cpu, shape)))
    {
        let cpu = Cpu::with_instruction_set(1, set).with_activations(activations);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut input = random(3 * shape.in_features, 2);
            input[shape.in_features + 70] = wrong;
            let output = multiply(&cpu, &input, &matrix(&shape), 3);
            let sound: Vec<bool> =
                output.chunks(40).map(|row| row.iter().all(|value| value.is_finite())).collect();
            assert_eq!(sound, [true, false, true], "{set:?} {activations:?} {wrong}");
        }
    }
}

/// A quantized matrix takes about the memory of the file it comes from.
#[test]
fn a_packed_matrix_is_as_small_as_its_form_allows() {
    let cpu = Cpu::new(1);
    let bits = |shape: Shape| {
        let shape = Shape { out_features: 64, in_features: 512, ..shape };
        let bytes = cpu.pack_quantized("w", &matrix(&shape)).unwrap().bytes();
        bytes as f64 * 8.0 / (64.0 * 512.0)
    };
    assert_eq!(GGUF_FORMS[..5].iter().copied().map(bits).collect::<Vec<_>>(), [4.5, 5.0, 5.5, 6.0, 8.5]);
    assert_eq!(bits(shape(64, 512, 128)), 4.3125); // scales in F32, zero points of a byte
}

#[test]
fn a_row_of_zeros_is_the_bias_when_activations_are_rounded() {
    let cpu = Cpu::new(1).with_activations(Activations::Integer);
    for shape in [shape(33, 64, 32), Shape { offsets: OffsetKind::Minimums, ..shape(33, 64, 32) }] {
        assert!(multiply(&cpu, &[0.0; 64], &matrix(&shape), 1).iter().all(|&value| value == 0.0));
    }
}

#[test]
fn products_of_the_same_activations_have_the_bits_of_each_alone() {
    for (set, activations) in every_cpu() {
        let cpu = Cpu::with_instruction_set(2, set).with_activations(activations);
        let matrices = [shape(100, 320, 64), shape(33, 320, 32), Shape { bits: 8, ..shape(64, 320, 64) }];
        let matrices = matrices.map(|shape| matrix(&shape));
        for rows in [1, 7, 40] {
            let input = random(rows * 320, 2);
            let weights = matrices.each_ref().map(|matrix| cpu.pack_quantized("w", matrix).unwrap());
            let mut outputs = matrices.each_ref().map(|m| cpu.buffer(rows * m.out_features()).unwrap());
            let products = weights.iter().zip(&mut outputs);
            let mut products: Vec<_> =
                products.map(|(weight, output)| Product { weight, bias: None, output }).collect();
            cpu.w4a16_matmul(Args { input: &upload(&cpu, &input), products: &mut products, rows }).unwrap();
            for (output, matrix) in outputs.iter().zip(&matrices) {
                assert_eq!(output[..], multiply(&cpu, &input, matrix, rows)[..], "{set:?} {rows} rows");
            }
        }
    }
}

#[test]
fn weights_of_other_inputs_are_refused() {
    let cpu = Cpu::new(1);
    let weights = [64, 96].map(|inputs| cpu.pack_quantized("w", &matrix(&shape(8, inputs, 32))).unwrap());
    let mut outputs = [cpu.buffer(8).unwrap(), cpu.buffer(8).unwrap()];
    let products = weights.iter().zip(&mut outputs);
    let mut products: Vec<_> =
        products.map(|(weight, output)| Product { weight, bias: None, output }).collect();
    let args = Args { input: &cpu.buffer(96).unwrap(), products: &mut products, rows: 1 };
    let refused = cpu.w4a16_matmul(args).unwrap_err().to_string();
    assert!(refused.contains("in_features") && refused.contains("96"), "{refused}");
}
