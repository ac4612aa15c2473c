//! The lookup.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::ops::embedding::{self, Args, Embedding};

use crate::lab::{ELEMENTS, Lab, Outcome, Suite, check_same_bits, random, random_words};

pub(crate) const SUITE: Suite = Suite {
    source: embedding::cuda::SOURCE,
    cases: &[("rows come out in the order of the tokens", rows_come_out_in_the_order_of_the_tokens)],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("the next token", "token_ids[row]", 0, "token_ids[row + 1]"),
        fault(
            "the next row of the table",
            "static_cast<u64>(token_ids[row])",
            0,
            "static_cast<u64>(token_ids[row] + 1)",
        ),
        fault("threads past the end", "    if (first >= hidden) return;\n", 0, ""),
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
    Mutation { source: embedding::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

fn rows_come_out_in_the_order_of_the_tokens(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        for (seed, (vocabulary, hidden, rows)) in
            [(1, 8, 1), (50, 64, 3), (70, 1024, 65), (9, 1032, 7), (40, 4096, 2)].into_iter().enumerate()
        {
            let device = lab.device(element, seed as u64);
            let values = random(element, vocabulary * hidden, 1, 1.0);
            let mut token_ids = random_words(rows, 2, vocabulary as u32);
            token_ids[0] = vocabulary as u32 - 1;
            let mut output = device.poisoned(rows * hidden);
            let args = Args {
                token_ids: &device.words(&token_ids),
                table: &device.matrix(vocabulary, hidden, &values),
                output: &mut output,
                rows,
            };
            device.cuda.embedding(args).map_err(|error| error.to_string())?;
            let expected: Vec<&[f32]> =
                token_ids.iter().map(|&token| &values[token as usize * hidden..][..hidden]).collect();
            check_same_bits(
                &format!("{rows} rows of {hidden}"),
                &device.download(&output),
                &expected.concat(),
            )?;
        }
    }
    Ok(())
}

#[test]
fn rows_of_embedding_come_out_in_the_order_of_the_tokens() -> Outcome {
    rows_come_out_in_the_order_of_the_tokens(&Lab::sound())
}
