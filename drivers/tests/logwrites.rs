//! `blklogwrites` on several simulated cores: what its log says, against what the simulator saw.

use ringblock_drivers::filter::blklogwrites::format::{ENTRY_BYTES, Entry, Mark, Super, flag};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, LocalFuture, perm};
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::{Change, Event, Faults, Image, Journal, Rng, Setup, World};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

const SIZE: u64 = 64 << 10;

/// What the log says, in its order.
#[derive(Debug, PartialEq)]
enum Said {
    Write(u64, Vec<u8>),
    Flush(bool),
}

fn parse(log: &[u8]) -> Vec<Said> {
    let head = Super::parse(log).expect("a super block").expect("a log");
    assert_eq!(head.sector_size, 512);
    let (mut at, mut out) = (512, Vec::new());
    for n in 0..head.entries {
        let entry = Entry::parse(&log[at..], n).expect("an entry");
        let text = &log[at + ENTRY_BYTES..at + 512];
        let len = entry.data_sectors() as usize * 512;
        out.push(match entry.flags {
            flag::MARK => match Mark::parse(&text[..entry.data_len as usize]) {
                Some(Mark::FlushFailed) => Said::Flush(false),
                other => panic!("{other:?}"),
            },
            flag::FLUSH => Said::Flush(true),
            0 => Said::Write(entry.sector * 512, log[at + 512..at + 512 + len].to_vec()),
            flags => panic!("flags {flags}"),
        });
        at += 512 + len;
    }
    out
}

async fn attach() -> Root {
    let node: BlockdevOptions = from_json(&json!({
        "driver": "blklogwrites", "node-name": "l", "log-super-update-interval": 7,
        "log": {"driver": "file", "filename": "/log"},
        "file": {
            "driver": "blkdebug", "image": {"driver": "file", "filename": "/img"},
            "inject-error": [{"event": "none", "iotype": "flush", "once": true}],
        },
    }))
    .expect("options");
    let graph = Graph::current();
    let node = graph.add(open::node(node).expect("a node")).await.expect("it opens");
    let perm = perm::CONSISTENT_READ | perm::WRITE;
    let spec = RootSpec { node, perm, shared: perm::ALL, user: "the guest".into(), throttle: None };
    graph.attach(spec).await.expect("a root")
}

/// Writes with a number of their own in each sector, and flushes; several overlap.
async fn guest(root: Root, me: u64, mut rng: Rng) {
    for i in 0..40u64 {
        if rng.chance(200) {
            // the first one of all fails
            let _ = root.flush().await;
            continue;
        }
        let sectors = rng.between(1, 8);
        let first = rng.below(SIZE / 512 - sectors);
        let stamp = (me << 32 | (i + 1)).to_le_bytes();
        let data: Vec<u8> = stamp.repeat(sectors as usize * 64);
        root.write(first * 512, Buf::from_slice(&data), Flags::NONE).await.0.expect("a write");
    }
}

fn run(seed: u64) -> (Vec<Said>, Vec<u8>, Vec<Event>) {
    let journal = Journal::new();
    let mut image = Image::default();
    image.set_len(SIZE);
    let mut setup = Setup::new(seed, 3).file("/img", image).file("/log", Image::default());
    setup.faults = Faults { stalled: 50, ..Faults::default() };
    setup.journal = Some(journal.clone());
    let mut world = World::new(setup);
    world.run(move || {
        Box::pin(async move {
            let root = attach().await;
            let core = Core::current();
            let mut joins = Vec::new();
            for i in 0..6u64 {
                let call = move || -> LocalFuture<'static, ()> {
                    Box::pin(guest(root, i + 1, Rng::new(seed << 8 | i)))
                };
                joins.push(core.spawn_join(async move {
                    Core::current().call(i as usize % Core::current().count(), call).await
                }));
            }
            for j in joins {
                j.await.expect("ended").expect("the core runs");
            }
            Graph::current().shutdown().await.expect("it closes");
        })
    });
    let live = |path: &str| world.live(Path::new(path)).expect("the file").to_bytes();
    (parse(&live("/log")), live("/img"), journal.take())
}

/// Goal: replaying the log gives the file, whatever overlapped; what stands before a flush in the log had completed before
/// a flush that succeeded was submitted (rule D1), each flush of the log being one of the disk's; a failed flush is a mark.
/// Method: guests on three cores, the simulator's journal of the file beside the log.
#[test]
fn the_log_promises_what_the_disk_keeps() {
    for seed in 0..40 {
        let (said, image, events) = run(seed);
        let mut replayed = vec![0; SIZE as usize];
        let mut completed: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        let (mut flying, mut flushing, mut kept) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        // files have their numbers in the order of their names: the image's is 0
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Submitted { disk: 0, id, change: Change::Data(_, data) } => {
                    flying.insert(*id, data.clone());
                }
                Event::Completed { disk: 0, id, .. } => {
                    completed.extend(flying.remove(id).map(|data| (data, at)));
                }
                Event::FlushSubmitted { disk: 0, id } => drop(flushing.insert(*id, at)),
                Event::FlushCompleted { disk: 0, id, ok } => {
                    let began = flushing.remove(id).expect("it began");
                    kept.extend(ok.then_some(began));
                }
                _ => {}
            }
        }
        kept.sort_unstable();
        let (mut needs, mut latest) = (Vec::new(), 0);
        for one in &said {
            match one {
                Said::Write(off, data) => {
                    replayed[*off as usize..*off as usize + data.len()].copy_from_slice(data);
                    latest = latest.max(*completed.get(data).expect("a write of the disk"));
                }
                Said::Flush(true) => needs.push(latest),
                Said::Flush(false) => {}
            }
        }
        assert!(replayed == image, "seed {seed}: replaying gives the file");
        assert_eq!(said.iter().filter(|s| **s == Said::Flush(false)).count(), 1, "seed {seed}");
        assert_eq!(needs.len(), kept.len(), "seed {seed}: flushes");
        for (n, (need, began)) in needs.iter().zip(&kept).enumerate() {
            assert!(need < began, "seed {seed}: flush {n} of the log promises too much");
        }
    }
}
