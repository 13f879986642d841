//! Single faults at chosen places, in the simulator: what has failed is made good, and nothing else is harmed by it.
//!
//! ```text
//!   a run without a fault ─► the operations of one step ─► the same run, and one of them fails ─► heal ─► all is well
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_drivers::format::qcow2::{Qcow2, Repair};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::Errno;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::{Disks, Harm, Image, OpKind, Saboteur, Setup, Submitted, Trap, World};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::json;

fn options() -> BlockdevOptions {
    from_json(&json!({
        "driver": "qcow2", "node-name": "n", "discard": "unmap", "file": {"driver": "file", "filename": "/img"},
    }))
    .expect("options")
}

async fn attach() -> Result<Root, Error> {
    let graph = Graph::current();
    let node = graph.add(open::node(options())?).await?;
    let perm = perm::CONSISTENT_READ | perm::WRITE;
    graph.attach(RootSpec { node, perm, shared: perm::ALL, user: "the guest".into(), throttle: None }).await
}

fn new_image(o: &CreateOptions) -> Image {
    let new = create::create(o).expect("valid options");
    let mut image = Image::default();
    image.set_len(new.file_size);
    new.writes().into_iter().for_each(|(at, data)| image.write(at.0, &data));
    image
}

/// Runs a program on core 0; what is on the disks afterwards.
fn run<T: 'static>(
    seed: u64,
    image: &Image,
    saboteur: Arc<Saboteur>,
    program: impl FnOnce(Arc<Disks>) -> LocalFuture<'static, T>,
) -> (T, BTreeMap<PathBuf, Image>) {
    let mut setup = Setup::new(seed, 1).file("/img", image.clone());
    setup.saboteur = Some(saboteur);
    let mut world = World::new(setup);
    let disks = world.disks();
    let value = world.run(|| program(disks));
    (value, world.disks().live())
}

/// Corruptions of a closed image, by our own check.
fn corruptions(live: &BTreeMap<PathBuf, Image>) -> u64 {
    let image = &live[Path::new("/img")];
    let program = |_| -> LocalFuture<'static, u64> {
        Box::pin(async {
            let graph = Graph::current();
            graph.add(open::node_for_check(options()).expect("a spec")).await.expect("it opens");
            let driver = graph.info().nodes.iter().find(|n| n.name == "n").expect("the node").driver.clone();
            let qcow2 = driver.as_any().downcast_ref::<Qcow2>().expect("a qcow2");
            let report = qcow2.check(Repair::None).await.expect("a check");
            report.corruptions + report.check_errors
        })
    };
    run(1, image, Saboteur::watching(), program).0
}

async fn fill(root: &Root, off: u64, len: usize, byte: u8) -> Result<(), Errno> {
    let mut buf = Buf::new(len);
    buf.fill(byte);
    root.write(off, buf, Flags::NONE).await.0
}

async fn byte(root: &Root, off: u64) -> Result<u8, Errno> {
    let (done, buf) = root.read(off, Buf::new(1)).await;
    done.map(|()| buf[0])
}

async fn reopen() -> Result<(), Error> {
    let graph = Graph::current();
    graph.reopen(open::reopen(vec![options()], &graph.info())?).await
}

/// Goal: a node that cannot be opened again with new options goes on as it was, during the fault and after it, and can be
/// reopened later. Method: each operation of a reopen fails, once or until healed.
#[test]
fn a_failed_reopen_leaves_the_node_working() {
    let image = new_image(&CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let saboteur = Saboteur::watching();
    let watched = saboteur.clone();
    let (log, _) = run(7, &image, saboteur, move |_| {
        Box::pin(async move {
            let root = attach().await.expect("it opens");
            fill(&root, 100, 9000, 7).await.expect("a write");
            let before = watched.take_log().len();
            reopen().await.expect("a reopen");
            (before, watched.take_log())
        })
    });
    let (before, ops) = log;
    assert!(ops.iter().any(|o| o.kind == OpKind::Read) && ops.iter().any(|o| o.kind == OpKind::Write));
    for (i, lasting) in (0..ops.len()).flat_map(|i| [(i, false), (i, true)]) {
        let flush = ops[i].kind == OpKind::Fdatasync;
        let saboteur =
            Saboteur::with(Trap { at: (before + i) as u64, harm: Harm::Error(Errno::EIO), lasting });
        let healer = saboteur.clone();
        let ((), live) = run(7, &image, saboteur, move |_| {
            Box::pin(async move {
                let root = attach().await.expect("it opens");
                fill(&root, 100, 9000, 7).await.expect("a write");
                let failed = reopen().await;
                assert!(failed.is_err() || !flush, "operation {i}");
                assert_eq!(healer.hits().min(1), 1, "operation {i}");
                healer.heal();
                assert_eq!(byte(&root, 9099).await, Ok(7), "operation {i}, {failed:?}");
                if flush {
                    let more = root.flush().await;
                    assert_eq!(more, Err(Errno::EIO), "operation {i}: no success after a failed flush");
                    assert!(Graph::current().shutdown().await.is_err());
                    return;
                }
                fill(&root, 50_000, 5000, 8)
                    .await
                    .unwrap_or_else(|e| panic!("operation {i}, {failed:?}: {e}"));
                root.flush().await.expect("a flush");
                reopen().await.expect("another reopen");
                assert_eq!((byte(&root, 100).await, byte(&root, 54_999).await), (Ok(7), Ok(8)));
                Graph::current().shutdown().await.expect("it closes");
            })
        });
        assert_eq!(corruptions(&live), 0, "operation {i}, lasting {lasting}");
    }
}
