//! A pool that hands out the tasks of one operation and waits for all of them.
//!
//! A decode step is some hundred operations of a few microseconds each, so a worker spins for a while
//! before it sleeps. Which thread runs a task never changes what the task computes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Polls before a worker goes to sleep, roughly 100 microseconds.
const SPINS_BEFORE_SLEEP: usize = 2000;
/// Polls before the caller yields its processor to a worker that may be waiting for it.
const SPINS_BEFORE_YIELD: usize = 2000;

/// A task body whose borrow was forgotten: see the SAFETY lines for why no one uses it too late.
type Body = dyn Fn(usize) + Sync + 'static;

struct Job {
    /// The borrowed body of the current [`ThreadPool::run`], which outlives every use by workers.
    body: *const Body,
    tasks: usize,
}

struct Shared {
    /// Counts jobs; a change tells workers that `job` is new. `usize::MAX` says stop.
    epoch: AtomicUsize,
    job: Mutex<Job>,
    next_task: AtomicUsize,
    workers_busy: AtomicUsize,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    wake: Condvar,
    wake_lock: Mutex<()>,
}

// SAFETY: `Job::body` is only dereferenced between the epoch change that publishes it and the end of the
// `run` that owns the borrow; the body is `Sync`.
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
            epoch: AtomicUsize::new(0),
            job: Mutex::new(Job { body: &idle, tasks: 0 }),
            next_task: AtomicUsize::new(0),
            workers_busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
            wake_lock: Mutex::new(()),
        });
        let workers = (1..threads)
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("nibble-cpu-{index}"))
                    .spawn(move || work(&shared))
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
        {
            let mut job = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: only the lifetime is forgotten. This function does not return before every worker
            // has left the body (`workers_busy` is 0), also when a task panics.
            let body = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Body>(body) };
            *job = Job { body, tasks };
        }
        shared.next_task.store(0, Ordering::Relaxed);
        shared.workers_busy.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| take_tasks(shared, body, tasks)));
        let mut spins = 0;
        while shared.workers_busy.load(Ordering::Acquire) > 0 {
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
        self.shared.epoch.store(usize::MAX, Ordering::SeqCst);
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

fn take_tasks(shared: &Shared, body: &(dyn Fn(usize) + Sync), tasks: usize) {
    loop {
        let task = shared.next_task.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        body(task);
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        seen = next_epoch(shared, seen);
        if seen == usize::MAX {
            return;
        }
        let (body, tasks) = {
            let job = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            (job.body, job.tasks)
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: `run` keeps the body alive until `workers_busy` is 0, which this thread still counts in.
            take_tasks(shared, unsafe { &*body }, tasks);
        }));
        if outcome.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.workers_busy.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until the epoch differs from `seen`: first spinning, then asleep.
fn next_epoch(shared: &Shared, seen: usize) -> usize {
    for _ in 0..SPINS_BEFORE_SLEEP {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            return epoch;
        }
        std::hint::spin_loop();
    }
    let mut guard = shared.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    let epoch = loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            break epoch;
        }
        guard = shared.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
    };
    shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    epoch
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
                std::thread::sleep(std::time::Duration::from_millis(2));
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
