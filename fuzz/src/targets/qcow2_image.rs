//! A qcow2 image of any features, whole or broken, used as guests and tools use it.
//!
//! ```text
//!   forge ─► check ─► open ─► map, read ─► write, zeroes, discard, flush ─► close ─► repair ─► check ─► repair again
//! ```
//!
//! A whole image opens, is found clean, and reads as the independent checker reads it, and what is written to it is read
//! again. Of any image: an open that fails changes nothing (but repairs of a dirty image), what both of them can read is the
//! same, what a repair calls clean is clean for the checker, and then a second repair changes nothing.

use std::path::Path;

use super::Target;
use super::forge::{Forged, forge};
use crate::choices::Choices;
use crate::{Outcome, sim};
use ringblock_checker::{Checker, Files, Kind};
use ringblock_crash::cases::attach;
use ringblock_drivers::format::qcow2::{CheckReport, Repair};
use ringblock_engine::error::Error;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

pub(super) const TARGET: Target =
    Target { name: "qcow2_image", run, seeds, words: &[b"\x01\x07\x02"], longest: 160, share: 26_000 };

/// How much of a disk is read and compared.
const COMPARED: usize = 512 << 10;

fn run(data: &[u8]) -> Outcome {
    let mut c = Choices::new(data);
    let forged = forge(&mut c);
    let mut files = sim::Files::from([("/img".into(), forged.image.clone())]);
    files.extend(forged.data.clone().map(|data| ("/data".into(), data)));
    files.extend(forged.base.clone().map(|base| ("/base".into(), base)));
    let mut out = Outcome::default();
    out.kind("forged", forged.features << 1 | u64::from(forged.whole));
    let files = used(&forged, files, c.rest(), &mut out);
    if sim::are_small(&files) {
        repaired(&forged, files, &mut out);
    }
    out
}

/// Checked, opened, and used. Gives the files as they are left.
fn used(forged: &Forged, files: sim::Files, rest: &[u8], out: &mut Outcome) -> sim::Files {
    let mut checker = Checker::default();
    let judged = checker.check(&of_image(&files)).clone();
    let (node, ops, whole) = (sim::qcow2_node(&files, false), rest.to_vec(), forged.whole);
    let ((mut seen, report, opened, disk), after) = sim::run(3, &files, || {
        Box::pin(async move {
            let mut out = Outcome::default();
            let report = sim::check("/img", Repair::None).await;
            let opened = attach(node, true).await;
            let mut disk = None;
            if let Ok(root) = &opened {
                let end = root.size().expect("it is open");
                sim::map(*root, 0, end, &mut out).await;
                disk = Some((end, sim::read(*root, COMPARED as u64, &mut out).await));
                requests(*root, end, &ops, whole, &mut out).await;
            }
            sim::close(&mut out).await;
            (out, report, opened.map(drop), disk)
        })
    });
    out.features.append(&mut seen.features);
    sim::tell("check", &report, out);
    out.result("open", &opened);
    // a dirty image is repaired first of all, as far as that goes, and may be refused all the same
    let is_dirty = files[Path::new("/img")].get(79).is_some_and(|b| b & 1 != 0);
    if opened.is_err() && !is_dirty {
        assert!(after == files, "an open that failed changed a file: {opened:?}");
    }
    if forged.whole {
        let report = report.as_ref().expect("a whole image can be checked");
        assert!(report.is_clean(), "a whole image: {:?}", report.messages);
        opened.as_ref().expect("a whole image opens");
    }
    if let (Ok(report), false) = (&report, judged.refused) {
        agree(report, &judged, &of_image(&files), "before");
    }
    // data that lie in tables have changed before they were read: an open repairs a dirty image, and marks bitmaps
    let changed = judged.dirty || forged.has_bitmaps();
    if let Some((size, pieces)) = disk.filter(|_| forged.whole || !changed) {
        same_disk(&mut checker, &of_image(&files), size, &pieces, forged.whole);
    }
    after
}

fn of_image(files: &sim::Files) -> Files<'_> {
    let at = |path| sim::bytes(files, path);
    Files { image: at("/img").unwrap_or_default(), data: at("/data"), backing: at("/base") }
}

/// What only one of both looks at: entries of the snapshot table and of bitmaps in detail, bitmaps of compressed clusters, and
/// zero clusters in version 2; the end of a table that lies just behind the end of the file; and a refcount block that is
/// something else as well, which for us is only a reason to make it anew.
fn alone(report: &CheckReport, judged: &ringblock_checker::Report, files: &Files<'_>) -> bool {
    let cluster = Checker::header(files).map_or(1, |h| h.cluster());
    let behind = |at: u64| at.saturating_mul(cluster) >= files.image.len() as u64;
    let details = |k| {
        matches!(
            k,
            Kind::CompressedBitmap
                | Kind::RefblockShared
                | Kind::SnapshotTable
                | Kind::SnapshotL1
                | Kind::BitmapDirectory
                | Kind::BitmapTable
                | Kind::BitmapEntry
        )
    };
    judged.findings.iter().any(|f| details(f.kind) || f.kind == Kind::TooFewRefs && behind(f.at))
        || report.messages.iter().any(|m| m.contains("zero flag in a version 2 image"))
}

/// Both checks find something, or neither does. What could not be looked at may hide the rest.
fn agree(report: &CheckReport, judged: &ringblock_checker::Report, files: &Files<'_>, when: &str) {
    if report.check_errors > 0 || judged.check_errors > 0 || alone(report, judged, files) {
        return;
    }
    let (ours, theirs) = (report.corruptions > 0, judged.corruptions > 0);
    assert!(ours == theirs, "{when}: {:?} against {}", report.messages, judged.explain());
    if !ours {
        let (ours, theirs) = (report.leaks > 0, judged.leaks > 0);
        assert!(ours == theirs, "leaks, {when}: {:?} against {}", report.messages, judged.explain());
    }
}

/// What the engine read is what the checker reads, where both could.
fn same_disk(checker: &mut Checker, files: &Files<'_>, size: u64, pieces: &[Option<Vec<u8>>], whole: bool) {
    let mut guest = vec![0; COMPARED.min(size as usize)];
    let read = checker.read_guest(files, &mut guest);
    if whole {
        read.expect("the checker reads a whole image");
        assert!(pieces.iter().all(Option::is_some), "the engine reads a whole image");
    }
    if read.is_err() {
        return;
    }
    let mut at = 0;
    for piece in pieces {
        let Some(piece) = piece else {
            at += 64 << 10;
            continue;
        };
        for (i, (a, b)) in piece.iter().zip(&guest[at..]).enumerate() {
            let here = (at + i) as u64;
            let known = !checker.unknown().iter().any(|r| (r.0..r.1).contains(&here));
            assert!(a == b || !known, "byte {here} of the disk: {a:#x}, and {b:#x} for the checker");
        }
        at += piece.len();
    }
}

/// Requests, and what they wrote is read again.
async fn requests(root: Root, end: u64, ops: &[u8], whole: bool, out: &mut Outcome) {
    let mut c = Choices::new(ops);
    let sectors = (end / 512).max(1);
    for _ in 0..6 {
        let at = (c.below(sectors.min(4096)) * 512).min(end.saturating_sub(512));
        let len = (512 * (1 + u64::from(c.byte() % 40))).min(end - at);
        let (kind, fill) = (c.below(5), c.byte());
        let (done, want) = match kind {
            0 | 1 => {
                let mut buf = Buf::new(len as usize);
                buf.fill(fill);
                (root.write(at, buf, sim::flags(c.byte() & 1)).await.0, Some(fill))
            }
            2 => (root.write_zeroes(at, len, sim::flags(c.byte())).await, Some(0)),
            3 => (root.discard(at, len).await, None),
            _ => (root.flush().await, None),
        };
        out.result("request", &done);
        assert!(done.is_ok() || !whole, "request {kind} of a whole image: {done:?}");
        if let (Ok(()), Some(want), true) = (done, want, whole) {
            let (done, buf) = root.read(at, Buf::new(len as usize)).await;
            done.expect("a read");
            assert!(buf.iter().all(|b| *b == want), "at {at}: what was written is read");
        }
        if c.is_over() {
            return;
        }
    }
}

/// Repaired until nothing changes, which is at once.
fn repaired(forged: &Forged, files: sim::Files, out: &mut Outcome) {
    let leaks = forged.features & 1 == 1;
    if leaks {
        let (report, after) = sim::run(4, &files, || Box::pin(sim::check("/img", Repair::Leaks)));
        sim::tell("leaks", &report, out);
        if report.is_err() {
            assert!(after == files, "a check that failed changed a file: {report:?}");
        }
    }
    let repair = |files: &sim::Files| -> (Result<CheckReport, Error>, sim::Files) {
        sim::run(5, files, || {
            Box::pin(async move {
                let report = sim::check("/img", Repair::All).await;
                sim::close(&mut Outcome::default()).await;
                report
            })
        })
    };
    let (first, after) = repair(&files);
    sim::tell("repair", &first, out);
    let Ok(first) = first else { return };
    let judged = Checker::default().check(&of_image(&after)).clone();
    if !sim::are_small(&after) {
        return;
    }
    if first.is_clean() && !judged.refused && !alone(&first, &judged, &of_image(&after)) {
        assert!(judged.exit_code() == 0, "repaired, and: {}; {:?}", judged.explain(), first.messages);
    }
    let (second, again) = repair(&after);
    let second = second.expect("what was repaired can be checked");
    out.kind("clean", u64::from(first.is_clean()));
    if !first.is_clean() {
        // tables that lie in each other: repairing one may damage the other again
        return;
    }
    let fixed = second.corruptions_fixed + second.leaks_fixed;
    assert!(fixed == 0, "a second repair: {:?}, after {:?}", second.messages, first.messages);
    assert!(again == after, "a second repair changed the file: {:?}", second.messages);
}

/// Images of many kinds, most of them whole.
fn seeds() -> Vec<Vec<u8>> {
    let mut rng = ringblock_engine::host::sim::Rng::new(11);
    (0..60).map(|i| (0..30 + i).map(|_| rng.next() as u8).collect()).collect()
}
