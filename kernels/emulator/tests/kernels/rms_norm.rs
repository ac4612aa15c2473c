//! The norm: a warp or a block for each row.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::rms_norm::{self, Args, RmsNorm, reference};

use crate::lab::{ELEMENTS, Lab, Outcome, Suite, check_rounded, check_same_bits, random, round};

pub(crate) const SUITE: Suite = Suite {
    source: rms_norm::cuda::SOURCE,
    cases: &[
        ("every width agrees with the reference", every_width_agrees_with_the_reference),
        ("values of any size", values_of_any_size_agree_with_the_reference),
        ("a row alone", a_row_has_the_same_bits_alone_and_in_a_batch),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault(
            "the kernel before is not waited for, by the other kernel",
            "start_after_previous_kernel();",
            1,
            "let_next_kernel_start();",
        ),
        fault("the barrier is gone", "    block_barrier();\n", 0, ""),
        fault("a warp's sum is forgotten", "warp < threads / 32", 0, "warp < threads / 32 - 1"),
        fault("lanes far apart are not added", "distance = 16", 0, "distance = 8"),
        fault("the sum of the last lanes is lost", "distance > 0", 0, "distance > 1"),
        fault("every lane stores a sum", "    if (thread_index() % 32 == 0) partial", 0, "    partial"),
        fault("the next warp's place", "[thread_index() / 32] = sum", 0, "[thread_index() / 32 + 1] = sum"),
        fault("no epsilon", " + epsilon)", 0, ")"),
        fault("no weight in low halves", " * low_float<Element>(weight)", 0, ""),
        fault("no weight in high halves", " * high_float<Element>(weight)", 0, ""),
        fault("a square is forgotten", "    sum = add_squares<Element>(sum, words.y);\n", 0, ""),
        fault("a word is not added", "        words.z = add_rounded<Element>(words.z, added.z);\n", 0, ""),
        fault("the residual is not stored", "        store_16(residual, words);\n", 0, ""),
        fault("the mean of another width", "static_cast<float>(width)", 0, "static_cast<float>(width + 1)"),
        fault("rows past the end", "    if (row >= rows) return;\n", 0, ""),
        fault("a row too far", "<u64>(row) * width", 0, "<u64>(row + 1) * width"),
        fault("vectors past the end", "first < width) store_vector", 0, "first <= width) store_vector"),
        fault("the wrong vector's weight", "weight + first", 1, "weight + 0"),
        fault("the addend's first row for all", "    if (addend) addend += start;\n", 0, ""),
        fault("misaligned output", "output += start;", 0, "output += start + 4;"),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: rms_norm::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

/// The stored residual and the output.
#[derive(Debug, PartialEq)]
struct Normalized {
    residual: Vec<f32>,
    output: Vec<f32>,
}

struct Problem {
    element: Element,
    width: usize,
    residual: Vec<f32>,
    addend: Option<Vec<f32>>,
    weight: Vec<f32>,
    epsilon: f32,
}

impl Problem {
    fn new(element: Element, rows: usize, width: usize, scale: f32, with_addend: bool) -> Self {
        Self {
            element,
            width,
            residual: random(element, rows * width, 1, scale),
            addend: with_addend.then(|| random(element, rows * width, 2, scale)),
            weight: random(element, width, 3, 2.0),
            epsilon: 1e-5,
        }
    }

    fn row(&self, row: usize) -> Self {
        let range = row * self.width..(row + 1) * self.width;
        Self {
            residual: self.residual[range.clone()].to_vec(),
            addend: self.addend.as_ref().map(|addend| addend[range].to_vec()),
            weight: self.weight.clone(),
            ..*self
        }
    }

    fn run(&self, lab: &Lab, seed: u64) -> Result<Normalized, String> {
        let device = lab.device(self.element, seed);
        let mut residual = device.upload(&self.residual);
        let mut output = device.poisoned(self.residual.len());
        let addend = self.addend.as_ref().map(|addend| device.upload(addend));
        let args = Args {
            residual: &mut residual,
            addend: addend.as_ref(),
            weight: &device.upload(&self.weight),
            output: &mut output,
            rows: self.residual.len() / self.width,
            width: self.width,
            epsilon: self.epsilon,
        };
        device.cuda.rms_norm(args).map_err(|error| error.to_string())?;
        Ok(Normalized { residual: device.download(&residual), output: device.download(&output) })
    }

    fn check(&self, lab: &Lab, seed: u64) -> Outcome {
        let found = self.run(lab, seed)?;
        let width = self.width;
        let sums = match &self.addend {
            Some(addend) => {
                self.residual.iter().zip(addend).map(|(a, b)| round(self.element, a + b)).collect()
            }
            None => self.residual.clone(),
        };
        check_same_bits(&format!("residual of width {width}"), &found.residual, &sums)?;
        for (row, sums) in sums.chunks_exact(width).enumerate() {
            let expected = reference::rms_norm(sums, &self.weight, self.epsilon);
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            let output = &found.output[row * width..(row + 1) * width];
            let what = format!("row {row} of width {width}");
            check_rounded(&what, self.element, output, &expected, |index| expected[index].abs() * 1e-6)?;
        }
        Ok(())
    }
}

fn every_width_agrees_with_the_reference(lab: &Lab) -> Outcome {
    let widths = [8, 64, 128, 248, 256, 264, 512, 576, 1000, 4096, 4104, 8192, 8200, 14_336, 16_384];
    for element in ELEMENTS {
        for (seed, width) in widths.into_iter().enumerate() {
            for rows in [1, 5] {
                Problem::new(element, rows, width, 1.0, rows == 5).check(lab, seed as u64)?;
            }
        }
    }
    Ok(())
}

fn values_of_any_size_agree_with_the_reference(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        // The smallest is far below epsilon's root; the largest squares are far above what 16 bits hold.
        for scale in [1e-4, 1e-2, 30.0, 3e4] {
            for width in [128, 1024] {
                Problem::new(element, 3, width, scale, scale < 1.0).check(lab, 7)?;
            }
        }
    }
    Ok(())
}

fn a_row_has_the_same_bits_alone_and_in_a_batch(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        for width in [128, 576, 2048, 8192, 16_384] {
            let batch = Problem::new(element, 6, width, 1.0, true);
            let together = batch.run(lab, 1)?;
            for row in 0..6 {
                let range = row * width..(row + 1) * width;
                let alone = batch.row(row).run(lab, 2 + row as u64)?;
                check_same_bits(
                    &format!("row {row} of width {width}"),
                    &alone.output,
                    &together.output[range],
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn rms_norm_agrees_with_the_reference_for_every_width() -> Outcome {
    every_width_agrees_with_the_reference(&Lab::sound())
}

#[test]
fn rms_norm_agrees_with_the_reference_for_values_of_any_size() -> Outcome {
    values_of_any_size_agree_with_the_reference(&Lab::sound())
}

#[test]
fn a_row_of_rms_norm_has_the_same_bits_alone_and_in_a_batch() -> Outcome {
    a_row_has_the_same_bits_alone_and_in_a_batch(&Lab::sound())
}
