use super::{Args, W4a16Matmul, reference};
use crate::backend::Device;
use crate::device::cpu::{Cpu, InstructionSet};
use crate::tensor::{QuantizedMatrix, QuantizedParts};
use crate::testing::{random, upload};

struct Shape {
    out_features: usize,
    in_features: usize,
    group_size: usize,
    bits: u32,
    permuted: bool,
}

fn matrix(shape: &Shape) -> QuantizedMatrix {
    let Shape { out_features, in_features, group_size, bits, permuted } = *shape;
    let groups = in_features.div_ceil(group_size);
    let levels = (1u32 << bits) as f32;
    let codes = random(out_features * in_features, 7);
    let zero_points = random(out_features * groups, 8);
    QuantizedMatrix::new(QuantizedParts {
        out_features,
        in_features,
        bits,
        group_size,
        codes: codes.iter().map(|value| ((value + 1.0) / 2.0 * levels) as u8).collect(),
        scales: random(out_features * groups, 9),
        zero_points: zero_points.iter().map(|value| ((value + 1.0) / 2.0 * levels) as u8).collect(),
        input_permutation: permuted.then(|| (0..in_features as u32).rev().collect()),
    })
    .unwrap()
}

fn multiply(cpu: &Cpu, input: &[f32], matrix: &QuantizedMatrix, rows: usize) -> Vec<f32> {
    let weight = cpu.pack_quantized("w", matrix).unwrap();
    let mut output = cpu.buffer(rows * matrix.out_features());
    let args = Args { input: &upload(cpu, input), weight: &weight, bias: None, output: &mut output, rows };
    cpu.w4a16_matmul(args).unwrap();
    output.to_vec()
}

const fn shape(out_features: usize, in_features: usize, group_size: usize) -> Shape {
    Shape { out_features, in_features, group_size, bits: 4, permuted: false }
}

#[test]
fn every_shape_and_instruction_set_agrees_with_the_reference() {
    let shapes = [
        shape(1, 8, 8),
        shape(33, 64, 32),
        shape(64, 576, 64),
        shape(40, 200, 128),
        shape(40, 600, 600),
        shape(40, 90, 30),
        Shape { bits: 8, ..shape(70, 160, 32) },
        Shape { bits: 3, ..shape(32, 96, 32) },
        Shape { permuted: true, ..shape(50, 128, 32) },
    ];
    for set in InstructionSet::available() {
        let cpu = Cpu::with_instruction_set(2, set);
        for shape in &shapes {
            let matrix = matrix(shape);
            for rows in [1, 2, 3, 8, 25, 260] {
                let input = random(rows * shape.in_features, 2);
                let found = multiply(&cpu, &input, &matrix, rows);
                let expected = reference::w4a16_matmul(&input, &matrix, None);
                let magnitude =
                    matrix.dequantize().iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
                let tolerance = 2e-6 * magnitude * (shape.in_features as f32).sqrt();
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((found - expected).abs() <= tolerance, "{set:?} {rows} rows {found} {expected}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for set in InstructionSet::available() {
        for threads in [1, 2] {
            let cpu = Cpu::with_instruction_set(threads, set);
            for permuted in [false, true] {
                let shape = Shape { permuted, ..shape(100, 320, 64) };
                let matrix = matrix(&shape);
                let input = random(300 * shape.in_features, 2);
                let whole = multiply(&cpu, &input, &matrix, 300);
                for batch in [1, 2, 3, 5, 12, 64, 257] {
                    let part = multiply(&cpu, &input, &matrix, batch);
                    assert_eq!(part, whole[..batch * shape.out_features], "{set:?} batch {batch}");
                }
            }
        }
    }
}
