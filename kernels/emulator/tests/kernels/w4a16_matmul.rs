//! The product with 4-bit weights: tiles that workers share, steps in a ring of stages.

use nibble_kernel_emulator::Emulator;
use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::backend::Device;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::w4a16_matmul::{self, Args, Product, W4a16Matmul, reference};
use nibble_kernels::tensor::{GroupOffsets, QuantizedMatrix, QuantizedParts};

use crate::lab::{
    Lab, Outcome, Suite, TestDevice, check, check_rounded, check_same_bits, random, random_words,
};

pub(crate) const SUITE: Suite = Suite {
    source: w4a16_matmul::cuda::SOURCES[0],
    cases: &[
        ("every form agrees with the reference", every_form_agrees_with_the_reference),
        ("several matrices", matrices_of_one_launch_agree_with_the_reference),
        ("a row alone", a_row_has_the_same_bits_alone_and_in_any_batch),
        ("shared memory", shared_memory_has_no_conflicts),
    ],
    faults: &[
        fault("the kernel before is not waited for", "        wait_for_previous_kernel();\n", 0, ""),
        fault(
            "activations are copied before the kernel before has ended",
            "weights.load_weights(shared",
            0,
            "weights.load_part(shared",
        ),
        fault(
            "inputs are permuted before the kernel before has ended",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("no barrier before a stage is read", "#endif\n    block_barrier();", 0, "#endif"),
        fault("the wait is too weak", "async_wait<ahead - 1>", 0, "async_wait<ahead>"),
        fault("copies are a step too late", "ahead < F::ahead; ++ahead", 0, "ahead + 1 < F::ahead; ++ahead"),
        fault("no weights for the first step", "ahead < first; ++ahead", 0, "ahead + 1 < first; ++ahead"),
        fault(
            "the weights of a step are copied twice",
            "if (ahead + 1 < first)",
            0,
            "if (ahead + 2 < first)",
        ),
        fault("a copy is not closed", "            async_commit();\n", 0, ""),
        fault(
            "a quarter of the codes is not copied",
            "part < 4; ++part) {\n                weights",
            0,
            "part < 3; ++part) {\n                weights",
        ),
        fault("no swizzle on the way in", "((chunk % 8) ^ (row % 8)) * 16", 0, "(chunk % 8) * 16"),
        fault("rows past the end", "chunk < chunks_to_read", 0, "first_input < arguments.k"),
        fault("inputs past the end", "first_input < arguments.k ? valid_chunks : 0", 0, "valid_chunks"),
        fault(
            "the group never changes",
            "factors -= strip_factor_bytes * groups_per_step",
            0,
            "factors -= 0",
        ),
        fault(
            "the group of a wrong step",
            "first % arguments.steps_per_group + 1",
            0,
            "first % arguments.steps_per_group",
        ),
        fault("the tile before is not entered", "        --tile;\n        step", 0, "        step"),
        fault(
            "the weights of the tile before are not found",
            "        enter_weights();\n    }\n\n    // Moves on to the step before, of any tile",
            0,
            "    }\n\n    // Moves on to the step before, of any tile",
        ),
        fault(
            "the third matrix is taken for the second",
            "is_third = tile >= third.first_tile",
            0,
            "is_third = tile > third.first_tile",
        ),
        fault(
            "the second matrix is taken for the first",
            "is_second = tile >= second.first_tile",
            0,
            "is_second = tile > second.first_tile",
        ),
        fault("the codes of another matrix", "(tile - matrix.first_tile) * warps", 0, "tile * warps"),
        fault(
            "the outputs of another matrix",
            "(tile - matrix.first_tile) * tile_outputs",
            0,
            "tile * tile_outputs",
        ),
        fault("the inputs of the tile before", "first_input += step * step_inputs", 0, "first_input += 0"),
        fault(
            "the activations of the tile before",
            "activations += static_cast<u64>(step)",
            0,
            "activations += 0 * static_cast<u64>(step)",
        ),
        fault(
            "zero points are forgotten",
            "zeros = *reinterpret_cast<const u32*>(zero_points",
            0,
            "zeros = 0 & *reinterpret_cast<const u32*>(zero_points",
        ),
        fault(
            "two scales swapped",
            "permute_bytes(pairs.x, 0, 0x3232)",
            0,
            "permute_bytes(pairs.x, 0, 0x1010)",
        ),
        fault("the zero point of another output", "0xe4e4e4e4u, 0x4242", 0, "0xe4e4e4e4u, 0x4141"),
        fault("a quarter is read twice", "codes + (part + 1) * 512", 0, "codes + part * 512"),
        fault(
            "two words swapped",
            "sixteen % 2 == 0 ? words.x : words.z",
            0,
            "sixteen % 2 == 0 ? words.z : words.x",
        ),
        fault(
            "the upper nibble is not scaled down",
            "0x2c002c00u, zero_odd);\n        a[2]",
            0,
            "0x3c003c00u, zero_odd);\n        a[2]",
        ),
        fault("no swizzle on the way out", "^ (row % 8)) * 16);\n    }\n};", 0, ") * 16);\n    }\n};"),
        fault("the other half of the inputs", "first_chunk / 8 * (rows * 128)", 0, "0 * (rows * 128)"),
        fault("a pair of rows for all", "pair * (16 * 128)", 0, "0 * (16 * 128)"),
        fault(
            "operands are overwritten too early",
            "columns[(index + ahead) % ring], index + ahead",
            1,
            "columns[index % ring], index + ahead",
        ),
        fault("sums are not cleared", "sums[tile][column][i] = 0.0f", 0, "sums[tile][column][i] += 0.0f"),
        fault("no bias", "sums[0][column][side] + bias[0]", 0, "sums[0][column][side]"),
        fault(
            "a bias past the end",
            "output + i < matrix.n ? Element",
            0,
            "output + i <= matrix.n ? Element",
        ),
        fault("outputs past the end", "if (output + i < matrix.n) {", 0, "if (output + i <= matrix.n) {"),
        fault("rows are written past the end", "row >= arguments.m", 0, "row > arguments.m"),
        fault(
            "two outputs swapped",
            "sums[1][column][side] + bias[2]",
            0,
            "sums[1][column][side + 2] + bias[2]",
        ),
        fault(
            "a part is handed on without a fence",
            "sums);\n    device_fence();\n    block_barrier();",
            0,
            "sums);\n    block_barrier();",
        ),
        fault(
            "a part is announced before it is written",
            "    device_fence();\n    block_barrier();\n    if (thread_index() == 0) {\n        atomic_add",
            0,
            "    device_fence();\n    if (thread_index() == 0) {\n        atomic_add",
        ),
        fault(
            "the finisher does not wait",
            "        wait_for_lower_blocks(arrivals, block_index_x() - first);\n",
            0,
            "",
        ),
        fault(
            "only one thread waits",
            "    block_barrier();\n    device_fence();\n",
            0,
            "    device_fence();\n",
        ),
        fault("arrivals are not cleared", "        *arrivals = 0;\n", 0, ""),
        fault("a part is forgotten", "worker-- > first;", 0, "worker-- > first + 1;"),
        fault(
            "the slot of another worker",
            "static_cast<u64>(worker) * slot_floats",
            0,
            "static_cast<u64>(worker + 1) * slot_floats",
        ),
        fault(
            "row blocks share their slots",
            "block_index_y() * grid_size_x() + block_index_x()",
            0,
            "block_index_x()",
        ),
        fault(
            "row blocks share their arrivals",
            "arguments.arrivals + block_index_y() * arguments.tiles + tile, 1",
            0,
            "arguments.arrivals + tile, 1",
        ),
        fault("parts end elsewhere for large batches", "% arguments.share + 1;", 0, "% arguments.share;"),
        fault("totals are not added", "add_slot<rows>(sums, totals)", 0, "add_slot<rows>(sums, totals + 4)"),
        fault("the next tile overwrites stages in use", "block_barrier();\n        Pipeline", 0, "Pipeline"),
        fault(
            "inputs are not permuted",
            "input[row + permutation[position]]",
            0,
            "input[row + position + 0 * permutation[position]]",
        ),
        fault("permuted inputs past the end", "if (position < k)", 0, "if (position <= k)"),
    ],
};

/// What only Hopper's form has, in a suite of its own: all other cases pass with its faults.
pub(crate) const HOPPER_SUITE: Suite = Suite {
    source: w4a16_matmul::cuda::SOURCES[0],
    cases: &[("Hopper", hopper_agrees_with_the_reference_and_rows_with_themselves)],
    faults: &[
        fault("Hopper, copies are not fenced", "    shared_proxy_fence();\n", 0, ""),
        fault("Hopper, registers are not fenced", "        warpgroup_fence();\n", 0, ""),
        fault("Hopper, weights are overwritten", "groups_under_way - 1>();", 0, "groups_under_way>();"),
        fault("Hopper, stages are overwritten", "ahead = stages - 2", 0, "ahead = stages - 1"),
        fault("Hopper, sums are not waited for", "    warpgroup_wait<0>();\n", 0, ""),
        fault("Hopper, the other half of the inputs", "sixteen / 4 * (rows * 8)", 0, "0 * (rows * 8)"),
        fault("Hopper, a group is not closed", "        warpgroup_commit();\n", 0, ""),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: w4a16_matmul::cuda::SOURCES[0].name, fault, pattern, occurrence, replacement }
}

/// Multiprocessors of the device: few, so that small shapes have tiles that several workers share, and workers that
/// share several tiles.
const MULTIPROCESSORS: u32 = 5;

#[derive(Clone, Copy)]
struct Shape {
    element: Element,
    outputs: usize,
    inputs: usize,
    group_size: usize,
    symmetric: bool,
    permuted: bool,
}

const fn shape(element: Element, outputs: usize, inputs: usize, group_size: usize, symmetric: bool) -> Shape {
    Shape { element, outputs, inputs, group_size, symmetric, permuted: false }
}

struct Problem {
    shape: Shape,
    input: Vec<f32>,
    bias: Vec<f32>,
    weight: QuantizedMatrix,
}

/// The output, and cycles that conflicts in shared memory cost.
struct Found {
    output: Vec<f32>,
    conflict_cycles: u64,
}

impl Problem {
    fn new(shape: Shape, rows: usize) -> Self {
        let Shape { element, outputs, inputs, group_size, symmetric, permuted } = shape;
        let groups = inputs.div_ceil(group_size);
        let byte = |word: u32| word as u8;
        let zero_points =
            if symmetric { vec![8; outputs * groups] } else { random_words(outputs * groups, 4, 17) };
        // Some scales are far larger than others.
        let scales = random(element, outputs * groups, 5, 0.02);
        let scales =
            scales.iter().enumerate().map(|(at, scale)| if at % 61 == 0 { scale * 32.0 } else { *scale });
        let weight = QuantizedMatrix::new(QuantizedParts {
            out_features: outputs,
            in_features: inputs,
            bits: 4,
            group_size,
            codes: random_words(outputs * inputs, 3, 16).into_iter().map(byte).collect(),
            scales: scales.collect(),
            offsets: GroupOffsets::ZeroPoints(zero_points.into_iter().map(byte).collect()),
            input_permutation: permuted.then(|| (0..inputs as u32).rev().collect()),
        });
        Self {
            shape,
            input: random(element, rows * inputs, 1, 1.0),
            bias: random(element, outputs, 2, 1.0),
            weight: weight.expect("the parts fit"),
        }
    }

    /// The product of the first `rows` rows.
    fn run(&self, lab: &Lab, rows: usize, multiprocessors: u32) -> Result<Found, String> {
        self.run_on(&lab.device_of_size(self.shape.element, rows as u64, multiprocessors), rows)
    }

    fn run_on(&self, device: &TestDevice, rows: usize) -> Result<Found, String> {
        let Shape { outputs, inputs, .. } = self.shape;
        let weight = device.cuda.pack_quantized("weight", &self.weight).map_err(|error| error.to_string())?;
        let (input, bias) = (device.upload(&self.input[..rows * inputs]), device.upload(&self.bias));
        let mut found = Vec::new();
        // Twice: whoever counts leaves zeros behind.
        for _ in 0..2 {
            let mut output = device.poisoned(rows * outputs);
            let products = &mut [Product { weight: &weight, bias: Some(&bias), output: &mut output }];
            device
                .cuda
                .w4a16_matmul(Args { input: &input, products, rows })
                .map_err(|error| error.to_string())?;
            found.push(device.download(&output));
        }
        let report = device.emulator.report();
        check_same_bits("the second time", &found[1], &found[0])?;
        let conflict_cycles = report.matrix_conflict_cycles + report.shared_conflict_cycles;
        Ok(Found { output: found.swap_remove(0), conflict_cycles })
    }

    fn check(&self, rows: usize, found: &[f32]) -> Outcome {
        self.check_product_of(&self.input, rows, found)
    }

    /// Holds `found` against the product of the first `rows` rows of `input`.
    fn check_product_of(&self, input: &[f32], rows: usize, found: &[f32]) -> Outcome {
        let Shape { element, outputs, inputs, .. } = self.shape;
        let input = &input[..rows * inputs];
        let expected = reference::w4a16_matmul(input, &self.weight, Some(&self.bias));
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        // The product of a code and its scale is rounded once, to the element.
        let unit = match element {
            Element::F16 => 2f64.powi(-11),
            Element::BF16 => 2f64.powi(-8),
        };
        let largest = self.weight.dequantize().iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
        let allowed = 4.0 * unit * f64::from(largest) * (inputs as f64).sqrt();
        check_rounded(&format!("{rows}x{outputs}x{inputs}"), element, found, &expected, |_| allowed)
    }
}

fn every_form_agrees_with_the_reference(lab: &Lab) -> Outcome {
    use Element::{BF16, F16};
    for (rows, shape) in [
        (1, shape(F16, 300, 576, 32, false)),
        (9, Shape { permuted: true, ..shape(F16, 40, 264, 64, true) }),
        (16, shape(BF16, 512, 384, 128, false)),
        (30, shape(F16, 258, 1000, 1000, true)),
        (64, shape(BF16, 200, 640, 64, true)),
        (70, shape(F16, 520, 512, 128, false)),
        (129, shape(F16, 263, 776, 256, false)),
        (200, shape(F16, 1100, 640, 32, false)),
    ] {
        let problem = Problem::new(shape, rows);
        problem.check(rows, &problem.run(lab, rows, MULTIPROCESSORS)?.output)?;
    }
    Ok(())
}

fn a_row_has_the_same_bits_alone_and_in_any_batch(lab: &Lab) -> Outcome {
    for shape in [shape(Element::F16, 1030, 648, 32, false), shape(Element::F16, 300, 1152, 384, true)] {
        let problem = Problem::new(shape, 270);
        let whole = problem.run(lab, 270, MULTIPROCESSORS)?.output;
        for rows in [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129] {
            let found = problem.run(lab, rows, MULTIPROCESSORS)?.output;
            check_same_bits(&format!("{rows} rows"), &found, &whole[..rows * shape.outputs])?;
        }
    }
    Ok(())
}

/// Query, key and value; then a launch of two, and two launches because one of four matrices has no zero points.
fn matrices_of_one_launch_agree_with_the_reference(lab: &Lab) -> Outcome {
    let with = |outputs| shape(Element::F16, outputs, 576, 64, true);
    let without = |outputs| Shape { symmetric: false, ..with(outputs) };
    for (rows, shapes) in [
        (5, vec![with(600), with(264), with(40)]),
        (17, vec![with(256), with(300)]),
        (150, vec![with(512), with(40), with(513)]),
        (9, vec![with(256), with(40), without(300), with(264)]),
    ] {
        let problems: Vec<Problem> = shapes.into_iter().map(|shape| Problem::new(shape, rows)).collect();
        let device = lab.device_of_size(Element::F16, rows as u64, MULTIPROCESSORS);
        let packed = problems.iter().map(|problem| device.cuda.pack_quantized("weight", &problem.weight));
        let packed = packed.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
        let biases: Vec<_> = problems.iter().map(|problem| device.upload(&problem.bias)).collect();
        let mut outputs: Vec<_> =
            problems.iter().map(|problem| device.poisoned(rows * problem.shape.outputs)).collect();
        let input = device.upload(&problems[0].input);
        let parts = packed.iter().zip(&biases).zip(&mut outputs);
        let mut products: Vec<_> =
            parts.map(|((weight, bias), output)| Product { weight, bias: Some(bias), output }).collect();
        let args = Args { input: &input, products: &mut products, rows };
        device.cuda.w4a16_matmul(args).map_err(|error| error.to_string())?;
        for (problem, output) in problems.iter().zip(&outputs) {
            problem.check_product_of(&problems[0].input, rows, &device.download(output))?;
        }
    }
    Ok(())
}

fn hopper_agrees_with_the_reference_and_rows_with_themselves(lab: &Lab) -> Outcome {
    for shape in [
        shape(Element::F16, 300, 1152, 128, false),
        shape(Element::BF16, 263, 520, 32, true),
        shape(Element::F16, 520, 640, 64, false),
    ] {
        let problem = Problem::new(shape, 129);
        let run = |rows: usize| {
            let emulator = Emulator::hopper(rows as u64).with_multiprocessors(MULTIPROCESSORS);
            problem.run_on(&lab.device_on(emulator, shape.element), rows)
        };
        let whole = run(129)?.output;
        problem.check(129, &whole)?;
        for rows in [1, 8, 16, 30, 64, 65] {
            check_same_bits(&format!("{rows} rows"), &run(rows)?.output, &whole[..rows * shape.outputs])?;
        }
    }
    Ok(())
}

fn shared_memory_has_no_conflicts(lab: &Lab) -> Outcome {
    for rows in [8, 16, 32, 64, 128, 256] {
        let problem = Problem::new(shape(Element::F16, 256, 512, 128, true), rows);
        let cycles = problem.run(lab, rows, MULTIPROCESSORS)?.conflict_cycles;
        check(cycles == 0, || format!("{cycles} cycles of conflicts in shared memory with {rows} rows"))?;
    }
    Ok(())
}

#[test]
fn every_form_of_w4a16_matmul_agrees_with_the_reference() -> Outcome {
    every_form_agrees_with_the_reference(&Lab::sound())
}

#[test]
fn matrices_of_one_launch_of_w4a16_matmul_agree_with_the_reference() -> Outcome {
    matrices_of_one_launch_agree_with_the_reference(&Lab::sound())
}

#[test]
fn a_row_of_w4a16_matmul_has_the_same_bits_alone_and_in_any_batch() -> Outcome {
    a_row_has_the_same_bits_alone_and_in_any_batch(&Lab::sound())
}

#[test]
fn w4a16_matmul_on_hopper_agrees_with_the_reference_and_rows_with_themselves() -> Outcome {
    hopper_agrees_with_the_reference_and_rows_with_themselves(&Lab::sound())
}

#[test]
fn w4a16_matmul_has_no_conflicts_in_shared_memory() -> Outcome {
    shared_memory_has_no_conflicts(&Lab::sound())
}
