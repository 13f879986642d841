//! blockdev-reopen of qcow2 on a running engine, with images that qemu-img made.

use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::driver::{Flags, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::{Config, Engine};
use serde_json::{Value, json};
use std::process::Command;

fn img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img is installed");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

async fn add(o: Value) {
    let o: BlockdevOptions = from_json(&o).unwrap();
    Graph::current().add(open::node(o).unwrap()).await.unwrap();
}

async fn reopen(list: Vec<Value>) -> Result<(), Error> {
    let list = list.iter().map(from_json::<BlockdevOptions>).collect::<Result<Vec<_>, _>>()?;
    let graph = Graph::current();
    graph.reopen(open::reopen(list, &graph.info())?).await
}

async fn byte(root: &Root, off: u64) -> u8 {
    let (done, buf) = root.read(off, Buf::new(1)).await;
    done.unwrap();
    buf[0]
}

/// Goal: a qcow2 node changes its backing file, its access mode and its caches while a root stays attached; a refused
/// change changes nothing; data written before and between survives. Method: two bases with different bytes, an
/// overlay with one written cluster, every kind of change, then qemu-img check.
#[test]
fn qcow2_changes_options_and_backing() {
    let dir = std::env::temp_dir().join(format!("rbreopen-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    for (name, fill) in [("a.raw", 0xaau8), ("b.raw", 0xbb)] {
        std::fs::write(at(name), vec![fill; 1 << 20]).unwrap();
    }
    let overlay = at("o.qcow2");
    img(&["create", "-q", "-f", "qcow2", "-b", &at("a.raw"), "-F", "raw", &overlay]);
    let (a, b, o) = (at("a.raw"), at("b.raw"), overlay.clone());
    let engine = Engine::start(&Config { cores: 2, pin: false, ..Config::default() }).unwrap();
    engine.run(0, move || {
        Box::pin(async move {
            let graph = Graph::current();
            let raw = |name: &str, path: &str| {
                json!({"driver": "raw", "node-name": name, "read-only": true,
                    "file": {"driver": "file", "filename": path}})
            };
            add(raw("a", &a)).await;
            add(raw("b", &b)).await;
            let top = |more: Value| {
                let mut t = json!({"driver": "qcow2", "node-name": "top", "backing": "a",
                    "file": {"driver": "file", "filename": o}});
                t.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                t
            };
            add(top(json!({}))).await;
            let spec = |perm| RootSpec {
                node: "top".into(),
                perm,
                shared: perm::ALL,
                user: "the test".into(),
                throttle: None,
            };
            let root = graph.attach(spec(perm::CONSISTENT_READ | perm::WRITE)).await.unwrap();
            root.write(0, Buf::from_slice(&[1; 4096]), Flags::NONE).await.0.unwrap();
            assert_eq!((byte(&root, 0).await, byte(&root, 1 << 19).await), (1, 0xaa));

            reopen(vec![top(json!({"backing": "b"}))]).await.unwrap();
            assert_eq!((byte(&root, 0).await, byte(&root, 1 << 19).await), (1, 0xbb));
            assert_eq!(byte(&root, 8192).await, 0xaa, "copied when the cluster was written");

            let mut without = top(json!({}));
            without.as_object_mut().unwrap().remove("backing");
            assert_eq!(reopen(vec![without]).await.unwrap_err().message, "backing is missing for 'top'");
            for bad in [
                json!({"backing": "nosuch"}),
                json!({"backing": "top"}),
                json!({"l2-cache-size": 1 << 20, "cache-size": 1 << 16}),
                json!({"read-only": true}),
            ] {
                assert!(reopen(vec![top(bad.clone())]).await.is_err(), "{bad} is refused");
                assert_eq!((byte(&root, 0).await, byte(&root, 1 << 19).await), (1, 0xbb), "after {bad}");
                root.write(65536, Buf::from_slice(&[2; 512]), Flags::NONE).await.0.unwrap();
            }

            reopen(vec![top(json!({"backing": null, "l2-cache-size": 65536}))]).await.unwrap();
            assert_eq!(
                (byte(&root, 0).await, byte(&root, 1 << 19).await, byte(&root, 65536).await),
                (1, 0, 2)
            );
            graph.del("b").await.unwrap();

            graph.detach(root).await.unwrap();
            let ro = json!({"read-only": true, "file": {"driver": "file", "filename": o, "read-only": true}});
            reopen(vec![top(ro)]).await.unwrap();
            assert!(graph.attach(spec(perm::CONSISTENT_READ | perm::WRITE)).await.is_err(), "read-only now");
            reopen(vec![top(json!({}))]).await.unwrap();
            let root = graph.attach(spec(perm::CONSISTENT_READ | perm::WRITE)).await.unwrap();
            assert_eq!(
                (byte(&root, 0).await, byte(&root, 1 << 19).await),
                (1, 0xaa),
                "the first backing is back"
            );
            root.write(1 << 18, Buf::from_slice(&[3; 65536]), Flags::FUA).await.0.unwrap();
            graph.shutdown().await.unwrap();
        })
    });
    img(&["check", "-q", &overlay]);
    std::fs::remove_dir_all(&dir).unwrap();
}
