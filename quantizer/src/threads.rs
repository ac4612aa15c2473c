//! The threads of the linear algebra.

use faer::Par;

use crate::error::QuantizeError;

/// A pool of threads, and faer's word for it.
pub(crate) struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// A pool of `threads` threads; 0 counts as 1.
    pub(crate) fn new(threads: usize) -> Result<Self, QuantizeError> {
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map(|pool| Self { pool })
            .map_err(|error| QuantizeError::Threads { threads, problem: error.to_string() })
    }

    /// Runs `work` in the pool; it gets the parallelism to hand to faer.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce(Par) -> R + Send) -> R {
        let threads = self.pool.current_num_threads();
        let par = if threads == 1 { Par::Seq } else { Par::rayon(threads) };
        self.pool.install(|| work(par))
    }
}
