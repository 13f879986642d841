//! Tests of the whole driver on a running engine, against QEMU's tools and a model in memory.

use std::rc::Rc;

use ringblock_engine::driver::{Flags, LocalFuture, Preallocation, perm};
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::{Config, Engine, Errno, Error};

use super::create::{self, CreateOptions, NewImage};

use super::testkit::{Scratch, qemu_img, qemu_io};
use crate::open;
use crate::options::blockdev::BlockdevOptions;
use crate::options::from_json;

/// A random stream with a seed.
#[derive(Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// Runs a task beside the graph.
fn on_graph<T, F>(engine: &Engine, f: F) -> T
where
    T: Send + 'static,
    F: FnOnce(Rc<Graph>) -> LocalFuture<'static, T> + Send + 'static,
{
    engine.run(0, move || f(Graph::current()))
}

fn start(cores: usize) -> Engine {
    Engine::start(&Config { cores, ..Config::default() }).unwrap()
}

/// Opens a qcow2 node "disk" on a file and attaches to it.
fn attach(engine: &Engine, options: serde_json::Value, writable: bool) -> Result<Root, Error> {
    let options: BlockdevOptions = from_json(&options)?;
    let spec = open::node(options)?;
    let root = RootSpec {
        node: "disk".into(),
        perm: perm::CONSISTENT_READ | if writable { perm::WRITE } else { 0 },
        shared: perm::ALL,
        user: "a test".into(),
        throttle: None,
    };
    on_graph(engine, move |graph| {
        Box::pin(async move {
            graph.add(spec).await?;
            graph.attach(root).await
        })
    })
}

fn detach(engine: &Engine) -> Result<(), Error> {
    on_graph(engine, |graph| Box::pin(async move { graph.shutdown().await }))
}

fn json(dir: &Scratch, name: &str, extra: serde_json::Value) -> serde_json::Value {
    let mut all = serde_json::json!({
        "driver": "qcow2", "node-name": "disk", "discard": "unmap",
        "file": {"driver": "file", "filename": dir.path(name)},
    });
    if let (Some(all), serde_json::Value::Object(extra)) = (all.as_object_mut(), extra) {
        all.extend(extra);
    }
    all
}

async fn read_all(root: Root, size: u64, step: u64) -> Result<Vec<u8>, Errno> {
    let mut out = Vec::with_capacity(size as usize);
    while (out.len() as u64) < size {
        let n = step.min(size - out.len() as u64);
        let (result, buf) = root.read(out.len() as u64, Buf::new(n as usize)).await;
        result?;
        out.extend_from_slice(&buf);
    }
    Ok(out)
}

fn make(dir: &Scratch, name: &str, options: &CreateOptions) -> NewImage {
    use std::os::unix::fs::FileExt;
    let image = create::create(options).unwrap();
    let f = std::fs::File::create(dir.path(name)).unwrap();
    f.set_len(image.file_size).unwrap();
    for (at, bytes) in image.writes() {
        f.write_all_at(&bytes, at.0).unwrap();
    }
    if let (Some(size), Some(data)) = (image.data_file_size, &image.header.extensions.data_file) {
        std::fs::File::create(dir.path(data)).unwrap().set_len(size).unwrap();
    }
    image
}

/// Goal: foreign images of every kind read as their author wrote them. Method: qemu-img and qemu-io make them, both
/// sides read them whole, in steps that do and do not match clusters.
#[test]
fn foreign_images_read_the_same() {
    let engine = start(2);
    let dir = Scratch::new();
    let size = 3 << 20;
    qemu_img(&dir, &["create", "-q", "-f", "raw", "base.raw", "2M"]);
    qemu_io(&dir, &["-f", "raw", "-c", "write -P 7 0 1M", "-c", "write -P 8 1500k 300k", "base.raw"]);
    for opts in [
        "compat=v2",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=1",
        "extended_l2=on",
        "compression_type=zstd,lazy_refcounts=on",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,extended_l2=on,cluster_size=16k",
        "data_file=d.raw",
    ] {
        let (rc, _, err) = qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "3M"]);
        assert_eq!(rc, 0, "{opts}: {err}");
        let mut cmds: Vec<String> = Vec::new();
        let mut random = Random::new(5);
        for i in 1..60 {
            let at = random.below(size - (100 << 10)) & !511;
            let len = (random.below(90 << 10) & !511) + 512;
            let what = match i % 5 {
                0 if !opts.contains("v2") => format!("write -z {at} {len}"),
                1 if !opts.contains("data_file") && !opts.contains("extended") => {
                    let cluster = 65536;
                    format!("write -c -P {i} {} {cluster}", at & !(cluster - 1))
                }
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {i} {at} {len}"),
            };
            cmds.push(what);
        }
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        cmds.iter().for_each(|c| args.extend(["-c", c]));
        args.push("a.qcow2");
        qemu_io(&dir, &args);
        let (rc, _, err) = qemu_img(&dir, &["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "a.raw"]);
        assert_eq!(rc, 0, "{opts}: {err}");
        let want = std::fs::read(dir.path("a.raw")).unwrap();
        let extra = if opts.contains("data_file") {
            serde_json::json!({"read-only": true, "data-file": {"driver": "file", "filename": dir.path("d.raw")}})
        } else {
            serde_json::json!({"read-only": true})
        };
        for step in [512, 10 << 10, 1 << 20] {
            let root = attach(&engine, json(&dir, "a.qcow2", extra.clone()), false).unwrap();
            let got = engine.run(1, move || Box::pin(read_all(root, size, step))).unwrap();
            let differ = got.iter().zip(&want).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{opts} step {step}");
            detach(&engine).unwrap();
        }
    }
}
