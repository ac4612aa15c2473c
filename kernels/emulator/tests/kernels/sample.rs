//! Sampling: the passes over a row, cuts and draws.

use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::sample::cases::{problem, rows};
use nibble_kernels::ops::sample::{self, Args, NoToken, Row, Sample, Sampled};

use crate::lab::{ELEMENTS, Lab, Outcome, Suite, check, random};

pub(crate) const SUITE: Suite = Suite {
    source: sample::cuda::SOURCE,
    cases: &[
        ("rows of all kinds", rows_of_all_kinds_agree_with_the_reference),
        ("logits that are not finite", what_is_not_finite_is_said_of_its_row_alone),
        ("a row alone", a_row_gives_the_same_alone_and_among_others),
    ],
    faults: &[
        fault(
            "the kernel before is not waited for",
            "start_after_previous_kernel();",
            0,
            "let_next_kernel_start();",
        ),
        fault("the bitmap is not cleared", "        words[i] = 0;\n", 0, "        words[i] = words[i];\n"),
        fault(
            "no barrier before values are marked",
            "words[i] = 0;\n        }\n        block_barrier();",
            0,
            "words[i] = 0;\n        }",
        ),
        fault(
            "no barrier after values are marked",
            "words[word] = bits;\n        }\n        block_barrier();",
            0,
            "words[word] = bits;\n        }",
        ),
        fault("one adjustment of a word is marked", "j < adjustment_count && ", 0, "j < i + 1 && "),
        fault("the adjustment before", "high - low > 1", 0, "high - low > 2"),
        fault("no penalty below zero", ": value * found.penalty", 0, ": value"),
        fault("the subtrahend is forgotten", "return value - found.subtrahend", 0, "return value"),
        fault(
            "the mask is shifted",
            "(allowed[vector] >> i & 1) == 0",
            0,
            "(allowed[vector] >> (i ^ 1) & 1) == 0",
        ),
        fault("logits past the end", "first + i < vocabulary ? Element", 0, "true ? Element"),
        fault(
            "parts are read before they are there",
            "            parts[warp] = value;\n        }\n        block_barrier();",
            0,
            "            parts[warp] = value;\n        }",
        ),
        fault(
            "parts are overwritten",
            "combine(value, parts[other]);\n        }\n        block_barrier();",
            0,
            "combine(value, parts[other]);\n        }",
        ),
        fault(
            "a warp is forgotten",
            "other = 1; other < WARPS; ++other",
            0,
            "other = 2; other < WARPS; ++other",
        ),
        fault("the last of equals", "static_cast<u32>(~token);", 0, "token;"),
        fault("the largest is not left out", "candidate < before", 0, "candidate <= before"),
        fault(
            "a draw is a token late",
            "before > target && found == NONE",
            0,
            "before > target + amounts[i] && found == NONE",
        ),
        fault("the walk begins with the wrong warp", "sums[owner] <= target", 0, "sums[owner] < target"),
        fault("the walk forgets what it passed", "                    target -= of_all;\n", 0, ""),
        fault("lanes are not added up", "distance < 32; distance *= 2", 0, "distance < 16; distance *= 2"),
        fault(
            "sums of warps are read too early",
            "            sums[warp] = own_sum;\n        }\n        block_barrier();",
            0,
            "            sums[warp] = own_sum;\n        }",
        ),
        fault(
            "what was found is read too early",
            "        block_barrier();\n        const u32 found = static_cast",
            0,
            "        const u32 found = static_cast",
        ),
        fault("values above are forgotten", "                above += equal;\n", 0, ""),
        fault("digits of other values", "(bits >> shift >> 4) == (found >> shift >> 4)", 0, "true"),
        fault(
            "digits are overwritten",
            "            found |= digit << shift;\n            block_barrier();",
            0,
            "            found |= digit << shift;",
        ),
        fault("all equals are kept", "target - above + of_one <= equal", 0, "false"),
        fault("an equal too many", "walk(target - above - 1,", 0, "walk(target - above,"),
        fault("min_p is forgotten", "cut.last = ranked(maximum + request.min_p_distance, NONE);", 0, ""),
        fault("the weaker cut", "by_count.last > cut.last ?", 0, "by_count.last < cut.last ?"),
        fault("top_p of everything", "total = kept_weight(cut);\n        }", 0, "}"),
        fault("a temperature of one", "scale = LOG2_E / request.temperature", 0, "scale = LOG2_E"),
        fault(
            "log probabilities of what was adjusted",
            "u64 best = first_token<true>();",
            0,
            "u64 best = first_token<false>();",
        ),
        fault("a rank too low", "sum(before)) + 1", 0, "sum(before))"),
        fault("the same token again", "best = first_token<true>(best)", 0, "best = first_token<true>()"),
        fault(
            "another row's logits",
            "static_cast<u64>(row) * vocabulary",
            0,
            "static_cast<u64>(row / 2) * vocabulary",
        ),
        fault("another row's adjustments", "adjustments + request.first_adjustment", 0, "adjustments"),
        fault("another row's mask", "masks + request.allowed", 0, "masks"),
        fault("a part of the vocabulary", "(vectors + WARPS - 1) / WARPS", 0, "vectors / WARPS"),
        fault("what is not finite is taken", "if (bits >= POSITIVE_INFINITY", 0, "if (false"),
        fault("a token where there is none", "if (bits <= NEGATIVE_INFINITY) {", 0, "if (false) {"),
    ],
};

const fn fault(
    fault: &'static str,
    pattern: &'static str,
    occurrence: usize,
    replacement: &'static str,
) -> Mutation {
    Mutation { source: sample::cuda::SOURCE.name, fault, pattern, occurrence, replacement }
}

type Found = Vec<Result<Sampled, NoToken>>;

fn sample_on(
    lab: &Lab,
    element: Element,
    logits: &[f32],
    vocabulary: usize,
    rows: &[Row],
) -> Result<Found, String> {
    let device = lab.device(element, rows.len() as u64);
    let logits = device.upload(logits);
    let args = Args { logits: &logits, vocabulary, rows };
    device.cuda.sample(args).map_err(|error| error.to_string())
}

fn agree(logits: &[f32], vocabulary: usize, rows: &[Row], found: &Found) -> Outcome {
    for (index, ((row, found), logits)) in
        rows.iter().zip(found).zip(logits.chunks_exact(vocabulary)).enumerate()
    {
        let problem = problem(logits, row, found);
        check(problem.is_none(), || format!("row {index} of {vocabulary}: {}", problem.unwrap_or_default()))?;
    }
    Ok(())
}

fn rows_of_all_kinds_agree_with_the_reference(lab: &Lab) -> Outcome {
    for (element, vocabulary) in
        [(Element::F16, 1500), (Element::BF16, 1003), (Element::F16, 40), (Element::F16, 8200)]
    {
        let rows = rows(vocabulary);
        // Of few distinct values, so that many are equal; and of many.
        for equals in [true, false] {
            let logits = random(element, rows.len() * vocabulary, 7, 9.0);
            let logits: Vec<f32> =
                logits.iter().map(|logit| if equals { logit.round() } else { *logit }).collect();
            agree(&logits, vocabulary, &rows, &sample_on(lab, element, &logits, vocabulary, &rows)?)?;
        }
    }
    Ok(())
}

fn what_is_not_finite_is_said_of_its_row_alone(lab: &Lab) -> Outcome {
    let vocabulary = 300;
    // The last one asks for no log probabilities, which would find it as well.
    let rows = &rows(vocabulary)[..5];
    for wrong in [f32::NAN, f32::INFINITY] {
        let mut logits = random(Element::F16, rows.len() * vocabulary, 7, 9.0);
        logits[4 * vocabulary + 299] = wrong;
        let found = sample_on(lab, Element::F16, &logits, vocabulary, rows)?;
        check(found[4] == Err(NoToken::NotFinite), || format!("{wrong}: {:?}", found[4]))?;
        agree(&logits[..4 * vocabulary], vocabulary, &rows[..4], &found[..4].to_vec())?;
    }
    Ok(())
}

fn a_row_gives_the_same_alone_and_among_others(lab: &Lab) -> Outcome {
    for element in ELEMENTS {
        let vocabulary = 1000;
        let rows = rows(vocabulary);
        let logits = random(element, rows.len() * vocabulary, 5, 4.0);
        let together = sample_on(lab, element, &logits, vocabulary, &rows)?;
        for (index, logits) in logits.chunks_exact(vocabulary).enumerate() {
            let alone = sample_on(lab, element, logits, vocabulary, &rows[index..=index])?;
            check(alone[0] == together[index], || {
                format!("row {index}: {:?} alone, {:?} among others", alone[0], together[index])
            })?;
        }
    }
    Ok(())
}

#[test]
fn rows_of_all_kinds_of_sample_agree_with_the_reference() -> Outcome {
    rows_of_all_kinds_agree_with_the_reference(&Lab::sound())
}

#[test]
fn sample_says_of_a_row_alone_what_is_not_finite() -> Outcome {
    what_is_not_finite_is_said_of_its_row_alone(&Lab::sound())
}

#[test]
fn a_row_of_sample_gives_the_same_alone_and_among_others() -> Outcome {
    a_row_gives_the_same_alone_and_among_others(&Lab::sound())
}
