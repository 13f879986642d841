//! The kinds of images whose runs are recorded: small, so that tables and counters grow within tens of requests.

use std::path::Path;
use std::sync::Arc;

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_drivers::format::qcow2::{Qcow2, check::CheckReport, check::Repair};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_drivers::protocol::file;
use ringblock_engine::driver::{Preallocation, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::{Image, SECTOR, Setup, lock};
use ringblock_engine::path::Root;
use serde_json::{Value, json};

use crate::past;
pub use crate::past::Past;
use crate::record::{Roles, Tape};

/// One kind of image, on one kind of disk.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name on the command line.
    pub name: &'static str,
    /// How the image is made.
    pub options: CreateOptions,
    /// Sectors of the backing file; 0: there is none.
    pub base: usize,
    /// More options of the node.
    pub more: Value,
    /// Request alignment of the disk, bytes.
    pub align: u32,
    /// What is never torn, bytes.
    pub unit: usize,
    /// How often it is chosen.
    pub weight: u32,
    /// What happened to it before.
    pub past: Past,
    /// States of one run, at most: what takes long is looked at less.
    pub most: u64,
    /// A file without a format.
    pub flat: bool,
}

impl Case {
    fn new(name: &'static str, cluster_size: u64, size: u64) -> Case {
        let options = CreateOptions { size, cluster_size, ..CreateOptions::default() };
        let (past, most) = (Past::New, u64::MAX);
        Case {
            name,
            options,
            base: 0,
            more: json!({}),
            align: 1,
            unit: 512,
            weight: 4,
            past,
            most,
            flat: false,
        }
    }

    /// With this past.
    pub fn past(mut self, past: Past) -> Case {
        self.past = past;
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Case)) -> Case {
        change(&mut self);
        self
    }

    fn backed(mut self, sectors: usize) -> Case {
        self.base = sectors;
        self.options.backing_file = Some("base".into());
        self.options.backing_format = Some("raw".into());
        self
    }

    /// Sectors of the guest's disk.
    pub fn sectors(&self) -> usize {
        (self.options.size / SECTOR) as usize
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.options.cluster_size
    }

    /// Whether clusters can be written compressed.
    pub fn compresses(&self) -> bool {
        self.options.data_file.is_none() && !self.flat
    }

    /// A new image in a world, with a tape whose guests know what is in the backing file.
    pub fn start(&self, seed: u64, cores: usize) -> (Setup, Roles, Tape) {
        if self.flat {
            return self.start_flat(seed, cores);
        }
        let new = create::create(&self.options).expect("valid options");
        let mut image = Image::default();
        image.set_len(new.file_size);
        for (at, data) in new.writes() {
            image.write(at.0, &data);
        }
        let tape = Tape::new(self.sectors());
        let mut roles = Roles { image: "/img".into(), data: None, backing: None, sectors: self.sectors() };
        let mut setup = Setup::new(seed, cores).file("/img", image);
        setup.align = self.align;
        if self.base > 0 {
            let mut base = vec![0; self.base * SECTOR as usize];
            let seen = self.base.min(self.sectors());
            let mut oracle = lock(&tape.oracle);
            let stamp = oracle.write(0, &mut base[..seen * SECTOR as usize]);
            oracle.wrote_through(0..seen, stamp, true);
            // what lies behind the end of the disk may never be seen
            base[seen * SECTOR as usize..].fill(0xba);
            drop(oracle);
            setup = setup.file("/base", Image::from_bytes(&base));
            roles.backing = Some("/base".into());
        }
        if let Some(len) = new.data_file_size {
            let mut data = Image::default();
            data.set_len(len);
            setup = setup.file("/data", data);
            roles.data = Some("/data".into());
        }
        (past::live_through(self, setup, &tape, self.past), roles, tape)
    }

    fn start_flat(&self, seed: u64, cores: usize) -> (Setup, Roles, Tape) {
        let mut image = Image::default();
        image.set_len(self.options.size);
        let mut setup = Setup::new(seed, cores).file("/img", image);
        setup.align = self.align;
        (setup, crate::judge::plain("/img", self.sectors()), Tape::new(self.sectors()))
    }

    /// Makes the image with the engine, in a world where its files are not there yet.
    ///
    /// # Errors
    /// Those of the files.
    pub async fn create(&self) -> Result<(), Error> {
        let new = create::create(&self.options)?;
        if let Some(size) = new.data_file_size {
            file::create(Path::new("/data"), size, Preallocation::Off).await?;
        }
        file::create(Path::new("/img"), new.file_size, Preallocation::Off).await?;
        let node = json!({"driver": "file", "node-name": "new", "filename": "/img"});
        let root = attach(node, true).await?;
        new.write_to(&root).await?;
        let graph = Graph::current();
        graph.detach(root).await?;
        graph.del("new").await
    }

    /// The options of its node, called `n`.
    pub fn node(&self, read_only: bool) -> Value {
        if self.flat {
            return json!({
                "driver": "file", "node-name": "n", "read-only": read_only, "discard": "unmap", "filename": "/img",
            });
        }
        let mut node = json!({
            "driver": "qcow2", "node-name": "n", "read-only": read_only, "discard": "unmap",
            "file": {"driver": "file", "filename": "/img"},
            "backing": null,
        });
        let map = node.as_object_mut().expect("an object");
        if self.base > 0 {
            let file = json!({"driver": "file", "filename": "/base"});
            map.insert("backing".into(), json!({"driver": "raw", "read-only": true, "file": file}));
        }
        if self.options.data_file.is_some() {
            map.insert("data-file".into(), json!({"driver": "file", "filename": "/data"}));
        }
        map.extend(self.more.as_object().expect("an object").clone());
        node
    }
}

/// Opens an image and attaches a guest to it.
///
/// # Errors
/// Those of opening.
pub async fn attach(node: Value, writable: bool) -> Result<Root, Error> {
    let options: BlockdevOptions = from_json(&node)?;
    let graph = Graph::current();
    let node = graph.add(open::node(options)?).await?;
    let perm = if writable { perm::CONSISTENT_READ | perm::WRITE } else { perm::CONSISTENT_READ };
    graph.attach(RootSpec { node, perm, shared: perm::ALL, user: "the guest".into(), throttle: None }).await
}

/// What our own check says of the open image.
///
/// # Errors
/// Those of the check.
pub async fn own_check(repair: Repair) -> Result<CheckReport, Error> {
    let info = Graph::current().info();
    let node = info.nodes.iter().find(|n| n.name == "n").ok_or_else(|| Error::invalid("no node"))?;
    let driver = Arc::clone(&node.driver);
    let qcow2 = driver.as_any().downcast_ref::<Qcow2>().ok_or_else(|| Error::invalid("no qcow2"))?;
    qcow2.check(repair).await
}

/// All kinds.
pub fn cases() -> Vec<Case> {
    let data = |c: &mut Case| c.options.data_file = Some("data".into());
    let old = |c: &mut Case| c.options.version = 2;
    // what was freed is still there
    let keep = |c: &mut Case| c.more = json!({"pass-discard-request": false});
    let wide = |c: &mut Case| c.options.refcount_bits = 64;
    vec![
        Case::new("512", 512, 40 << 10).with(|c| {
            c.options.refcount_bits = 64;
            c.weight = 8;
        }),
        Case::new("512-bits1", 512, 40 << 10).with(|c| c.options.refcount_bits = 1),
        Case::new("512-lazy", 512, 40 << 10).with(|c| {
            c.options.refcount_bits = 64;
            c.options.lazy_refcounts = true;
        }),
        Case::new("1k", 1024, 48 << 10).with(|c| c.weight = 8),
        Case::new("2k", 2048, 64 << 10),
        Case::new("4k", 4096, 96 << 10).with(|c| c.weight = 6),
        Case::new("4k-lazy", 4096, 96 << 10).with(|c| c.options.lazy_refcounts = true),
        Case::new("64k", 65536, 512 << 10).with(|c| c.weight = 1),
        Case::new("v2", 1024, 48 << 10).with(old),
        Case::new("v2-backed", 1024, 48 << 10).with(old).backed(70),
        Case::new("backed", 512, 32 << 10).backed(50),
        Case::new("backed-4k", 4096, 64 << 10).backed(200),
        Case::new("subclusters", 16384, 96 << 10).with(|c| {
            c.options.extended_l2 = true;
            c.weight = 3;
        }),
        Case::new("subclusters-backed", 16384, 96 << 10)
            .with(|c| {
                c.options.extended_l2 = true;
                c.weight = 3;
            })
            .backed(150),
        Case::new("data-file", 1024, 48 << 10).with(data),
        Case::new("data-file-raw", 1024, 48 << 10).with(data).with(|c| c.options.data_file_raw = true),
        Case::new("direct", 512, 32 << 10).with(|c| {
            c.options.refcount_bits = 64;
            c.align = 512;
        }),
        Case::new("direct-4k", 4096, 64 << 10).with(|c| c.align = 512),
        Case::new("blocks", 2048, 48 << 10).with(|c| (c.align, c.unit) = (4096, 4096)),
        Case::new("blocks-4k", 4096, 64 << 10).with(|c| (c.align, c.unit) = (4096, 4096)),
        Case::new("torn-4k", 1024, 48 << 10).with(|c| c.unit = 4096),
        // with a past
        Case::new("512-16", 512, 40 << 10).past(Past::Written),
        Case::new("snapshot", 512, 40 << 10).past(Past::Snapshot),
        Case::new("snapshot-4k", 4096, 64 << 10).past(Past::Snapshot),
        Case::new("holes", 512, 24 << 10).past(Past::Holes).with(wide).with(keep),
        Case::new("holes-2k", 2048, 48 << 10).past(Past::Holes).with(wide),
        Case::new("gaps", 2048, 48 << 10).past(Past::Gaps).with(wide).with(keep),
        Case::new("backed-written", 2048, 48 << 10).backed(120).past(Past::Written),
        Case::new("worn", 512, 32 << 10).past(Past::Worn).with(|c| {
            c.options.refcount_bits = 64;
            (c.weight, c.most) = (1, 4000);
        }),
        Case::new("wide", 512, 200 << 10).with(|c| {
            c.options.refcount_bits = 64;
            (c.weight, c.most) = (1, 4000);
        }),
        // a disk that is about to need a larger L1 table
        Case::new("tall", 512, (2 << 20) - (8 << 10)).with(|c| (c.weight, c.most) = (1, 600)),
    ]
}

/// Images that only some scenarios use: what is found there is not judged by the crash contract alone.
pub fn special() -> Vec<Case> {
    let small = |name, past| Case::new(name, 512, 40 << 10).past(past);
    vec![
        small("bitmap", Past::Bitmap),
        small("foreign", Past::Foreign),
        small("undercounted", Past::Undercounted),
        small("miscounted", Past::Miscounted),
        small("uncounted", Past::Uncounted),
        small("cut-off", Past::CutOff),
        Case::new("flat", 4096, 32 << 10).with(|c| c.flat = true),
        Case::new("flat-blocks", 4096, 24 << 10).with(|c| (c.flat, c.align, c.unit) = (true, 4096, 4096)),
    ]
}

/// The kind of this name.
pub fn named(name: &str) -> Option<Case> {
    cases().into_iter().chain(special()).find(|c| c.name == name)
}
