//! Sampling on a CUDA device: one launch for as many rows as their requests fit the workspace, a block a row.

use super::{Adjustment, Args, Choice, Logprobs, MOST_TOP, NoToken, Row, Sample, Sampled, Wanted};
use crate::device::cuda::driver::{Address, Argument, Launch, Source};
use crate::device::cuda::{Cuda, CudaBuffer, WORKSPACE_BYTES};
use crate::error::KernelError;
use crate::ops::{entry_point, word};

/// The kernels.
pub const SOURCE: Source = Source { name: NAME, variant: "", text: include_str!("kernel.cu") };

const NAME: &str = "sample";
const THREADS: u32 = 512;
/// Bytes of the sums in shared memory: sixteen of eight bytes for each warp.
const SUM_BYTES: usize = 16 * (THREADS as usize / 32) * 8;
/// What stands for no token and no mask.
const NONE: u32 = u32::MAX;
/// Words of the kernel's structures.
const REQUEST_WORDS: usize = 12;
const ADJUSTMENT_WORDS: usize = 4;
const RESULT_WORDS: usize = 4 + 2 * MOST_TOP;
/// Words of the results before the most likely tokens, and those of the tokens.
const FIRST_TOP: usize = 4;

impl Sample<CudaBuffer> for Cuda {
    fn sample(&self, args: Args<'_, CudaBuffer>) -> Result<Vec<Result<Sampled, NoToken>>, KernelError> {
        args.check()?;
        let mut sampled = Vec::with_capacity(args.rows.len());
        let mut rest = args.rows;
        while !rest.is_empty() {
            let fits =
                |count: usize| words(&rest[..count], args.vocabulary) * size_of::<u32>() <= WORKSPACE_BYTES;
            let mut count = rest.len();
            while count > 1 && !fits(count) {
                count /= 2;
            }
            let logits = (sampled.len() * args.vocabulary * self.element().bytes()) as Address;
            sampled.extend(self.sample_rows(
                args.logits.address() + logits,
                args.vocabulary,
                &rest[..count],
            )?);
            rest = &rest[count..];
        }
        Ok(sampled)
    }
}

impl Cuda {
    fn sample_rows(
        &self,
        logits: Address,
        vocabulary: usize,
        rows: &[Row],
    ) -> Result<Vec<Result<Sampled, NoToken>>, KernelError> {
        let requests = Requests::new(rows);
        let results_start = requests.words.len().next_multiple_of(4);
        let total = results_start + rows.len() * RESULT_WORDS;
        let workspace = self.workspace(total * size_of::<u32>())?;
        self.driver().write(bytemuck::cast_slice(&requests.words), workspace)?;
        let at = |words: usize| workspace + (words * size_of::<u32>()) as Address;
        self.submit(&Launch {
            source: SOURCE,
            kernel: entry_point(self.element(), ["sample_f16", "sample_bf16"]),
            grid: [word(NAME, "rows", rows.len())?, 1, 1],
            block: THREADS,
            shared_bytes: word(NAME, "vocabulary", SUM_BYTES + vocabulary.div_ceil(32) * 4)?,
            arguments: [
                Argument::Address(logits),
                Argument::Address(at(0)),
                Argument::Address(at(requests.adjustments)),
                Argument::Address(at(requests.masks)),
                Argument::Address(at(results_start)),
                Argument::U32(word(NAME, "vocabulary", vocabulary)?),
            ]
            .into_iter()
            .collect(),
        })?;
        let mut results = vec![0u32; rows.len() * RESULT_WORDS];
        self.driver().read(at(results_start), bytemuck::cast_slice_mut(&mut results))?;
        Ok(rows
            .iter()
            .zip(results.chunks_exact(RESULT_WORDS))
            .map(|(row, words)| result(row, words))
            .collect())
    }
}

/// Words that the requests of `rows` and their results take at most.
fn words(rows: &[Row], vocabulary: usize) -> usize {
    let of_row = |row: &Row| match &row.wanted {
        Wanted::Known(_) => 0,
        Wanted::Choice(choice) => {
            let mask = if choice.allowed.is_some() { vocabulary.div_ceil(32) } else { 0 };
            choice.adjustments.len() * ADJUSTMENT_WORDS + mask
        }
    };
    4 + rows.iter().map(|row| REQUEST_WORDS + RESULT_WORDS + of_row(row)).sum::<usize>()
}

/// Requests as the kernel reads them: all rows', then all adjustments, then all masks.
struct Requests {
    words: Vec<u32>,
    /// Where adjustments and masks begin.
    adjustments: usize,
    masks: usize,
}

impl Requests {
    fn new(rows: &[Row]) -> Self {
        let mut words = Vec::with_capacity(rows.len() * REQUEST_WORDS);
        let (mut adjustments, mut masks) = (Vec::new(), Vec::new());
        for row in rows {
            let top = row.logprobs.map_or(0, |top| top as u32 + 1);
            let Wanted::Choice(choice) = &row.wanted else {
                let token = if let Wanted::Known(token) = row.wanted { token } else { NONE };
                words.extend([token, 0, 0, 0, 0, 0, 0, 0, 0, 0, NONE, top]);
                continue;
            };
            let first_adjustment = (adjustments.len() / ADJUSTMENT_WORDS) as u32;
            adjustments.extend(choice.adjustments.iter().flat_map(adjustment_words));
            let mask = if choice.allowed.is_some() { masks.len() as u32 } else { NONE };
            masks.extend_from_slice(choice.allowed.as_deref().unwrap_or(&[]));
            words.extend(choice_words(choice));
            words.extend([first_adjustment, choice.adjustments.len() as u32, mask, top]);
        }
        let first_adjustment = words.len();
        words.append(&mut adjustments);
        let first_mask = words.len();
        words.append(&mut masks);
        Self { words, adjustments: first_adjustment, masks: first_mask }
    }
}

/// The first words of a request.
fn choice_words(choice: &Choice) -> [u32; 8] {
    // Below 2^-30 a temperature makes no difference but could overflow.
    let temperature = if choice.temperature > 0.0 { choice.temperature.max(1e-9) } else { 0.0 };
    let distance = if choice.min_p > 0.0 { temperature * choice.min_p.ln() } else { f32::NEG_INFINITY };
    let [top_p, uniform] = [f64::from(choice.top_p), choice.uniform].map(fraction);
    let top_p = if choice.top_p < 1.0 { top_p } else { u64::MAX };
    [
        NONE,
        temperature.to_bits(),
        choice.top_k.map_or(0, |top_k| u32::try_from(top_k).unwrap_or(0)),
        distance.to_bits(),
        top_p as u32,
        (top_p >> 32) as u32,
        uniform as u32,
        (uniform >> 32) as u32,
    ]
}

/// A number in `[0, 1)` in units of 2^-64.
fn fraction(value: f64) -> u64 {
    (value * 2f64.powi(64)) as u64
}

fn adjustment_words(adjustment: &Adjustment) -> [u32; ADJUSTMENT_WORDS] {
    let Adjustment { token_id, bias, penalty, subtrahend } = *adjustment;
    [token_id, bias.to_bits(), penalty.to_bits(), subtrahend.to_bits()]
}

fn result(row: &Row, words: &[u32]) -> Result<Sampled, NoToken> {
    let top = row.logprobs.unwrap_or(0);
    let (tokens, logprobs) = (&words[FIRST_TOP..][..top], &words[FIRST_TOP + MOST_TOP..][..top]);
    let is_adjusted = matches!(&row.wanted, Wanted::Choice(choice) if changes(choice));
    match words[0] {
        0 => Ok(Sampled {
            token_id: words[1],
            logprobs: row.logprobs.map(|_| Logprobs {
                logprob: f32::from_bits(words[2]),
                rank: words[3] as usize,
                top: tokens
                    .iter()
                    .zip(logprobs)
                    .map(|(&token, &bits)| (token, f32::from_bits(bits)))
                    .collect(),
            }),
        }),
        2 if is_adjusted => Err(NoToken::NothingLeft),
        _ => Err(NoToken::NotFinite),
    }
}

fn changes(choice: &Choice) -> bool {
    choice.allowed.is_some() || !choice.adjustments.is_empty()
}
