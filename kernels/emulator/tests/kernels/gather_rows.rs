//! The selection.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::ops::gather_rows::{self, Args, GatherRows};

use crate::lab::{ELEMENTS, Lab, Outcome, Suite, check_same_bits, random, random_words};

pub(crate) const SUITE: Suite = Suite {
    source: gather_rows::cuda::SOURCE,
    cases: &[("rows come out in the order asked for", rows_come_out_in_the_order_asked_for)],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("the next number", "rows[row]", 0, "rows[row + 1]"),
        fault(
            "the next row of the input",
            "static_cast<u64>(rows[row])",
            0,
            "static_cast<u64>(rows[row] + 1)",
        ),
        fault("threads past the end", "    if (first >= width) return;\n", 0, ""),
        fault("the first part of a row for all", "block_index_y() * THREADS", 0, "0 * THREADS"),
        fault(
            "the next row of the output",
            "output + static_cast<u64>(row)",
            0,
            "output + static_cast<u64>(row + 1)",
        ),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: gather_rows::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

fn rows_come_out_in_the_order_asked_for(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        for (seed, (input_rows, width, count)) in
            [(1, 8, 1), (50, 64, 3), (70, 1024, 65), (9, 1032, 7), (40, 4096, 2)].into_iter().enumerate()
        {
            let device = lab.device(element, seed as u64);
            let values = random(element, input_rows * width, 1, 1.0);
            let mut rows = random_words(count, 2, input_rows as u32);
            rows[0] = input_rows as u32 - 1;
            let mut output = device.poisoned(count * width);
            let args = Args {
                input: &device.upload(&values),
                rows: &device.words(&rows),
                output: &mut output,
                count,
                width,
            };
            device.cuda.gather_rows(args).map_err(|error| error.to_string())?;
            let expected: Vec<&[f32]> =
                rows.iter().map(|&row| &values[row as usize * width..][..width]).collect();
            check_same_bits(
                &format!("{count} rows of {width}"),
                &device.download(&output),
                &expected.concat(),
            )?;
        }
    }
    Ok(())
}

#[test]
fn rows_of_gather_rows_come_out_in_the_order_asked_for() -> Outcome {
    rows_come_out_in_the_order_asked_for(&Lab::sound())
}
