//! The gated activation.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::silu_mul::{self, Args, SiluMul};

use crate::lab::{ELEMENTS, Lab, Outcome, Suite, check, check_rounded, check_same_bits, random};

pub(crate) const SUITE: Suite = Suite {
    source: silu_mul::cuda::SOURCE,
    cases: &[
        ("every length agrees with the formula", every_length_agrees_with_the_formula),
        ("gates of any size", gates_of_any_size_agree_with_the_formula),
        ("an element alone", an_element_has_the_same_bits_alone_and_among_others),
        ("vectors", whole_vectors_are_moved_sixteen_bytes_at_a_time),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("a block too far", "(block_index_x() * THREADS", 0, "((block_index_x() + 1) * THREADS"),
        fault("threads past the end", "    if (first >= elements) return;\n", 0, ""),
        fault("seven elements are a vector", "elements - first >= 8", 0, "elements - first >= 7"),
        fault(
            "the last elements are forgotten",
            "index = first; index < elements",
            0,
            "index = first; index + 1 < elements",
        ),
        fault("a word is forgotten", "        words.z = gated_word<Element>(gates.z, ups.z);\n", 0, ""),
        fault("the gate is not multiplied", "return gate * reciprocal", 0, "return reciprocal"),
        fault("up is forgotten", "(-LOG2_E * gate)) * up", 0, "(-LOG2_E * gate))"),
        fault("another sign", "-LOG2_E * gate", 0, "LOG2_E * gate"),
        fault("another base", "-LOG2_E * gate", 0, "-gate"),
        fault(
            "halves swapped",
            "low_float<Element>(gate), low_float<Element>(up)",
            0,
            "low_float<Element>(gate), high_float<Element>(up)",
        ),
        fault("no vectors", "elements - first >= 8", 0, "false"),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: silu_mul::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

fn run(lab: &Lab, element: Element, seed: u64, gate: &[f32], up: &[f32]) -> Result<Vec<f32>, String> {
    let device = lab.device(element, seed);
    let mut output = device.poisoned(gate.len());
    let args = Args {
        gate: &device.upload(gate),
        up: &device.upload(up),
        output: &mut output,
        elements: gate.len(),
    };
    device.cuda.silu_mul(args).map_err(|error| error.to_string())?;
    Ok(device.download(&output))
}

fn check_formula(lab: &Lab, element: Element, seed: u64, gate: &[f32], up: &[f32]) -> Outcome {
    let found = run(lab, element, seed, gate, up)?;
    let formula = |(&gate, &up): (&f32, &f32)| {
        let (gate, up) = (f64::from(gate), f64::from(up));
        gate / (1.0 + (-gate).exp()) * up
    };
    let expected: Vec<f64> = gate.iter().zip(up).map(formula).collect();
    // The exponent is rounded in float: its error grows with the gate. Where e^-gate is more than a float holds, the
    // result is zero.
    let allowed = |index: usize| (expected[index] * f64::from(gate[index].abs() + 4.0) * 3e-7).abs() + 1e-36;
    check_rounded(&format!("{} elements", gate.len()), element, &found, &expected, allowed)
}

fn every_length_agrees_with_the_formula(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        for (seed, elements) in [1, 2, 7, 8, 9, 1023, 1024, 1031, 4096, 10_001].into_iter().enumerate() {
            let (gate, up) = (random(element, elements, 1, 8.0), random(element, elements, 2, 1.0));
            check_formula(lab, element, seed as u64, &gate, &up)?;
        }
    }
    Ok(())
}

fn gates_of_any_size_agree_with_the_formula(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        for scale in [1e-3, 80.0, 1000.0] {
            let (gate, up) = (random(element, 1000, 1, scale), random(element, 1000, 2, 1.0));
            check_formula(lab, element, 3, &gate, &up)?;
        }
    }
    Ok(())
}

fn an_element_has_the_same_bits_alone_and_among_others(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        let (gate, up) = (random(element, 2053, 1, 8.0), random(element, 2053, 2, 1.0));
        let together = run(lab, element, 1, &gate, &up)?;
        for first in [0, 3, 1024, 2052] {
            let range = first..first + 1;
            let alone = run(lab, element, 2, &gate[range.clone()], &up[range.clone()])?;
            check_same_bits(&format!("element {first}"), &alone, &together[range])?;
        }
    }
    Ok(())
}

fn whole_vectors_are_moved_sixteen_bytes_at_a_time(lab: &Lab) -> Outcome {
    let element = Element::F16;
    let device = lab.device(element, 1);
    let values = device.upload(&random(element, 4096, 1, 1.0));
    let mut output = device.poisoned(4096);
    let args = Args { gate: &values, up: &values, output: &mut output, elements: 4096 };
    device.cuda.silu_mul(args).map_err(|error| error.to_string())?;
    let report = device.emulator.report();
    let as_expected = report.global_loads == [0, 0, 0, 0, 1024] && report.global_stores == [0, 0, 0, 0, 512];
    check(as_expected, || format!("other accesses than 16 bytes: {report:?}"))?;
    let full =
        report.global_sectors == 3 * 4096 * 2 / 32 && report.global_full_sectors == report.global_sectors;
    check(full, || format!("other sectors than those of the vectors: {report:?}"))
}

#[test]
fn silu_mul_agrees_with_the_formula_for_every_length() -> Outcome {
    every_length_agrees_with_the_formula(&Lab::sound())
}

#[test]
fn silu_mul_agrees_with_the_formula_for_gates_of_any_size() -> Outcome {
    gates_of_any_size_agree_with_the_formula(&Lab::sound())
}

#[test]
fn an_element_of_silu_mul_has_the_same_bits_alone_and_among_others() -> Outcome {
    an_element_has_the_same_bits_alone_and_among_others(&Lab::sound())
}

#[test]
fn silu_mul_moves_whole_vectors_sixteen_bytes_at_a_time() -> Outcome {
    whole_vectors_are_moved_sixteen_bytes_at_a_time(&Lab::sound())
}
