use std::borrow::Cow;

use half::{bf16, f16};

use super::{Args, DenseMatmul, reference};
use crate::backend::Device;
use crate::device::cpu::{Cpu, InstructionSet};
use crate::tensor::{DenseMatrix, DenseValues};
use crate::testing::{random, upload};

fn multiply(cpu: &Cpu, input: &[f32], matrix: &DenseMatrix<'_>, bias: &[f32], rows: usize) -> Vec<f32> {
    let weight = cpu.pack_dense("w", matrix).unwrap();
    let mut output = cpu.buffer(rows * matrix.out_features()).unwrap();
    cpu.dense_matmul(Args {
        input: &upload(cpu, input),
        weight: &weight,
        bias: Some(&upload(cpu, bias)),
        output: &mut output,
        rows,
    })
    .unwrap();
    output.to_vec()
}

#[test]
fn every_element_type_and_instruction_set_agrees_with_the_reference() {
    for set in InstructionSet::available() {
        let cpu = Cpu::with_instruction_set(2, set);
        for (rows, out, inputs) in [(1, 1, 1), (2, 33, 7), (5, 64, 576), (13, 100, 129), (300, 40, 64)] {
            let values = random(out * inputs, 1);
            let f16_values: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            let bf16_values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            let (input, bias) = (random(rows * inputs, 2), random(out, 3));
            for values in [
                DenseValues::F32(Cow::from(&values)),
                DenseValues::F16(Cow::from(&f16_values)),
                DenseValues::BF16(Cow::from(&bf16_values)),
            ] {
                let matrix = DenseMatrix::new(out, inputs, values).unwrap();
                let found = multiply(&cpu, &input, &matrix, &bias, rows);
                let expected = reference::matmul(&input, &matrix.to_f32(), Some(&bias), inputs);
                for (found, expected) in found.iter().zip(&expected) {
                    let tolerance = 1e-6 * (inputs as f32).sqrt() + 1e-6;
                    assert!((found - expected).abs() <= tolerance, "{set:?} {rows}x{out}x{inputs}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    for set in InstructionSet::available() {
        let cpu = Cpu::with_instruction_set(2, set);
        let (out, inputs, rows) = (100, 300, 270);
        let values: Vec<f16> = random(out * inputs, 1).into_iter().map(f16::from_f32).collect();
        let matrix = DenseMatrix::new(out, inputs, DenseValues::F16(Cow::from(&values))).unwrap();
        let (input, bias) = (random(rows * inputs, 2), random(out, 3));
        let whole = multiply(&cpu, &input, &matrix, &bias, rows);
        for batch in [1, 2, 3, 4, 7, 17, 64] {
            let part = multiply(&cpu, &input, &matrix, &bias, batch);
            assert_eq!(part, whole[..batch * out], "{set:?} batch {batch}");
        }
    }
}
