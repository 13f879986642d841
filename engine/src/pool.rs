//! A small thread pool for what cannot be asynchronous: opening files, ioctls, SEEK_HOLE, compression.
//!
//! Threads are started on demand up to a bound and leave after some idle time; the queue is bounded by what cores have in
//! flight, since every job has a task that waits for it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// Idle threads leave after this time.
const LINGER: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// Where blocking jobs run.
pub(crate) struct Pool {
    inner: Option<Arc<(Mutex<State>, Condvar)>>,
    max: usize,
}

impl Pool {
    /// A pool of up to `max` threads.
    pub(crate) fn new(max: usize) -> Pool {
        Pool { inner: Some(Arc::default()), max: max.max(1) }
    }

    /// A pool that runs every job at once on the caller: for the simulator, where time stands still meanwhile.
    pub(crate) fn inline() -> Pool {
        Pool { inner: None, max: 0 }
    }

    pub(crate) fn run(&self, job: Job) {
        let Some(inner) = &self.inner else {
            job();
            return;
        };
        let mut state = inner.0.lock().unwrap_or_else(|e| e.into_inner());
        state.queue.push_back(job);
        if state.idle > 0 {
            inner.1.notify_one();
        } else if state.threads < self.max {
            state.threads += 1;
            let shared = inner.clone();
            let started = std::thread::Builder::new().name("rb-blocking".into()).spawn(move || work(&shared));
            if started.is_err() {
                state.threads -= 1;
                if state.threads == 0
                    && let Some(job) = state.queue.pop_back()
                {
                    drop(state);
                    job();
                }
            }
        }
    }
}

fn work(shared: &(Mutex<State>, Condvar)) {
    let mut state = shared.0.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            // whoever waits for a job that panics sees its channel closed; the thread lives on
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            state = shared.0.lock().unwrap_or_else(|e| e.into_inner());
            continue;
        }
        state.idle += 1;
        let (back, timeout) = shared.1.wait_timeout(state, LINGER).unwrap_or_else(|e| e.into_inner());
        state = back;
        state.idle -= 1;
        if timeout.timed_out() && state.queue.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}
