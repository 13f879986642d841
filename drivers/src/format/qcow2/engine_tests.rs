//! Tests of the whole driver on a running engine, against QEMU's tools and a model in memory.

use std::rc::Rc;

use ringblock_engine::driver::{Flags, LocalFuture, perm};
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::{Config, Engine, Errno, Error};

use super::create::{self, CreateOptions, NewImage};

use super::header::CompressionType;
use super::testkit::{Random, Scratch, qemu_img, qemu_io};
use crate::open;
use crate::options::blockdev::BlockdevOptions;
use crate::options::from_json;

/// Runs a task beside the graph.
pub(super) fn on_graph<T, F>(engine: &Engine, f: F) -> T
where
    T: Send + 'static,
    F: FnOnce(Rc<Graph>) -> LocalFuture<'static, T> + Send + 'static,
{
    engine.run(0, move || f(Graph::current()))
}

pub(super) fn start(cores: usize) -> Engine {
    Engine::start(&Config { cores, ..Config::default() }).unwrap()
}

/// Opens a qcow2 node "disk" on a file and attaches to it.
pub(super) fn attach(engine: &Engine, options: serde_json::Value, writable: bool) -> Result<Root, Error> {
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

pub(super) fn detach(engine: &Engine) -> Result<(), Error> {
    on_graph(engine, |graph| Box::pin(async move { graph.shutdown().await }))
}

pub(super) fn json(dir: &Scratch, name: &str, extra: serde_json::Value) -> serde_json::Value {
    let mut all = serde_json::json!({
        "driver": "qcow2", "node-name": "disk", "discard": "unmap",
        "file": {"driver": "file", "filename": dir.path(name)},
    });
    if let (Some(all), serde_json::Value::Object(extra)) = (all.as_object_mut(), extra) {
        all.extend(extra);
    }
    all
}

pub(super) async fn read_all(root: Root, size: u64, step: u64) -> Result<Vec<u8>, Errno> {
    let mut out = Vec::with_capacity(size as usize);
    while (out.len() as u64) < size {
        let n = step.min(size - out.len() as u64);
        let (result, buf) = root.read(out.len() as u64, Buf::new(n as usize)).await;
        result?;
        out.extend_from_slice(&buf);
    }
    Ok(out)
}

pub(super) fn make(dir: &Scratch, name: &str, options: &CreateOptions) -> NewImage {
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

/// What a run of random operations works on.
#[derive(Clone)]
struct Case {
    options: CreateOptions,
    extra: serde_json::Value,
}

impl Case {
    fn new(options: CreateOptions) -> Case {
        Case { options, extra: serde_json::json!({}) }
    }
}

/// The combinations that a writer has to get right.
fn cases(size: u64) -> Vec<Case> {
    let d = CreateOptions { size, ..Default::default() };
    let backed = |o: CreateOptions| CreateOptions {
        backing_file: Some("base.raw".into()),
        backing_format: Some("raw".into()),
        ..o
    };
    let wide = CreateOptions { extended_l2: true, cluster_size: 16384, ..d.clone() };
    let external = CreateOptions { data_file: Some("d.raw".into()), ..d.clone() };
    let metadata = create::Preallocation::Metadata;
    let mut all: Vec<Case> = [
        d.clone(),
        backed(d.clone()),
        CreateOptions { cluster_size: 512, refcount_bits: 64, ..d.clone() },
        backed(CreateOptions { cluster_size: 512, refcount_bits: 1, ..d.clone() }),
        CreateOptions { cluster_size: 2 << 20, ..d.clone() },
        CreateOptions { version: 2, cluster_size: 4096, ..d.clone() },
        backed(CreateOptions { version: 2, ..d.clone() }),
        CreateOptions { preallocation: metadata, cluster_size: 4096, ..d.clone() },
        CreateOptions { lazy_refcounts: true, compression: CompressionType::Zstd, ..d.clone() },
        wide.clone(),
        backed(wide.clone()),
        CreateOptions { preallocation: metadata, ..wide },
        external.clone(),
        CreateOptions { data_file_raw: true, ..external.clone() },
        backed(external),
    ]
    .into_iter()
    .map(Case::new)
    .collect();
    let tiny_cache = serde_json::json!({"l2-cache-size": 4096, "refcount-cache-size": 2048});
    all.push(Case { options: CreateOptions { cluster_size: 512, ..d.clone() }, extra: tiny_cache.clone() });
    all.push(Case { options: backed(CreateOptions { cluster_size: 1024, ..d }), extra: tiny_cache });
    all
}

/// One random operation on a root and on the model; both must agree afterwards.
async fn random_op(root: Root, model: &mut [u8], random: &mut Random, stamp: u8) -> Result<(), Errno> {
    let size = model.len() as u64;
    let unit = [1, 512, 4096, 65536][random.below(4) as usize];
    let at = random.below(size) / unit * unit;
    let most = [600, 5000, 70_000, 1 << 20][random.below(4) as usize];
    let len = (1 + random.below(most)).next_multiple_of(unit).min(size - at);
    let place = at as usize..(at + len) as usize;
    match random.below(10) {
        0..5 => {
            let mut buf = Buf::new(len as usize);
            for (i, b) in buf.iter_mut().enumerate() {
                *b = stamp ^ (i / 512) as u8;
            }
            model[place].copy_from_slice(&buf);
            root.write(at, buf, Flags { fua: random.below(20) == 0, ..Flags::NONE }).await.0
        }
        5 => {
            model[place].fill(0);
            let flags = Flags { may_unmap: random.below(2) == 0, ..Flags::NONE };
            root.write_zeroes(at, len, flags).await
        }
        6 => {
            // Advice: what is read afterwards is old, or zero where a whole cluster went.
            root.discard(at, len).await?;
            let (result, buf) = root.read(at, Buf::new(len as usize)).await;
            result?;
            for (m, b) in model[place].iter_mut().zip(buf.iter()) {
                assert!(*b == *m || *b == 0, "discard exposes something else");
                *m = *b;
            }
            Ok(())
        }
        7 if random.below(4) == 0 => root.flush().await,
        _ => {
            let (result, buf) = root.read(at, Buf::new(len as usize)).await;
            result?;
            let differ = buf.iter().zip(&model[place]).position(|(a, b)| a != b);
            assert_eq!(differ, None, "read at {at} of {len}");
            Ok(())
        }
    }
}

/// qemu-img finds the image clean and equal to the model.
pub(super) fn agree(dir: &Scratch, what: &str, model: &[u8]) {
    let (rc, out, err) = qemu_img(dir, &["check", "-f", "qcow2", "a.qcow2"]);
    assert_eq!(rc, 0, "{what}\n{out}{err}");
    std::fs::write(dir.path("model.raw"), model).unwrap();
    let (rc, out, err) = qemu_img(dir, &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "model.raw"]);
    assert_eq!(rc, 0, "{what}\n{out}{err}");
}

fn extra_for(dir: &Scratch, case: &Case) -> serde_json::Value {
    let mut extra = case.extra.clone();
    if case.options.data_file.is_some() {
        extra["data-file"] = serde_json::json!({"driver": "file", "filename": dir.path("d.raw")});
    }
    extra
}

fn base_file(dir: &Scratch, size: u64) -> Vec<u8> {
    let base: Vec<u8> = (0..size).map(|i| 0x80 | (i / 3000) as u8).collect();
    std::fs::write(dir.path("base.raw"), &base).unwrap();
    base
}

fn model_of(case: &Case, base: &[u8], size: u64) -> Vec<u8> {
    let mut model = vec![0; size as usize];
    if case.options.backing_file.is_some() {
        model[..base.len()].copy_from_slice(base);
    }
    model
}

/// Goal: random writes, zeroes, discards and flushes leave what a plain array of bytes would hold, and an image that
/// qemu-img finds clean. Method: every combination, two seeds, reopened in the middle.
#[test]
fn random_operations_agree_with_a_model() {
    let engine = start(2);
    let size = (5 << 20) + 512 * 7;
    for (n, case) in cases(size).into_iter().enumerate() {
        let dir = Scratch::new();
        let base = base_file(&dir, 3 << 20);
        make(&dir, "a.qcow2", &case.options);
        let mut model = model_of(&case, &base, size);
        let mut random = Random::new(n as u64 + 1);
        for part in 0..3u8 {
            let root = attach(&engine, json(&dir, "a.qcow2", extra_for(&dir, &case)), true).unwrap();
            let (mut m, mut r) = (model, random);
            let core = usize::from(part % 2);
            let run = engine.run(core, move || {
                Box::pin(async move {
                    for i in 0..120u8 {
                        if let Err(e) =
                            random_op(root, &mut m, &mut r, part.wrapping_mul(120).wrapping_add(i)).await
                        {
                            return Err((i, e));
                        }
                    }
                    Ok((m, r))
                })
            });
            (model, random) = run.unwrap_or_else(|e| panic!("{:?}: {e:?}", case.options));
            detach(&engine).unwrap();
            agree(&dir, &format!("case {n} part {part} {:?}", case.options), &model);
        }
    }
}

/// Goal: many tasks on several cores writing, zeroing and discarding at once lose nothing. Method: each task owns the
/// blocks of 512 bytes with its number modulo the number of tasks, so that clusters are shared and contents are known.
#[test]
fn concurrent_operations_on_shared_clusters() {
    const TASKS: u64 = 8;
    let engine = start(3);
    let size = 2 << 20;
    for (n, case) in cases(size).into_iter().enumerate() {
        let dir = Scratch::new();
        let base = base_file(&dir, 1 << 20);
        make(&dir, "a.qcow2", &case.options);
        let root = attach(&engine, json(&dir, "a.qcow2", extra_for(&dir, &case)), true).unwrap();
        let start = model_of(&case, &base, size);
        let tasks: Vec<_> = (0..TASKS)
            .map(|t| {
                let mut mine = start.clone();
                engine.spawn_on((t % 3) as usize, move || {
                    Box::pin(async move {
                        let mut random = Random::new(n as u64 * 100 + t);
                        for i in 0..150u64 {
                            let block = random.below(size / 512 / TASKS) * TASKS + t;
                            let at = block * 512;
                            let place = at as usize..at as usize + 512;
                            let result = match random.below(8) {
                                0 => {
                                    mine[place].fill(0);
                                    root.write_zeroes(at, 512, Flags::NONE).await
                                }
                                1 => root.flush().await,
                                2 => {
                                    let (result, buf) = root.read(at, Buf::new(512)).await;
                                    assert!(
                                        buf[..] == mine[place],
                                        "task {t} op {i} reads something else at {at}"
                                    );
                                    result
                                }
                                _ => {
                                    let mut buf = Buf::new(512);
                                    buf.fill((t * 31 + i) as u8);
                                    mine[place].copy_from_slice(&buf);
                                    root.write(at, buf, Flags::NONE).await.0
                                }
                            };
                            result?;
                        }
                        Ok::<_, Errno>(mine)
                    })
                })
            })
            .collect();
        let mut model = start;
        for (t, task) in tasks.into_iter().enumerate() {
            let mine = ringblock_engine::sync::block_on(task).unwrap().unwrap();
            for block in (t..(size / 512) as usize).step_by(TASKS as usize) {
                model[block * 512..(block + 1) * 512].copy_from_slice(&mine[block * 512..(block + 1) * 512]);
            }
        }
        detach(&engine).unwrap();
        agree(&dir, &format!("case {n} {:?}", case.options), &model);
    }
}
