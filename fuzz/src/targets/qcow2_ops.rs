//! A sequence of requests and operations on a new qcow2 image of any kind. Everything that is read agrees with the
//! oracle, and at the end the independent checker finds nothing wrong and the same data.

use std::sync::OnceLock;

use super::Target;
use crate::Outcome;
use crate::choices::Choices;
use ringblock_checker::{Checker, Files};
use ringblock_crash::Tape;
use ringblock_crash::cases::{Case, Past, attach, cases};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, Preallocation};
use ringblock_engine::error::Errno;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Faults, SECTOR, World, lock};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::json;

pub(super) const TARGET: Target =
    Target { name: "qcow2_ops", run, seeds, words: &[b"\x0a", b"\x0b\xff\xff"], longest: 256, share: 22_000 };

/// Operations of one sequence.
const LONGEST: usize = 40;

fn kinds() -> &'static [Case] {
    static KINDS: OnceLock<Vec<Case>> = OnceLock::new();
    KINDS.get_or_init(|| cases().into_iter().filter(is_clean).collect())
}

/// Small, and without leaks at the beginning.
fn is_clean(case: &Case) -> bool {
    case.cluster() < 65536 && matches!(case.past, Past::New | Past::Written | Past::Snapshot)
}

fn run(data: &[u8]) -> Outcome {
    let mut c = Choices::new(data);
    let case = &kinds()[c.below(kinds().len() as u64) as usize];
    let (mut setup, roles, tape) = case.start(c.byte().into(), 1);
    lock(&tape.oracle).set_journal(None);
    setup.faults = match c.below(3) {
        0 => Faults { latency_ns: (1_000, 2_000), stalled: 0, ..Faults::default() },
        1 => Faults::benign(),
        _ => Faults { stalled: 50, ..Faults::default() },
    };
    let mut world = World::new(setup);
    let (oracle, rest, played) = (tape.oracle.clone(), c.rest().to_vec(), case.clone());
    let mut out = world.run(move || Box::pin(async move { Play::new(played, tape).await.all(&rest).await }));
    let files = world.disks().live();
    let bytes = |path: &Option<std::path::PathBuf>| path.as_ref().map(|p| files[p].to_bytes());
    let (image, data, backing) = (files[&roles.image].to_bytes(), bytes(&roles.data), bytes(&roles.backing));
    let files = Files { image: &image, data: data.as_deref(), backing: backing.as_deref() };
    let mut checker = Checker::default();
    let report = checker.check(&files);
    assert!(report.exit_code() == 0, "after a clean end: {}", report.explain());
    out.size("file", image.len() as u64 / case.cluster());
    let sectors = lock(&oracle).len();
    assert_eq!(report.virtual_size, sectors as u64 * SECTOR);
    let mut guest = vec![0; sectors * SECTOR as usize];
    checker.read_guest(&files, &mut guest).expect("the checker can read it");
    lock(&oracle).check_read(0, &guest).unwrap_or_else(|e| panic!("after closing: {e}"));
    out
}

/// The image being used.
struct Play {
    case: Case,
    tape: Tape,
    root: Root,
    sectors: usize,
    out: Outcome,
}

/// Requests, as they can run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Write(Flags),
    /// In two pieces that meet in the middle of a sector.
    Halves,
    Zeroes(Flags),
    Discard,
    Read,
}

impl Play {
    async fn new(case: Case, tape: Tape) -> Play {
        let root = attach(case.node(false), true).await.expect("a new image opens");
        let (sectors, out) = (case.sectors(), Outcome::default());
        Play { case, tape, root, sectors, out }
    }

    async fn all(mut self, ops: &[u8]) -> Outcome {
        let mut c = Choices::new(ops);
        let (mut done, mut last) = (0, 0);
        while !c.is_over() && done < LONGEST {
            let op = c.below(14);
            self.one(op, &mut c).await;
            self.out.kind("after", last << 8 | op);
            (done, last) = (done + 1, op);
        }
        self.check(0..self.sectors).await;
        self.flush().await;
        Graph::current().shutdown().await.expect("it closes");
        self.out
    }

    async fn one(&mut self, op: u64, c: &mut Choices<'_>) {
        let unmap = Flags { may_unmap: true, ..Flags::NONE };
        let requests = [
            Request::Write(Flags::NONE),
            Request::Write(Flags::FUA),
            Request::Halves,
            Request::Zeroes(Flags::NONE),
            Request::Zeroes(unmap),
            Request::Discard,
            Request::Read,
        ];
        match op {
            0..=6 => {
                let range = self.range(c);
                self.request(requests[op as usize], range).await;
            }
            7 => self.compressed(c).await,
            8 => self.flush().await,
            9 => self.resize(c).await,
            10 => self.reopen(c).await,
            11 => self.close_and_open().await,
            _ => {
                let range = self.range(c);
                let parts = 2 + c.below(3) as usize;
                let list: Vec<Request> = (0..parts).map(|_| c.pick(&requests)).collect();
                self.together(range, &list).await;
            }
        }
    }

    /// Some sectors.
    fn range(&self, c: &mut Choices<'_>) -> std::ops::Range<usize> {
        let first = c.below(self.sectors as u64) as usize;
        let n = 1 + c.byte() as usize % 48;
        first..(first + n).min(self.sectors)
    }

    async fn request(&self, request: Request, range: std::ops::Range<usize>) {
        perform(request, self.root, &self.tape, range).await;
    }

    /// Requests at the same time, each to a part of the range.
    async fn together(&mut self, range: std::ops::Range<usize>, list: &[Request]) {
        let each = range.len().div_ceil(list.len()).max(1);
        let mut joins = Vec::new();
        for (i, &request) in list.iter().enumerate() {
            let start = range.start + i * each;
            let part = start..(start + each).min(range.end);
            if part.is_empty() {
                continue;
            }
            let (root, tape) = (self.root, self.tape.clone());
            joins.push(Core::current().spawn_join(async move { perform(request, root, &tape, part).await }));
        }
        for join in joins {
            join.await.expect("it ended");
        }
    }

    /// One cluster, or the part of one at the end of the disk.
    async fn compressed(&mut self, c: &mut Choices<'_>) {
        let per = (self.case.cluster() / SECTOR) as usize;
        let at = c.below((self.sectors / per).max(1) as u64) as usize * per;
        let range = at..(at + per).min(self.sectors);
        let mut buf = Buf::new(range.len() * SECTOR as usize);
        let stamp = lock(&self.tape.oracle).write(at, &mut buf);
        let flags = Flags { compressed: true, ..Flags::NONE };
        let (done, _) = self.root.write(at as u64 * SECTOR, buf, flags).await;
        lock(&self.tape.oracle).wrote(range, stamp, done.is_ok());
        self.out.result("compressed", &done);
        // a cluster that holds plain data, or is in a data file, cannot be written compressed
        let refused = matches!(done, Err(Errno::EIO | Errno::ENOTSUP | Errno::EINVAL));
        assert!(done.is_ok() || refused, "a compressed write: {done:?}");
    }

    async fn flush(&self) {
        let flush = lock(&self.tape.oracle).flush();
        self.root.flush().await.expect("a flush");
        lock(&self.tape.oracle).flushed(flush);
    }

    async fn resize(&mut self, c: &mut Choices<'_>) {
        let to = 1 + c.below(self.case.sectors() as u64 * 2) as usize;
        let all = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
        // what is preallocated could not be told from what the backing file shows there
        let prealloc = match self.case.base > 0 || to <= self.sectors {
            true => Preallocation::Off,
            false => c.pick(&all),
        };
        self.out.kind("resize", u64::from(to > self.sectors) << 4 | prealloc as u64);
        let done = Graph::current().resize("n", to as u64 * SECTOR, prealloc).await;
        // version 2 has no zero clusters to hide what the backing file has there
        let hidden = self.case.options.version == 3 || self.case.base <= self.sectors;
        if done.as_ref().is_err_and(|e| e.errno == Errno::ENOTSUP && to > self.sectors && !hidden) {
            return assert_eq!(self.root.size(), Ok(self.sectors as u64 * SECTOR));
        }
        done.unwrap_or_else(|e| panic!("from {} to {to} sectors, {prealloc:?}: {e}", self.sectors));
        lock(&self.tape.oracle).set_len(to);
        self.sectors = to;
    }

    async fn reopen(&mut self, c: &mut Choices<'_>) {
        let mut node = self.case.node(false);
        node["l2-cache-size"] = json!(c.pick(&[4096u64, 8192, 65536]));
        let options: BlockdevOptions = from_json(&node).expect("options");
        let graph = Graph::current();
        let list = open::reopen(vec![options], &graph.info()).expect("a reopen");
        graph.reopen(list).await.expect("a reopen");
    }

    async fn close_and_open(&mut self) {
        let graph = Graph::current();
        graph.detach(self.root).await.expect("detach");
        graph.del("n").await.expect("del");
        self.root = attach(self.case.node(false), true).await.expect("it opens again");
        assert_eq!(self.root.size(), Ok(self.sectors as u64 * SECTOR));
    }

    async fn check(&self, range: std::ops::Range<usize>) {
        self.request(Request::Read, range).await;
    }
}

async fn perform(request: Request, root: Root, tape: &Tape, range: std::ops::Range<usize>) {
    let (off, len) = (range.start as u64 * SECTOR, range.len() as u64 * SECTOR);
    match request {
        Request::Write(flags) => {
            let mut buf = Buf::new(len as usize);
            let stamp = lock(&tape.oracle).write(range.start, &mut buf);
            root.write(off, buf, flags).await.0.expect("a write");
            match flags.fua {
                true => lock(&tape.oracle).wrote_through(range, stamp, true),
                false => lock(&tape.oracle).wrote(range, stamp, true),
            }
        }
        Request::Halves => {
            let mut buf = Buf::new(len as usize);
            let stamp = lock(&tape.oracle).write(range.start, &mut buf);
            let cut = buf.len() / 2 + 100;
            let (first, second) = (Buf::from_slice(&buf[..cut]), Buf::from_slice(&buf[cut..]));
            root.write(off + cut as u64, second, Flags::NONE).await.0.expect("a write");
            root.write(off, first, Flags::NONE).await.0.expect("a write");
            lock(&tape.oracle).wrote(range, stamp, true);
        }
        Request::Zeroes(flags) => {
            let stamp = lock(&tape.oracle).zero(range.clone());
            root.write_zeroes(off, len, flags).await.expect("zeroes");
            lock(&tape.oracle).wrote(range, stamp, true);
        }
        Request::Discard => {
            let stamp = lock(&tape.oracle).zero(range.clone());
            root.discard(off, len).await.expect("a discard");
            // advice: parts of clusters keep what they had
            lock(&tape.oracle).wrote(range, stamp, false);
        }
        Request::Read => {
            let (done, buf) = root.read(off, Buf::new(len as usize)).await;
            done.expect("a read");
            lock(&tape.oracle).check_read(range.start, &buf).unwrap_or_else(|e| panic!("read: {e}"));
            let (from, to) = (off + 7, off + len - 9);
            let (done, part) = root.read(from, Buf::new((to - from) as usize)).await;
            done.expect("a read");
            assert!(part[..] == buf[7..buf.len() - 9], "the same bytes, not aligned, at {from}..{to}");
        }
    }
}

/// For each kind of image: a little of everything.
fn seeds() -> Vec<Vec<u8>> {
    let ops: [u8; 55] = [
        0, 3, 5, 2, 20, 1, 8, 5, 0, 40, 4, 10, 3, 3, 12, 9, 8, 7, 1, 9, 50, 0, 0, 30, 40, 12, 2, 30, 2, 0, 3,
        5, 11, 6, 0, 47, 9, 20, 0, 10, 1, 1, 5, 4, 13, 10, 20, 1, 2, 5, 8, 7, 0, 8, 6,
    ];
    (0..kinds().len()).map(|i| [&[i as u8, i as u8, i as u8][..], &ops[i % 4..]].concat()).collect()
}
