//! From a row of logits to a token: on the host, or as a request to a device that samples itself.

mod distribution;
mod exponential;
pub(crate) mod on_device;
mod parameters;
pub(crate) mod random;
mod sampler;
#[cfg(test)]
mod tests;

pub(crate) use parameters::in_vocabulary;
pub use parameters::{InvalidParameter, SamplingParameters, TokenLogprob, TokenLogprobs};
use sampler::Scratch;
pub(crate) use sampler::{LogitRow, NextToken, SamplingError, SamplingRow};

/// Logits for which it pays to start one more thread: sampling from them takes about a millisecond, starting a
/// thread some tens of microseconds.
const LOGITS_PER_THREAD: usize = 1 << 20;

/// Samples the rows of a step. Each row is a pure function of itself, so that how they are shared among
/// threads changes nothing.
pub(crate) struct Sampler {
    /// One for each thread.
    scratches: Vec<Scratch>,
}

impl Sampler {
    /// A sampler of up to `threads` threads, at least one.
    pub(crate) fn new(threads: usize) -> Self {
        Self { scratches: (0..threads.max(1)).map(|_| Scratch::default()).collect() }
    }

    /// The token that follows each row, in the order of the rows.
    pub(crate) fn sample(&mut self, rows: &[LogitRow<'_>]) -> Vec<Result<NextToken, SamplingError>> {
        let logits = rows.iter().map(|row| row.logits().len()).sum::<usize>();
        let threads = (logits / LOGITS_PER_THREAD).clamp(1, self.scratches.len());
        let share = rows.len().div_ceil(threads).max(1);
        let sample_share = |(rows, scratch): (&[LogitRow<'_>], &mut Scratch)| {
            rows.iter().map(|row| scratch.run(row)).collect::<Vec<_>>()
        };
        let mut shares = rows.chunks(share).zip(&mut self.scratches);
        let Some(own) = shares.next() else { return Vec::new() };
        std::thread::scope(|scope| {
            let others: Vec<_> = shares.map(|share| scope.spawn(move || sample_share(share))).collect();
            let mut sampled = sample_share(own);
            for other in others {
                sampled.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            sampled
        })
    }
}
