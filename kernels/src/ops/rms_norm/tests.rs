use super::{Args, RmsNorm, reference};
use crate::backend::Device;
use crate::device::cpu::{Cpu, InstructionSet};
use crate::testing::{random, upload};

#[test]
fn every_instruction_set_agrees_with_the_reference() {
    for set in InstructionSet::available() {
        let cpu = Cpu::with_instruction_set(1, set);
        for width in [1, 7, 64, 576, 1000] {
            let (rows, epsilon) = (3, 1e-5);
            let input = random(rows * width, 1);
            let addend = random(rows * width, 2);
            let weight = random(width, 3);
            let mut residual = upload(&cpu, &input);
            let mut output = cpu.buffer(rows * width).unwrap();
            cpu.rms_norm(Args {
                residual: &mut residual,
                addend: Some(&upload(&cpu, &addend)),
                weight: &upload(&cpu, &weight),
                output: &mut output,
                rows,
                width,
                epsilon,
            })
            .unwrap();
            for row in 0..rows {
                let range = row * width..(row + 1) * width;
                let sums: Vec<f32> =
                    input[range.clone()].iter().zip(&addend[range.clone()]).map(|(a, b)| a + b).collect();
                assert_eq!(&residual[range.clone()], sums);
                for (found, expected) in
                    output[range].iter().zip(reference::rms_norm(&sums, &weight, epsilon))
                {
                    assert!((found - expected).abs() <= 3e-6 * expected.abs().max(0.1), "{set:?} {width}");
                }
            }
        }
    }
}
