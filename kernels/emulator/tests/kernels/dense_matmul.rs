//! The dense product: tiles of outputs and rows.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::dense_matmul::{self, Args, DenseMatmul, reference};

use crate::lab::{Lab, Outcome, Suite, check, check_rounded, check_same_bits, random};

pub(crate) const SUITE: Suite = Suite {
    source: dense_matmul::cuda::SOURCE,
    cases: &[
        ("every shape agrees with the reference", every_shape_agrees_with_the_reference),
        ("a row alone", a_row_has_the_same_bits_alone_and_in_any_batch),
        ("shared memory", shared_memory_has_hardly_any_conflicts),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault(
            "no barrier before a stage is read",
            "            block_barrier();\n            load",
            0,
            "            load",
        ),
        fault("the wait is too weak", "async_wait<STAGES - 2>", 0, "async_wait<STAGES - 1>"),
        fault(
            "the ring is read to the end and written at once",
            "        block_barrier();  // nobody",
            0,
            "        // nobody",
        ),
        fault(
            "the output is stored before it is whole",
            "        block_barrier();\n        u32 rows",
            0,
            "        u32 rows",
        ),
        fault("a stage too few", "step < STAGES - 1; step++) load", 0, "step < STAGES - 2; step++) load"),
        fault("a stage too far", "load(step + STAGES - 1)", 0, "load(step + STAGES)"),
        fault("no swizzle", "(chunk ^ row % 8)", 0, "chunk"),
        fault("rows past the end", "first + row < end && k", 0, "k"),
        fault("inputs past the end", " && k < arguments.in_features", 0, ""),
        fault(
            "the last step is forgotten",
            "(arguments.in_features + STEP - 1) / STEP",
            0,
            "arguments.in_features / STEP",
        ),
        fault(
            "the second output fragment is the first",
            "warp_output + 16 * i + lane % 16",
            0,
            "warp_output + lane % 16",
        ),
        fault("the inputs of another half", "2 * (part + half) + lane / 16)", 0, "2 * part + lane / 16)"),
        fault(
            "two rows' fragments swapped",
            "row[half][j + 1][0] = fragment[2]",
            0,
            "row[half][j + 1][0] = fragment[1]",
        ),
        fault(
            "no bias",
            "Element::from_float(sums[i][j][2 * half + e] + bias)",
            0,
            "Element::from_float(sums[i][j][2 * half + e])",
        ),
        fault(
            "a bias past the end",
            "arguments.bias && first_output + n < arguments.out_features",
            0,
            "arguments.bias",
        ),
        fault("outputs past the end", "if (8 * part < outputs)", 0, "if (8 * part <= outputs)"),
        fault("ragged outputs past the end", "if (n < outputs)", 0, "if (n <= outputs)"),
        fault(
            "the first tile's rows for all",
            "tile.first_row = block_index_x() * tile.ROWS",
            0,
            "tile.first_row = 0",
        ),
        fault("sums start with anything", "sums[i][j][e] = 0.0f", 0, "sums[i][j][e] = 0.001f"),
        fault("a column of another row", "+ lane % 4 * 2 + e;", 0, "+ lane % 4 * 2 + 1 - e;"),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: dense_matmul::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

struct Problem {
    element: Element,
    outputs: usize,
    inputs: usize,
    input: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Multiprocessors of a device whose launches take wide tiles, and of one whose launches take narrow ones.
#[derive(Clone, Copy, Debug)]
enum Tiles {
    Wide = 1,
    Narrow = 1 << 20,
}
const TILES: [Tiles; 2] = [Tiles::Wide, Tiles::Narrow];

/// The output, and the part of the cycles of shared memory that conflicts cost.
struct Product {
    output: Vec<f32>,
    conflicts: f64,
}

impl Problem {
    fn new(element: Element, rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            element,
            outputs,
            inputs,
            input: random(element, rows * inputs, 1, 1.0),
            weight: random(element, outputs * inputs, 2, 1.0),
            bias: random(element, outputs, 3, 1.0),
        }
    }

    /// The product of the first `rows` rows.
    fn run(&self, lab: &Lab, tiles: Tiles, rows: usize, biased: bool) -> Result<Product, String> {
        let device = lab.device_of_size(self.element, rows as u64, tiles as u32);
        let mut output = device.poisoned(rows * self.outputs);
        let bias = device.upload(&self.bias);
        let args = Args {
            input: &device.upload(&self.input[..rows * self.inputs]),
            weight: &device.matrix(self.outputs, self.inputs, &self.weight),
            bias: biased.then_some(&bias),
            output: &mut output,
            rows,
        };
        device.cuda.dense_matmul(args).map_err(|error| error.to_string())?;
        let report = device.emulator.report();
        let conflict_cycles = report.matrix_conflict_cycles + report.shared_conflict_cycles;
        let cycles = report.matrix_load_cycles + report.shared_cycles + conflict_cycles;
        Ok(Product { output: device.download(&output), conflicts: conflict_cycles as f64 / cycles as f64 })
    }
}

fn every_shape_agrees_with_the_reference(lab: &Lab) -> Outcome {
    use Element::{BF16, F16};
    for (element, rows, outputs, inputs, biased) in [
        (F16, 1, 128, 64, true),
        (F16, 5, 100, 8, false),
        (BF16, 9, 129, 328, true),
        (F16, 33, 200, 136, true),
        (BF16, 65, 136, 264, false),
        (F16, 128, 264, 72, true),
        (F16, 200, 131, 576, true),
    ] {
        let problem = Problem::new(element, rows, outputs, inputs);
        let bias = biased.then_some(&problem.bias[..]);
        let expected = reference::matmul(&problem.input, &problem.weight, bias, inputs);
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        for tiles in TILES {
            let found = problem.run(lab, tiles, rows, biased)?.output;
            let what = format!("{rows}x{outputs}x{inputs}, {tiles:?}");
            check_rounded(&what, element, &found, &expected, |_| 1e-6 * (inputs as f64))?;
        }
    }
    Ok(())
}

fn a_row_has_the_same_bits_alone_and_in_any_batch(lab: &Lab) -> Outcome {
    let problem = Problem::new(Element::F16, 270, 150, 328);
    let whole = problem.run(lab, Tiles::Wide, 270, true)?.output;
    for tiles in TILES {
        for rows in [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129] {
            let found = problem.run(lab, tiles, rows, true)?.output;
            check_same_bits(&format!("{rows} rows, {tiles:?}"), &found, &whole[..rows * 150])?;
        }
    }
    Ok(())
}

fn shared_memory_has_hardly_any_conflicts(lab: &Lab) -> Outcome {
    for tiles in TILES {
        for rows in [8, 16, 32, 64, 128] {
            // The loop over inputs has none; narrow tiles have a few where they store the output.
            let conflicts =
                Problem::new(Element::F16, rows, 128, 1024).run(lab, tiles, rows, true)?.conflicts;
            check(conflicts < 0.01, || format!("{conflicts} of all cycles with {rows} rows, {tiles:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn dense_matmul_agrees_with_the_reference_for_every_shape() -> Outcome {
    every_shape_agrees_with_the_reference(&Lab::sound())
}

#[test]
fn a_row_of_dense_matmul_has_the_same_bits_alone_and_in_any_batch() -> Outcome {
    a_row_has_the_same_bits_alone_and_in_any_batch(&Lab::sound())
}

#[test]
fn dense_matmul_has_hardly_any_conflicts_in_shared_memory() -> Outcome {
    shared_memory_has_hardly_any_conflicts(&Lab::sound())
}
