//! Shapes: what image, on what disk, and what its clients do, all from one seed.
//!
//! ```text
//!   seed ─► Shape { files, node, grid, mix, cores, clients, faults } ─► simulator | real ring | NBD
//! ```

use std::path::Path;

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_engine::host::sim::{Faults, Rng};
use serde_json::{Value, json};

use super::history::Grid;

/// The value that cells of a backing file, or of a disk filled before, hold at the beginning.
pub const BASE: u64 = 1;
/// The value that compressed clusters hold at the beginning.
pub const PACKED: u64 = 2;

/// What clients do, in relative weights.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Reads.
    pub reads: u64,
    /// Writes of data.
    pub writes: u64,
    /// Writes of zeroes, of either kind.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Cells of one request, at most.
    pub longest: u32,
    /// Writes with FUA, per thousand.
    pub fua: u32,
}

/// One kind of disk and load.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Its name, for messages.
    pub name: &'static str,
    /// The qcow2 image; `None` is raw.
    pub image: Option<CreateOptions>,
    /// Cells.
    pub grid: Grid,
    /// Cells of the backing file, or of a raw file, that hold data at the beginning.
    pub base: u32,
    /// Clusters written compressed before the clients come, per thousand.
    pub packed: u32,
    /// More options of the node.
    pub more: Value,
    /// Request alignment of the disk.
    pub align: u32,
    /// Cores.
    pub cores: usize,
    /// Clients, each with one request at a time.
    pub clients: u32,
    /// What they do.
    pub mix: Mix,
    /// What goes wrong in the simulator.
    pub faults: Faults,
    /// Whether requests may fail.
    pub failing: bool,
    /// Whether somebody resizes, reopens and attaches meanwhile.
    pub disturbed: bool,
}

const NAMES: [&str; 12] = [
    "raw",
    "512",
    "1k",
    "4k",
    "64k",
    "v2",
    "backed",
    "subclusters",
    "data-file",
    "packed",
    "evicting",
    "detecting",
];

impl Shape {
    /// The shape of a seed.
    pub fn of(seed: u64) -> Shape {
        let mut rng = Rng::new(seed ^ 0x5ba9e);
        let name = rng.pick(&NAMES);
        let mut s = Shape {
            name,
            image: None,
            grid: rng.pick(&[
                Grid { stride: 512, margin: 0, cells: 0 },
                Grid { stride: 512, margin: 0, cells: 0 },
                Grid { stride: 512, margin: 5, cells: 0 },
                Grid { stride: 64, margin: 0, cells: 0 },
                Grid { stride: 64, margin: 4, cells: 0 },
                Grid { stride: 16, margin: 0, cells: 0 },
            ]),
            base: 0,
            packed: 0,
            more: json!({}),
            align: rng.pick(&[1, 1, 1, 512, 4096]),
            cores: 1 + rng.below(4) as usize,
            clients: 3 + rng.below(10) as u32,
            mix: Mix { reads: 60, writes: 40, zeroes: 10, discards: 10, flushes: 3, longest: 24, fua: 30 },
            faults: Faults::default(),
            failing: false,
            disturbed: rng.chance(300),
        };
        s.take_load(&mut rng);
        s.take_image(&mut rng);
        s.take_faults(&mut rng);
        s
    }

    fn take_load(&mut self, rng: &mut Rng) {
        let m = &mut self.mix;
        match rng.below(5) {
            0 => (m.reads, m.longest) = (150, 8),
            1 => (m.zeroes, m.discards, m.flushes) = (30, 60, 20),
            2 => (m.writes, m.fua) = (100, 200),
            3 => m.longest = 80,
            _ => {}
        }
    }

    /// Small disks: everybody meets everybody.
    fn take_image(&mut self, rng: &mut Rng) {
        let (cluster, size): (u64, u64) = match self.name {
            "raw" => (0, 48 << 10),
            "512" => (512, 48 << 10),
            "1k" => (1024, 64 << 10),
            "4k" | "backed" | "data-file" | "packed" | "detecting" => (4096, 128 << 10),
            "v2" => (2048, 96 << 10),
            "subclusters" => (16384, 256 << 10),
            // more slices than the cache has frames
            "evicting" => (512, 1 << 20),
            _ => (65536, 512 << 10),
        };
        // small cells make small disks, or nobody would meet
        let stride = self.grid.stride;
        let size = if stride < 512 && self.name != "evicting" { (size / 4).max(2 * cluster) } else { size };
        self.grid.cells = (size / stride) as u32;
        if self.name == "raw" {
            self.base = if rng.chance(500) { self.grid.cells } else { 0 };
            return;
        }
        let mut o = CreateOptions { size, cluster_size: cluster, ..CreateOptions::default() };
        match self.name {
            "512" => o.refcount_bits = 64,
            "v2" => o.version = 2,
            "backed" => self.base = self.grid.cells * 3 / 4,
            "subclusters" => {
                o.extended_l2 = true;
                self.base = self.grid.cells / 2;
            }
            "data-file" => o.data_file = Some("data".into()),
            "packed" => self.packed = 600,
            "evicting" => self.more = json!({"l2-cache-size": 8192}),
            "detecting" => self.more = json!({"detect-zeroes": "unmap"}),
            _ => {}
        }
        self.image = Some(o);
    }

    fn take_faults(&mut self, rng: &mut Rng) {
        let long = Faults { stalled: 15, stall_ns: 20_000_000, ..Faults::default() };
        (self.faults, self.failing) = match rng.below(8) {
            0..=2 => (Faults::default(), false),
            3..=4 => (Faults::benign(), false),
            5 => (long, false),
            6 => (Faults { write_error: 4, read_error: 4, ..Faults::benign() }, true),
            _ => (Faults { no_space: 6, flush_error: 20, ..long }, true),
        };
        // what closing and reopening do when the disk fails is the fault matrix' business
        self.disturbed &= !self.failing;
    }

    /// The files at the beginning, by name.
    pub fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, String> {
        let mut base = vec![0; (u64::from(self.base) * self.grid.stride) as usize];
        self.grid.fill(BASE, 0, &mut base);
        let Some(options) = &self.image else {
            base.resize(self.grid.size() as usize, 0);
            return Ok(vec![("img", base)]);
        };
        let new = create::create(options).map_err(|e| e.to_string())?;
        let mut image = vec![0; new.file_size as usize];
        for (at, data) in new.writes() {
            let end = at.0 as usize + data.len();
            if image.len() < end {
                image.resize(end, 0);
            }
            image[at.0 as usize..end].copy_from_slice(&data);
        }
        let mut files = vec![("img", image)];
        if self.base > 0 {
            files.push(("base", base));
        }
        if let Some(len) = new.data_file_size {
            files.push(("data", vec![0; len as usize]));
        }
        Ok(files)
    }

    /// The values of all cells at the beginning.
    pub fn initial(&self) -> Vec<u64> {
        (0..self.grid.cells).map(|c| if c < self.base { BASE } else { 0 }).collect()
    }

    /// The options of the node `n`, with its files in a folder. `direct` passes by the page cache.
    pub fn node(&self, dir: &Path, direct: bool) -> Value {
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let cache = json!({"direct": direct});
        let file = |name: &str| json!({"driver": "file", "filename": path(name), "cache": cache, "discard": "unmap"});
        let driver = if self.image.is_some() { "qcow2" } else { "raw" };
        let mut node = json!({
            "driver": driver, "node-name": "n", "discard": "unmap", "cache": cache, "file": file("img"),
        });
        if let (Some(options), Some(map)) = (&self.image, node.as_object_mut()) {
            let mut backing = Value::Null;
            if self.base > 0 {
                let base = json!({"driver": "file", "filename": path("base"), "cache": cache});
                backing = json!({"driver": "raw", "read-only": true, "file": base});
            }
            map.insert("backing".into(), backing);
            if options.data_file.is_some() {
                map.insert("data-file".into(), file("data"));
            }
        }
        if let (Some(map), Some(more)) = (node.as_object_mut(), self.more.as_object()) {
            map.extend(more.clone());
        }
        node
    }

    /// In a few words.
    pub fn describe(&self) -> String {
        let (g, failing) = (&self.grid, if self.failing { ", failing" } else { "" });
        let disturbed = if self.disturbed { ", disturbed" } else { "" };
        format!(
            "{}, cells of {} bytes every {}, disk aligned to {}, {} cores, {} clients{failing}{disturbed}",
            self.name,
            g.stride - 2 * g.margin,
            g.stride,
            self.align,
            self.cores,
            self.clients
        )
    }
}
