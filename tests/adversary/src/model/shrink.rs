//! Fewer steps that still fail, and a watch over steps that never end.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::step::Step;
use super::{Failure, attempt};

/// How long shrinking may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Leaves out steps while it still goes wrong.
pub(super) fn shrink(seed: u64, failure: Failure) -> Failure {
    let (mut best, end) = (failure, Instant::now() + PATIENCE);
    let mut chunk = best.taken.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < best.taken.len() {
            if Instant::now() > end {
                return best;
            }
            let mut fewer = best.taken.clone();
            fewer.drain(at..(at + chunk).min(fewer.len()));
            match again(seed, fewer) {
                Some(failure) => best = failure,
                None => at += chunk,
            }
        }
        chunk /= 2;
    }
    best
}

fn again(seed: u64, steps: Vec<Step>) -> Option<Failure> {
    let mut steps = steps.into_iter();
    attempt(seed, false, move |_| steps.next()).err()
}

/// Ends the process, with the last step, if there is no news for too long: a hang cannot be caught.
pub(super) struct Watch(Sender<String>);

impl Watch {
    pub(super) fn new(seed: u64, limit: Duration) -> Watch {
        let (tx, rx) = channel::<String>();
        std::thread::spawn(move || {
            let mut last = String::from("the start");
            loop {
                match rx.recv_timeout(limit) {
                    Ok(step) => last = step,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        println!("DISAGREEMENT: sequence {seed}: no end after {limit:?} of: {last}");
                        println!("replay: cargo xtask adversary model --sequence {seed}");
                        std::process::exit(1);
                    }
                }
            }
        });
        Watch(tx)
    }

    pub(super) fn alive(&self, step: &Step) {
        // Its end is the end of the sequence.
        let _ = self.0.send(step.to_string());
    }
}
