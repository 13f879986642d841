//! Recipes: the qcow2 feature combinations that both programs must understand, and content for them.
//!
//! Content is made here, not by either program: [`Content`] keeps what a disk must read as, byte by byte, and
//! turns its steps into `qemu-io` commands.

use crate::dir::TestDir;
use crate::rng::Rng;
use crate::tools::{self, Cmd};

/// How an image is made.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// A short name, for messages and file names.
    pub name: &'static str,
    /// The value of `-o` at creation, without names of other files.
    pub options: &'static str,
    /// What it stands on.
    pub base: Base,
}

/// What lies under an image or beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    None,
    /// A chain of backing files with relative names; the nearest first. All but the last are qcow2 with 4 KiB
    /// clusters; the last is raw and shorter than the disk.
    Chain(usize),
    /// An external data file; `true`: readable as raw.
    DataFile(bool),
}

const fn plain(name: &'static str, options: &'static str) -> Recipe {
    Recipe { name, options, base: Base::None }
}

const fn chain(name: &'static str, options: &'static str, depth: usize) -> Recipe {
    Recipe { name, options, base: Base::Chain(depth) }
}

/// All combinations.
pub const RECIPES: &[Recipe] = &[
    plain("v3", "compat=1.1"),
    plain("v2", "compat=0.10"),
    plain("c512", "cluster_size=512"),
    plain("c1k-v2", "cluster_size=1024,compat=0.10"),
    plain("c4k", "cluster_size=4096"),
    plain("c2m", "cluster_size=2097152"),
    plain("rc1", "refcount_bits=1"),
    plain("rc2", "refcount_bits=2,cluster_size=4096"),
    plain("rc4", "refcount_bits=4"),
    plain("rc8", "refcount_bits=8,cluster_size=512"),
    plain("rc32", "refcount_bits=32"),
    plain("rc64", "refcount_bits=64,cluster_size=4096"),
    plain("lazy", "lazy_refcounts=on"),
    plain("ext-l2", "extended_l2=on"),
    plain("ext-l2-16k", "extended_l2=on,cluster_size=16384"),
    plain("zstd", "compression_type=zstd"),
    plain("prealloc-metadata", "preallocation=metadata"),
    plain("prealloc-falloc", "preallocation=falloc"),
    chain("chain1", "compat=1.1", 1),
    chain("chain3", "cluster_size=65536", 3),
    chain("chain-v2", "compat=0.10", 2),
    chain("chain-c512", "cluster_size=512", 1),
    chain("chain-ext-l2", "extended_l2=on", 2),
    chain("chain-lazy-c2m", "lazy_refcounts=on,cluster_size=2097152", 1),
    Recipe { name: "data-file", options: "cluster_size=65536", base: Base::DataFile(false) },
    Recipe { name: "data-file-raw", options: "cluster_size=4096", base: Base::DataFile(true) },
    Recipe { name: "data-file-ext-l2", options: "extended_l2=on", base: Base::DataFile(false) },
];

impl Recipe {
    /// Makes the image with `img` (a program with `qemu-img`'s command line) in `dir`; returns its path. What
    /// the disk reads as goes into `content`.
    pub fn make(&self, dir: &TestDir, img: fn() -> Cmd, content: &mut Content) -> String {
        let name = format!("{}.qcow2", self.name);
        let mut options = self.options.to_string();
        let mut cmd = img().dir(dir.path()).line("create -q -f qcow2");
        match self.base {
            Base::None => {}
            Base::Chain(depth) => {
                let format = if depth == 1 { "raw" } else { "qcow2" };
                let base = self.make_chain(dir, depth, content);
                cmd = cmd.arg("-b").arg(base).arg("-F").arg(format);
            }
            Base::DataFile(raw) => {
                let raw = if raw { "on" } else { "off" };
                // A full name: QEMU looks for a relative one from the current directory, not from the image's.
                options = format!("{options},data_file={},data_file_raw={raw}", self.data_file(dir));
            }
        }
        cmd.arg("-o").arg(options).arg(&name).arg(content.size().to_string()).ok();
        dir.file(&name)
    }

    /// The external data file's path, used only by recipes that have one.
    pub fn data_file(&self, dir: &TestDir) -> String {
        dir.file(&format!("{}.data", self.name))
    }

    /// The image as the tools take it after `--image-opts`: its data file is named there, for a file that only
    /// the image names is not opened.
    pub fn spec(&self, dir: &TestDir, image: &str) -> String {
        let mut spec = format!("driver=qcow2,file.driver=file,file.filename={image}");
        if let Base::DataFile(_) = self.base {
            spec += &format!(",data-file.driver=file,data-file.filename={}", self.data_file(dir));
        }
        spec
    }

    /// The node `q` for the image of this recipe, its data file named: a daemon opens no file that only the
    /// image names.
    pub fn node(&self, dir: &TestDir, image: &str) -> String {
        let mut options = format!(
            "driver=qcow2,node-name=q,discard=unmap,file.driver=file,file.discard=unmap,file.filename={image}"
        );
        if let Base::DataFile(_) = self.base {
            let data = self.data_file(dir);
            options += &format!(",data-file.driver=file,data-file.discard=unmap,data-file.filename={data}");
        }
        options
    }

    /// Makes the backing chain below the image with the peer's tools, with content in every layer. Returns
    /// the relative name of the nearest layer.
    fn make_chain(&self, dir: &TestDir, depth: usize, content: &mut Content) -> String {
        // The deepest layer lies in a folder of its own, so that relative names have something to do.
        let sub = format!("{}-base", self.name);
        std::fs::create_dir_all(dir.path().join(&sub)).expect("a folder can be made");
        let short = content.size() / 2 + 512;
        let layer = |n: usize| format!("{}-l{n}", self.name);
        let bottom = format!("{sub}/bottom.raw");
        content.patch(&mut Rng::new(77), short, 6);
        std::fs::write(dir.path().join(&bottom), &content.bytes[..short as usize]).expect("write");
        let mut below = (bottom, "raw");
        for n in (1..depth).rev() {
            let create = tools::qemu_img().dir(dir.path()).line("create -q -f qcow2 -o cluster_size=4096");
            create
                .arg("-b")
                .arg(&below.0)
                .arg("-F")
                .arg(below.1)
                .arg(layer(n))
                .arg(content.size().to_string())
                .ok();
            let steps = content.steps(&mut Rng::new(n as u64), 8);
            run_io(tools::qemu_io, dir, &layer(n), &steps);
            below = (layer(n), "qcow2");
        }
        below.0
    }
}

/// What a disk must read as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Every byte of the disk.
    pub bytes: Vec<u8>,
}

impl Content {
    /// A disk of `size` zeroes.
    pub fn new(size: u64) -> Self {
        Self { bytes: vec![0; size as usize] }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Changes `count` random ranges below `limit` directly (used for raw files made here).
    pub fn patch(&mut self, rng: &mut Rng, limit: u64, count: usize) {
        for _ in 0..count {
            let (offset, len) = range(rng, limit);
            rng.fill(&mut self.bytes[offset as usize..(offset + len) as usize]);
        }
    }

    /// `count` random writes and zero-writes: changes the content and returns the commands that do the same.
    pub fn steps(&mut self, rng: &mut Rng, count: usize) -> Vec<String> {
        let mut commands = Vec::new();
        for _ in 0..count {
            let (offset, len) = range(rng, self.size());
            let target = &mut self.bytes[offset as usize..(offset + len) as usize];
            match rng.below(8) {
                0 => {
                    target.fill(0);
                    commands.push(format!("write -z {offset} {len}"));
                }
                1 => {
                    target.fill(0);
                    commands.push(format!("write -z -u {offset} {len}"));
                }
                _ => {
                    let pattern = 1 + rng.below(255) as u8;
                    target.fill(pattern);
                    let flags = if rng.chance(15) { "-f " } else { "" };
                    commands.push(format!("write {flags}-P {pattern} {offset} {len}"));
                }
            }
            if rng.chance(10) {
                commands.push("flush".to_string());
            }
        }
        commands
    }

    /// Fails unless the file `raw` holds exactly this content.
    pub fn expect_raw(&self, raw: &str, what: &str) {
        let found = std::fs::read(raw).unwrap_or_else(|e| panic!("{raw}: {e}"));
        self.expect_bytes(&found, what);
    }

    /// Fails unless `found` is exactly this content.
    pub fn expect_bytes(&self, found: &[u8], what: &str) {
        if found == self.bytes {
            return;
        }
        assert_eq!(found.len(), self.bytes.len(), "{what}: the length differs");
        let at = found.iter().zip(&self.bytes).position(|(a, b)| a != b).unwrap_or(0);
        let wrong = found.iter().zip(&self.bytes).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {wrong} bytes differ, the first at {at} ({at:#x}): {:#x}, should be {:#x}",
            found[at], self.bytes[at]
        );
    }

    /// Writes the content to a raw file.
    pub fn save(&self, path: &str) {
        std::fs::write(path, &self.bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

/// A random range: mostly small and ragged, sometimes aligned or large.
fn range(rng: &mut Rng, limit: u64) -> (u64, u64) {
    let unit = *rng.pick(&[1u64, 512, 4096, 65536]);
    let max = *rng.pick(&[4096u64, 20_000, 150_000, 700_000]);
    let offset = rng.below(limit) / unit * unit;
    let len = (1 + rng.below(max)).next_multiple_of(unit).min(limit - offset);
    (offset, len)
}

/// Runs `commands` on a qcow2 image through `io` (a program with `qemu-io`'s command line).
pub fn run_io(io: fn() -> Cmd, dir: &TestDir, image: &str, commands: &[String]) {
    run_io_on(io, dir, &["-f", "qcow2", image], commands);
}

/// Likewise; `image` are the arguments that name it.
pub fn run_io_on(io: fn() -> Cmd, dir: &TestDir, image: &[&str], commands: &[String]) {
    let mut cmd = io().dir(dir.path()).line("-d unmap");
    for command in commands {
        cmd = cmd.arg("-c").arg(command);
    }
    cmd.args(image).ok();
}

/// Fails unless the peer's check finds nothing at all wrong, not even a leak.
pub fn check_clean(image: &str) {
    tools::qemu_img().line("check -q -f qcow2").arg(image).ok();
}

/// Fails if the peer's check finds an error; leaks are allowed. Returns the number of leaked clusters.
pub fn check_no_errors(image: &str) -> u64 {
    let out = tools::qemu_img().line("check --output=json -f qcow2").arg(image).run();
    assert!(out.code == 0 || out.code == 3, "{}", out.describe());
    let report = out.json();
    assert!(report["corruptions"].is_null() && report["check-errors"] == 0, "{}", out.describe());
    report["leaks"].as_u64().unwrap_or(0)
}
