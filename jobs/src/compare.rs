//! Comparing two nodes: by their extents first, by their bytes where both have data.
//!
//! ```text
//!   status a, status b ─► both zero: equal │ one zero: the other must read as zeroes │ both data: bytes must be equal
//!      pieces are read ahead, `WINDOW` at a time, and judged in order
//! ```

use std::collections::VecDeque;

use ringblock_engine::core::Core;
use ringblock_engine::error::Errno;
use ringblock_engine::mem::{Buf, is_zero};
use ringblock_engine::path::Root;
use ringblock_engine::sync::Receiver;

/// Bytes of a piece.
const CHUNK: u64 = 1 << 20;
/// Pieces read ahead.
const WINDOW: usize = 8;
/// Differences are told apart by sectors.
const SECTOR: usize = 512;

/// What a comparison found first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Difference {
    /// Nothing.
    None,
    /// Different bytes in the sector at this offset.
    Content(u64),
    /// (strict) The block status of the two is not of one kind, at this offset.
    Status(u64),
}

/// Why a comparison failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Which of the two, 0 or 1.
    pub which: usize,
    /// Reading failed; otherwise asking for the status did.
    pub reading: bool,
    /// Offset in bytes.
    pub offset: u64,
    /// The error.
    pub errno: Errno,
}

type Verdict = Result<Option<u64>, Failure>;

/// Compares the first `len` bytes of two nodes. `progress` is called with the bytes looked at so far.
pub async fn compare(
    roots: [Root; 2],
    len: u64,
    strict: bool,
    progress: &dyn Fn(u64),
) -> Result<Difference, Failure> {
    let mut ahead: VecDeque<(u64, Receiver<Verdict>)> = VecDeque::new();
    let mut at = 0;
    let mut status_differs = None;
    while at < len {
        let mut zero = [false; 2];
        let mut flags = [(false, false, false, false, false); 2];
        let mut n = len - at;
        for which in 0..2 {
            let above = roots[which].status_above(None, at..at + n, true).await;
            let s = above.map_err(|errno| Failure { which, reading: false, offset: at, errno })?.status;
            n = n.min(s.len.max(1));
            zero[which] = s.zero || !s.allocated && !s.data;
            flags[which] = (s.data, s.zero, s.allocated, s.encoded, s.offset.is_some());
        }
        if strict && flags[0] != flags[1] {
            status_differs = Some(at);
            break;
        }
        if zero == [true, true] {
            at += n;
            continue;
        }
        let n = n.min(CHUNK);
        if ahead.len() == WINDOW
            && let Some(found) = judge(&mut ahead, progress).await?
        {
            return Ok(Difference::Content(found));
        }
        ahead.push_back((at + n, Core::current().spawn_join(piece(roots, zero, at, n as usize))));
        at += n;
    }
    while !ahead.is_empty() {
        if let Some(found) = judge(&mut ahead, progress).await? {
            return Ok(Difference::Content(found));
        }
    }
    progress(at);
    Ok(status_differs.map_or(Difference::None, Difference::Status))
}

async fn judge(ahead: &mut VecDeque<(u64, Receiver<Verdict>)>, progress: &dyn Fn(u64)) -> Verdict {
    let Some((end, verdict)) = ahead.pop_front() else { return Ok(None) };
    let verdict = verdict.await.unwrap_or(Ok(None));
    progress(end);
    verdict
}

/// Reads what is not known to be zero, and compares.
async fn piece(roots: [Root; 2], zero: [bool; 2], at: u64, n: usize) -> Verdict {
    let read = |which: usize| {
        let root = roots[which];
        Core::current().spawn_join(async move {
            if zero[which] {
                return Ok(None);
            }
            let (result, buf) = root.read(at, Buf::new(n)).await;
            result.map(|()| Some(buf)).map_err(|errno| Failure { which, reading: true, offset: at, errno })
        })
    };
    let (a, b) = (read(0), read(1));
    let stopped = Failure { which: 0, reading: true, offset: at, errno: Errno::ESHUTDOWN };
    let (a, b) = (a.await.ok_or(stopped)??, b.await.ok_or(stopped)??);
    let differs = match (&a, &b) {
        (Some(a), Some(b)) if a[..] == b[..] => None,
        (Some(a), Some(b)) => a.chunks(SECTOR).zip(b.chunks(SECTOR)).position(|(x, y)| x != y),
        (Some(one), None) | (None, Some(one)) => one.chunks(SECTOR).position(|s| !is_zero(s)),
        (None, None) => None,
    };
    Ok(differs.map(|sector| at + (sector * SECTOR) as u64))
}
