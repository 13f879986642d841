//! The good client: 4 KiB random reads and writes, eight at a time, and how long each takes.
//!
//! Invariant: what it reads is what it wrote; otherwise the run has failed, however fast it was.
//!
//! ```text
//! time  │ quiet │ attack │ quiet │ attack │ …      windows of 200 ms, each with a p99; those across a change are left out
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use ringblock_tests::Rng;
use ringblock_tests::nbd::{self, Nbd};

use super::attacks::FREE;
use super::wire::{Address, Stream};

/// Nobody else is there.
pub(super) const QUIET: u8 = 0;
/// Attackers are.
pub(super) const ATTACK: u8 = 1;
/// Neither: what is measured now does not count.
pub(super) const BETWEEN: u8 = 2;
/// The end.
pub(super) const STOP: u8 = 3;

const DEPTH: usize = 8;
const BLOCK: u64 = 4096;
const WINDOW: Duration = Duration::from_millis(200);

/// The p99 of every window, in microseconds, by what went on.
#[derive(Default)]
pub(super) struct Latencies {
    pub(super) quiet: Vec<u32>,
    pub(super) attack: Vec<u32>,
    pub(super) requests: u64,
}

/// The middle of some values; 0 of none.
pub(super) fn median(values: &[u32]) -> u32 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// What is in flight: when it was sent, the block, and the stamp if it writes.
type Flying = HashMap<u64, (Instant, u64, Option<u64>)>;

/// Works until it is stopped.
pub(super) fn run(to: &Address, phase: &AtomicU8) -> Result<Latencies, String> {
    work(to, phase).map_err(|e| format!("the good client: {e}"))
}

fn work(to: &Address, phase: &AtomicU8) -> std::io::Result<Latencies> {
    let mut nbd = Nbd::over(to.connect()?, "d")?;
    let (mut rng, mut flying, mut known) = (Rng::new(5), Flying::new(), HashMap::<u64, u64>::new());
    let (mut out, mut took, mut stamp) = (Latencies::default(), Vec::<u32>::new(), 0);
    let (mut began, mut now) = (Instant::now(), phase.load(Ordering::Acquire));
    while now != STOP {
        while flying.len() < DEPTH {
            stamp += 1;
            submit(&mut nbd, &mut rng, &mut flying, stamp)?;
        }
        took.push(reply(&mut nbd, &mut flying, &mut known)?);
        out.requests += 1;
        let then = phase.load(Ordering::Acquire);
        if then != now || began.elapsed() >= WINDOW {
            if then == now && took.len() >= 100 {
                took.sort_unstable();
                let p99 = took[took.len() * 99 / 100];
                match now {
                    QUIET => out.quiet.push(p99),
                    ATTACK => out.attack.push(p99),
                    _ => {}
                }
            }
            took.clear();
            (began, now) = (Instant::now(), then);
        }
    }
    while !flying.is_empty() {
        reply(&mut nbd, &mut flying, &mut known)?;
    }
    nbd.close();
    Ok(out)
}

/// Sends a read or a write of a block that nothing is in flight for.
fn submit(nbd: &mut Nbd<Stream>, rng: &mut Rng, flying: &mut Flying, stamp: u64) -> std::io::Result<()> {
    let block = loop {
        let block = rng.below(FREE / BLOCK);
        if !flying.values().any(|f| f.1 == block) {
            break block;
        }
    };
    let sent = Instant::now();
    let (cookie, written) = if rng.chance(50) {
        let data = stamp.to_be_bytes().repeat(BLOCK as usize / 8);
        (nbd.submit(nbd::WRITE, 0, block * BLOCK, BLOCK as u32, &data)?, Some(stamp))
    } else {
        (nbd.submit(nbd::READ, 0, block * BLOCK, BLOCK as u32, &[])?, None)
    };
    flying.insert(cookie, (sent, block, written));
    Ok(())
}

/// Takes a reply; gives the microseconds it took.
fn reply(nbd: &mut Nbd<Stream>, flying: &mut Flying, known: &mut HashMap<u64, u64>) -> std::io::Result<u32> {
    let (cookie, error) = nbd.reply()?;
    let wrong = |what: String| std::io::Error::other(what);
    let (sent, block, written) =
        flying.remove(&cookie).ok_or_else(|| wrong(format!("no request {cookie}")))?;
    if error != 0 {
        return Err(wrong(format!("block {block}: error {error}")));
    }
    match written {
        Some(stamp) => drop(known.insert(block, stamp)),
        None => {
            let mut data = vec![0; BLOCK as usize];
            nbd.payload(&mut data)?;
            let stamp = known.get(&block).copied().unwrap_or(0).to_be_bytes();
            if data.chunks_exact(8).any(|c| c != stamp) {
                return Err(wrong(format!("block {block} is not what was written to it")));
            }
        }
    }
    Ok(u32::try_from(sent.elapsed().as_micros()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the middle is the middle. Method: few values, none.
    #[test]
    fn middle() {
        assert_eq!((median(&[9, 1, 5]), median(&[])), (5, 0));
    }
}
