//! A pool that hands out the tasks of one operation and waits for all of them.
//!
//! A decode step is some hundred operations of a few microseconds each. A worker therefore spins for a while before it
//! sleeps, and one that comes late is not waited for: the caller goes on as soon as all tasks are done. Each thread begins
//! with a share of its own, the same part of the tasks in every job, because what it wrote in the last operation still lies
//! in its cache; it takes its tasks in runs of neighbours, long ones first, and then helps the others from the end of
//! theirs. Which thread runs a task never changes what the task computes.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker polls for the next job before it goes to sleep: longer than what lies between two operations of a
/// step.
const SPIN_TIME: Duration = Duration::from_micros(200);
/// Polls between two looks at the clock.
const SPINS_PER_LOOK: usize = 64;
/// Polls before the caller yields its processor to a worker that may be waiting for it.
const SPINS_BEFORE_YIELD: usize = 2000;

/// `Shared::state` counts jobs in the bits from here on.
const JOB: usize = 1 << 16;
/// The bit of `Shared::state` that says whether workers may still join the job; those inside are counted below it.
const OPEN: usize = 1 << 15;
/// `Shared::state` of a pool that ends.
const STOP: usize = usize::MAX;

/// A task body whose borrow was forgotten: see the SAFETY lines for why no one uses it too late.
type Body = dyn Fn(usize) + Sync + 'static;

#[derive(Clone, Copy)]
struct Job {
    /// The borrowed body of the current [`ThreadPool::run`], which outlives every use by workers.
    body: *const Body,
    /// Tasks that are taken as one, so that their number fits a [`Share`].
    tasks_of_unit: usize,
    tasks: usize,
}

/// Units of the current job that nobody took yet: the first one in the low half, the end in the high half.
struct Share(Apart<AtomicU64>);

impl Share {
    fn new() -> Self {
        Self(Apart(AtomicU64::new(0)))
    }

    fn set(&self, units: Range<u64>) {
        self.0.0.store(units.start | units.end << 32, Ordering::Relaxed);
    }

    /// Takes half of what is left, from the front or from the back.
    fn take(&self, from_front: bool) -> Option<Range<u64>> {
        loop {
            let units = self.0.0.load(Ordering::Relaxed);
            let (first, end) = (units & u64::from(u32::MAX), units >> 32);
            let count = (end - first).div_ceil(2);
            if count == 0 {
                return None;
            }
            let (taken, left) = if from_front {
                (first..first + count, first + count..end)
            } else {
                (end - count..end, first..end - count)
            };
            let left = left.start | left.end << 32;
            if self.0.0.compare_exchange_weak(units, left, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Some(taken);
            }
        }
    }
}

/// A value in cache lines of its own (processors fetch lines in pairs).
#[repr(align(128))]
struct Apart<T>(T);

struct Shared {
    /// The number of the job, whether it is open, and the workers inside.
    state: Apart<AtomicUsize>,
    /// One for each thread; the caller's is the first.
    shares: Box<[Share]>,
    /// Written by the caller while no worker is inside, read by workers that are.
    job: UnsafeCell<Job>,
    panicked: AtomicBool,
    sleepers: Apart<AtomicUsize>,
    wake: Condvar,
    wake_lock: Mutex<()>,
}

// SAFETY: `job` is written only while the last job is closed and no worker is inside, and read only by workers that went
// inside; its body is `Sync` and alive until they have left.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Threads that run the tasks of one operation together with the caller.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    running: Mutex<()>,
}

fn idle(_: usize) {}

impl ThreadPool {
    /// A pool of `threads` threads, the caller of [`ThreadPool::run`] included; 0 counts as 1.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: Apart(AtomicUsize::new(0)),
            shares: (0..threads.clamp(1, OPEN)).map(|_| Share::new()).collect(),
            job: UnsafeCell::new(Job { body: &idle, tasks_of_unit: 1, tasks: 0 }),
            panicked: AtomicBool::new(false),
            sleepers: Apart(AtomicUsize::new(0)),
            wake: Condvar::new(),
            wake_lock: Mutex::new(()),
        });
        let workers = (1..threads.min(OPEN))
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("nibble-cpu-{index}"))
                    .spawn(move || work(&shared, index))
                    .ok()
            })
            .collect();
        Self { shared, workers, running: Mutex::new(()) }
    }

    /// Threads that share the work, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task)` once for each task below `tasks`, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// When a task panicked.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(body);
            return;
        }
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is forgotten. This function does not return before the job is closed and every
        // worker has left it, also when a task panics.
        let body = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Body>(body) };
        let job = Job { body, tasks_of_unit: tasks.div_ceil(u32::MAX as usize), tasks };
        // SAFETY: the last job is closed and no worker is inside, so none reads it.
        unsafe { *shared.job.get() = job };
        let (units, threads) = (tasks.div_ceil(job.tasks_of_unit), shared.shares.len());
        for (index, share) in shared.shares.iter().enumerate() {
            let bound = |index: usize| (units * index / threads) as u64;
            share.set(bound(index)..bound(index + 1));
        }
        let number = (shared.state.0.load(Ordering::Relaxed) & !(JOB - 1)).wrapping_add(JOB);
        shared.state.0.store(number | OPEN, Ordering::SeqCst);
        if shared.sleepers.0.load(Ordering::SeqCst) > 0 {
            let _guard = shared.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, job, 0)));
        shared.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.state.0.load(Ordering::Acquire) != number {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a task of a CPU operation panicked");
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.0.store(STOP, Ordering::SeqCst);
        {
            let _guard = self.shared.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so it has nothing to report here.
            drop(worker.join());
        }
    }
}

/// Runs tasks of `job` as long as there are any, those of share `own` first.
fn take_tasks(shared: &Shared, job: Job, own: usize) {
    let shares = &shared.shares;
    // SAFETY: the caller of `run` is inside it, and a worker that went inside the job keeps it there.
    let body = unsafe { &*job.body };
    let run = |units: Range<u64>| {
        let [first, end] = [units.start, units.end].map(|unit| unit as usize * job.tasks_of_unit);
        (first..end.min(job.tasks)).for_each(body);
    };
    while let Some(units) = shares[own].take(true) {
        run(units);
    }
    let others = || (1..shares.len()).map(|offset| &shares[(own + offset) % shares.len()]);
    while let Some(units) = others().find_map(|share| share.take(false)) {
        run(units);
    }
}

fn work(shared: &Shared, own: usize) {
    let mut seen = 0;
    loop {
        let state = next_job(shared, seen);
        if state == STOP {
            return;
        }
        let number = state & !(JOB - 1);
        if state & OPEN == 0 {
            seen = number;
            continue;
        }
        let inside = shared.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        if inside.is_err() {
            // It was closed, or another worker went inside first: look again.
            continue;
        }
        seen = number;
        // SAFETY: the job is not written before this worker has left it.
        let job = unsafe { *shared.job.get() };
        if catch_unwind(AssertUnwindSafe(|| take_tasks(shared, job, own))).is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.state.0.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until the job's number differs from `seen`, first spinning, then asleep, and returns the state.
fn next_job(shared: &Shared, seen: usize) -> usize {
    let new = || {
        let state = shared.state.0.load(Ordering::SeqCst);
        (state & !(JOB - 1) != seen).then_some(state)
    };
    let started = Instant::now();
    while started.elapsed() < SPIN_TIME {
        for _ in 0..SPINS_PER_LOOK {
            if let Some(state) = new() {
                return state;
            }
            std::hint::spin_loop();
        }
    }
    let mut guard = shared.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
    shared.sleepers.0.fetch_add(1, Ordering::SeqCst);
    let state = loop {
        if let Some(state) = new() {
            break state;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    };
    shared.sleepers.0.fetch_sub(1, Ordering::SeqCst);
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once_over_many_jobs() {
        let pool = ThreadPool::new(3);
        for job in 0..300 {
            let tasks = job % 17;
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            if job % 50 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = ThreadPool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|task| assert_ne!(task, 40, "task 40"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(64, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 64);
    }
}
