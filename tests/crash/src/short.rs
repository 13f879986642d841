//! Every short sequence: twelve kinds of requests at four places, one after another, on an image with tiny tables.
//!
//! ```text
//!   places: a cluster │ the next cluster │ the next L2 table │ the one after, with counters near the end of their block
//!   sequence n: one request (48), two (2,304), three (110,592), on an empty image and on one that is full at these places
//! ```

use ringblock_engine::driver::Flags;
use ringblock_engine::error::Errno;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{SECTOR, lock};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

use crate::cases::{Case, attach, cases};
use crate::record::Tape;
use crate::work::{finish, flush};

/// Kinds of requests.
const KINDS: u32 = 12;
/// Requests at places.
const ONE: u32 = KINDS * 4;
/// Sequences of one and of two requests, on two images.
pub const COUNT: u32 = 2 * (ONE + ONE * ONE);
/// The same, and sequences of three.
pub const ALL: u32 = COUNT + 2 * ONE * ONE * ONE;
/// Guest clusters of the places.
const PLACES: [u64; 4] = [1, 2, 64, 128];

/// The image.
pub fn case() -> Case {
    let mut case = cases().into_iter().find(|c| c.name == "512").expect("the case");
    case.name = "short";
    case.options.size = 70 << 10;
    case
}

/// The requests of sequence `n`, and whether the image is full at the places. Numbers from [`COUNT`] on are sequences of
/// three.
fn sequence(n: u32) -> (Vec<u32>, bool) {
    let (full, n) = (n % 2 == 1, n / 2);
    let list = match n {
        _ if n < ONE => vec![n],
        _ if n < ONE + ONE * ONE => vec![(n - ONE) / ONE, (n - ONE) % ONE],
        _ => {
            let n = n - ONE - ONE * ONE;
            vec![n / ONE / ONE % ONE, n / ONE % ONE, n % ONE]
        }
    };
    (list, full)
}

/// Runs sequence `n`.
pub(crate) async fn run(case: Case, tape: Tape, n: u32) {
    let mut root = attach(case.node(false), true).await.expect("the image opens");
    let (list, full) = sequence(n);
    let near_the_end = list.iter().any(|r| r % 4 == 3);
    if full || near_the_end {
        for place in PLACES.iter().filter(|_| full) {
            write(&tape, root, place * 512, 1, Flags::NONE).await;
        }
        if near_the_end {
            // 64 counters to a block: a few are left in the first
            write(&tape, root, 8 * 512, 48, Flags::NONE).await;
        }
        flush(root, &tape).await;
    }
    for request in list {
        root = one(&case, &tape, root, request / 4, PLACES[request as usize % 4] * case.cluster()).await;
    }
    finish(root, &tape).await;
}

/// One request.
async fn one(case: &Case, tape: &Tape, root: Root, kind: u32, at: u64) -> Root {
    let unmap = Flags { may_unmap: true, ..Flags::NONE };
    match kind {
        0 => write(tape, root, at, 1, Flags::NONE).await,
        1 => write(tape, root, at, 3, Flags::NONE).await,
        2 => write(tape, root, at, 1, Flags::FUA).await,
        3 => write(tape, root, at, 2, Flags { compressed: false, ..Flags::FUA }).await,
        4 => write(tape, root, at, 1, Flags { compressed: true, ..Flags::NONE }).await,
        5 => zero(tape, root, at, 1, Flags::NONE).await,
        6 => zero(tape, root, at, 2, unmap).await,
        7 => discard(tape, root, at, 1).await,
        8 => discard(tape, root, at, 3).await,
        9 => flush(root, tape).await,
        10 => {
            write(tape, root, at, 1, Flags::NONE).await;
            flush(root, tape).await;
        }
        _ => {
            tape.began("close and open");
            let graph = Graph::current();
            graph.detach(root).await.expect("detach");
            graph.del("n").await.expect("del");
            let again = attach(case.node(false), true).await.expect("it opens again");
            tape.ended("close and open", true);
            return again;
        }
    }
    root
}

/// Writes sectors of new data.
pub(crate) async fn write(tape: &Tape, root: Root, at: u64, sectors: usize, flags: Flags) {
    let first = (at / SECTOR) as usize;
    let mut buf = Buf::new(sectors * SECTOR as usize);
    let stamp = lock(&tape.oracle).write(first, &mut buf);
    let (done, _) = root.write(at, buf, flags).await;
    // a cluster that holds plain data already cannot be written compressed
    assert!(done.is_ok() || flags.compressed && done == Err(Errno::EIO), "a write: {done:?}");
    let mut oracle = lock(&tape.oracle);
    match flags.fua {
        true => oracle.wrote_through(first..first + sectors, stamp, true),
        false => oracle.wrote(first..first + sectors, stamp, done.is_ok()),
    }
}

async fn zero(tape: &Tape, root: Root, at: u64, sectors: usize, flags: Flags) {
    let first = (at / SECTOR) as usize;
    let stamp = lock(&tape.oracle).zero(first..first + sectors);
    root.write_zeroes(at, sectors as u64 * SECTOR, flags).await.expect("zeroes");
    lock(&tape.oracle).wrote(first..first + sectors, stamp, true);
}

/// Discards sectors.
pub(crate) async fn discard(tape: &Tape, root: Root, at: u64, sectors: usize) {
    let first = (at / SECTOR) as usize;
    let stamp = lock(&tape.oracle).zero(first..first + sectors);
    root.discard(at, sectors as u64 * SECTOR).await.expect("a discard");
    lock(&tape.oracle).wrote(first..first + sectors, stamp, false);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: all sequences are there once. Method: the ends of the ranges.
    #[test]
    fn sequences() {
        assert_eq!((ONE, COUNT), (48, 2 * (48 + 2304)));
        assert_eq!(sequence(0), (vec![0], false));
        assert_eq!(sequence(97), (vec![0, 0], true));
        assert_eq!(sequence(COUNT - 1), (vec![47, 47], true));
        assert_eq!(sequence(COUNT), (vec![0, 0, 0], false));
    }
}
