//! One sequence: an engine, its reference, and steps that are taken on both.
//!
//! ```text
//!   step ─► reference: answer ─┐
//!     └───► engine: answer ────┴─ the same? ─► listings the same? ─► refused: no trace?
//!   … ─► take everything down ─► nothing left ─► images: independent checker, contents as the reference has them
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringblock::daemon::Daemon;
use ringblock::qmp::dispatch::Registry;
use ringblock_checker::{Checker, Files as Parts};
use ringblock_drivers::format::qcow2::create::{CreateOptions, create};
use ringblock_tests::nbd::Nbd;
use ringblock_tests::{Rng, TestDir, tools};
use serde_json::{Value, json};

use super::files::{Content, Files, HostFile, Image, SECTOR};
use super::graph::{Common, User};
use super::guest::{self, Link};
use super::queries::Listing;
use super::step::Step;
use super::world::{FAMILIES, Refusal, World, family_of};
use super::{nodes, wrong};

/// Stands for the folder of the files, so that steps can be taken again in another.
const HERE: &str = "HERE/";

/// How long a client that has gone may count.
const LEAVING: Duration = Duration::from_secs(5);

/// What was done.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tally {
    pub(super) commands: u64,
    pub(super) refused: u64,
    pub(super) requests: u64,
    pub(super) images: u64,
    pub(super) compared: u64,
}

/// See the module.
pub(super) struct Session {
    world: World,
    daemon: Arc<Daemon>,
    registry: Registry<Daemon>,
    links: BTreeMap<usize, Link>,
    last: Listing,
    pub(super) tally: Tally,
    /// Last: it is removed when everything else is gone.
    dir: TestDir,
}

impl Session {
    /// An engine on fresh files. The same seed gives the same files.
    pub(super) fn new(seed: u64) -> Result<Session, String> {
        let dir = TestDir::in_memory("model");
        let files = make_files(&dir, &mut Rng::new(seed))?;
        let daemon = Daemon::start(2).map_err(|e| e.to_string())?;
        let registry = Daemon::registry();
        let world = World { files, socket: format!("{HERE}nbd"), ..World::default() };
        let last = Listing::ask(|name, args| registry.run(&daemon, name, args).map_err(|e| e.message))?;
        Ok(Session { world, daemon, registry, links: BTreeMap::new(), last, tally: Tally::default(), dir })
    }

    /// The next step, drawn for the state that there is.
    pub(super) fn draw(&self, rng: &mut Rng) -> Option<Step> {
        if !self.world.graph.nodes.is_empty() && rng.chance(45) {
            return guest::draw(rng, &self.world);
        }
        if rng.chance(10) {
            return Some(wrong::draw(rng));
        }
        let mut at = rng.below(FAMILIES.iter().map(|f| f.weight).sum());
        let family = FAMILIES.iter().find(|f| match at.checked_sub(f.weight) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        })?;
        let args = (family.draw)(rng, &self.world)?;
        Some(Step::Command { name: family.command, args })
    }

    /// Takes a step on both sides.
    pub(super) fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Command { name, args } => self.command(name, args)?,
            Step::Wrong { name, args, text } => {
                self.tally.commands += 1;
                let got = self.run(name, args).map(drop);
                self.refused(&Refusal::Text(vec![text.clone()]), got)?;
            }
            Step::Connect { slot, export } => self.connect(*slot, export)?,
            Step::Attach { slot, node, writable } => self.attach(*slot, node, *writable)?,
            Step::Leave { slot } => self.leave(*slot)?,
            Step::Request { slot, io } => {
                if let Some(link) = self.links.get_mut(slot) {
                    self.tally.requests += 1;
                    return guest::request(&mut self.world, *slot, link, io);
                }
            }
        }
        Ok(())
    }

    /// A name in the run's folder.
    fn real(&self, text: &str) -> String {
        text.replace(HERE, &self.dir.file(""))
    }

    fn run(&self, name: &str, args: &Value) -> Result<Value, String> {
        let args = serde_json::from_str(&self.real(&args.to_string())).map_err(|e| e.to_string())?;
        self.registry.run(&self.daemon, name, &args).map_err(|e| e.message)
    }

    fn listing(&self) -> Result<Listing, String> {
        Listing::ask(|name, args| self.run(name, args))
    }

    /// After something that succeeded: both sides list the same.
    fn compare(&mut self) -> Result<(), String> {
        let end = Instant::now() + LEAVING;
        loop {
            self.last = self.listing()?;
            // An export with clients may take a moment to go.
            if !self.last.is_leaving() || Instant::now() > end {
                return self.last.compare(&self.world);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// After something that the reference refused: so does the engine, with this text, and nothing has changed.
    fn refused(&mut self, wanted: &Refusal, got: Result<(), String>) -> Result<(), String> {
        let Refusal::Text(texts) = wanted else { return Ok(()) };
        match got {
            Ok(()) => return Err(format!("succeeded, but should be refused: {texts:?}")),
            Err(e) if !texts.iter().any(|t| e.contains(t.as_str())) => {
                return Err(format!("refused with {e:?}, not with {texts:?}"));
            }
            Err(_) => self.tally.refused += 1,
        }
        let (before, now) = (self.last.trace(), self.listing()?);
        if before != now.trace() {
            let (before, now) = (json!(before), json!(now.trace()));
            return Err(format!(
                "refused as it should, but it left a trace\n  before {before}\n  after  {now}"
            ));
        }
        Ok(())
    }

    /// Does it on both sides: `reference` may leave a mess when it refuses.
    fn both(
        &mut self,
        reference: impl FnOnce(&mut World) -> Result<(), Refusal>,
        engine: impl FnOnce(&mut Session) -> Result<(), String>,
    ) -> Result<(), String> {
        let before = self.world.graph.clone();
        let answer = reference(&mut self.world);
        if let Err(refusal) = answer {
            self.world.graph = before;
            if refusal == Refusal::Unknown {
                return Ok(());
            }
            self.tally.commands += 1;
            let got = engine(self);
            return self.refused(&refusal, got);
        }
        self.tally.commands += 1;
        engine(self).map_err(|e| format!("refused, but should succeed: {e}"))?;
        self.compare()
    }

    fn command(&mut self, name: &str, args: &Value) -> Result<(), String> {
        let Some(family) = family_of(name) else { return Err(format!("no family {name}")) };
        self.both(|w| (family.answer)(w, args), |s| s.run_patiently(name, args))?;
        // Whose export is gone sees the end of its connection.
        let users = &self.world.graph.users;
        self.links.retain(|slot, link| matches!(link, Link::Disk(_)) || users.contains_key(slot));
        Ok(())
    }

    /// A client that has just gone may still count for a moment.
    fn run_patiently(&mut self, name: &str, args: &Value) -> Result<(), String> {
        let end = Instant::now() + LEAVING;
        let id = args["id"].as_str().or(args["name"].as_str()).unwrap_or("");
        loop {
            let got = self.run(name, args).map(drop);
            match &got {
                Err(e)
                    if e.contains("still in use")
                        && self.world.graph.clients(id) == 0
                        && Instant::now() < end =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => return got,
            }
        }
    }

    fn connect(&mut self, slot: usize, name: &str) -> Result<(), String> {
        if self.links.contains_key(&slot) || !self.world.graph.server {
            return Ok(());
        }
        let found = self.world.graph.exports.iter().find(|(_, e)| e.name == name);
        let found = found.map(|(id, e)| (id.clone(), e.node));
        self.tally.commands += 1;
        match (Nbd::connect(&self.real(&self.world.socket), name), found) {
            (Err(_), None) => Ok(()),
            (Ok(_), None) => Err(format!("connected to {name:?}, which is no export")),
            (Err(e), Some(_)) => Err(format!("no connection to {name:?}: {e}")),
            (Ok(client), Some((export, node))) => {
                let size = client.size;
                if self.world.files.size(&self.world.graph, node).is_some_and(|s| s != size) {
                    return Err(format!("{name:?} shows a disk of {size} bytes"));
                }
                self.world.graph.users.insert(slot, User::Client { export, size });
                self.links.insert(slot, Link::Client(client));
                self.compare()
            }
        }
    }

    fn attach(&mut self, slot: usize, node: &str, writable: bool) -> Result<(), String> {
        if self.links.contains_key(&slot) {
            return Ok(());
        }
        self.both(
            |w| guest::attach(w, slot, node, writable),
            |s| {
                let disk = s.daemon.storage().and_then(|storage| storage.open(node, writable));
                disk.map(|disk| drop(s.links.insert(slot, Link::Disk(disk)))).map_err(|e| e.message)
            },
        )
    }

    fn leave(&mut self, slot: usize) -> Result<(), String> {
        self.world.graph.users.remove(&slot);
        self.world.graph.collect();
        match self.links.remove(&slot) {
            Some(Link::Client(client)) => client.close(),
            Some(Link::Disk(disk)) => disk.close().map_err(|e| format!("close: {}", e.message))?,
            None => return Ok(()),
        }
        self.compare()
    }

    /// Takes everything down and judges what is left of it.
    pub(super) fn finish(mut self, sample: bool) -> Result<Tally, String> {
        for slot in self.links.keys().copied().collect::<Vec<_>>() {
            self.leave(slot)?;
        }
        if self.world.graph.server {
            self.command("nbd-server-stop", &json!({}))?;
        }
        for thread in self.world.graph.threads.clone() {
            self.command("object-del", &json!({"id": thread}))?;
        }
        while let Some(name) = self.top() {
            self.command("blockdev-del", &json!({"node-name": name}))?;
        }
        if !self.listing()?.is_empty() {
            return Err("something is left when everything is taken down".into());
        }
        self.daemon.close().map_err(|e| format!("close: {}", e.message))?;
        self.images(sample)?;
        Ok(self.tally)
    }

    /// A node that can go.
    fn top(&self) -> Option<String> {
        let g = &self.world.graph;
        let free = g.nodes.iter().find(|(k, n)| n.monitor && g.parents(**k).next().is_none())?;
        free.1.name.clone()
    }

    /// Every file is as the reference has it; images are clean.
    fn images(&mut self, sample: bool) -> Result<(), String> {
        let mut checker = Checker::default();
        for file in 0..self.world.files.0.len() {
            let path = self.real(&self.world.files.0[file].path);
            let bytes = std::fs::read(&path).map_err(|e| format!("{path}: {e}"))?;
            let data = match &self.world.files.0[file].content {
                Content::Opaque => continue,
                Content::Bytes(wanted) if *wanted == bytes => continue,
                Content::Bytes(wanted) => {
                    return Err(format!(
                        "{path}: {} bytes, or others, and not {}",
                        bytes.len(),
                        wanted.len()
                    ));
                }
                Content::Image(image) => {
                    image.data_file.map(|d| std::fs::read(self.real(&self.world.files.0[d].path)))
                }
            };
            let data = data.transpose().map_err(|e| format!("{path}: its data file: {e}"))?;
            let below = self.shown(file, true)?;
            let parts = Parts { image: &bytes, data: data.as_deref(), backing: below.as_deref() };
            let report = checker.check(&parts);
            if report.exit_code() != 0 || report.dirty {
                return Err(format!("{path}: {}", report.explain()));
            }
            let mut guest = vec![0; report.virtual_size as usize];
            checker.read_guest(&parts, &mut guest).map_err(|f| format!("{path}: {f}"))?;
            self.tally.images += 1;
            self.judge(file, &guest)?;
            if sample {
                self.peer(&path, &guest)?;
            }
        }
        Ok(())
    }

    /// The reference's node for an image, closed long ago: as `blockdev-add` would open it.
    fn judge(&mut self, file: usize, guest: &[u8]) -> Result<(), String> {
        let key = self.reference_node(file)?;
        let World { graph, files, .. } = &mut self.world;
        match files.size(graph, key) {
            Some(size) if size == guest.len() as u64 => {
                let path = files.0[file].path.clone();
                files.seen(graph, key, 0, guest).map_err(|e| format!("{path}, of {} bytes: {e}", guest.len()))
            }
            size => Err(format!("{} has {} bytes, not {size:?}", graph.label(key), guest.len())),
        }
    }

    fn reference_node(&mut self, file: usize) -> Result<u32, String> {
        let w = &mut self.world;
        w.graph = super::graph::Graph::default();
        let mut options = json!({"driver": "qcow2", "read-only": true, "node-name": "end",
            "file": {"driver": "file", "filename": w.files.0[file].path}});
        if let Some(data) = w.files.image(file).and_then(|i| i.data_file) {
            options["data-file"] = json!({"driver": "file", "filename": w.files.0[data].path});
        }
        nodes::open(&mut w.graph, &w.files, &options, Common::default(), 0).map_err(|e| format!("{e:?}"))
    }

    /// What lies below an image, as the checker needs it. Where the reference is not sure, as it is on the disk.
    fn shown(&mut self, file: usize, below: bool) -> Result<Option<Vec<u8>>, String> {
        let Some((file, format)) = (match self.world.files.image(file) {
            Some(image) if below => image.backing,
            Some(_) => Some((file, "qcow2")),
            None => None,
        }) else {
            return Ok(None);
        };
        let path = self.real(&self.world.files.0[file].path);
        let bytes = std::fs::read(&path).map_err(|e| format!("{path}: {e}"))?;
        if format == "raw" {
            return Ok(Some(bytes));
        }
        let backing = self.shown(file, true)?;
        let parts = Parts { image: &bytes, data: None, backing: backing.as_deref() };
        let mut checker = Checker::default();
        let size = checker.check(&parts).virtual_size;
        let mut guest = vec![0; size as usize];
        checker.read_guest(&parts, &mut guest).map_err(|f| format!("{path}: {f}"))?;
        Ok(Some(guest))
    }

    /// The peer finds the image clean and reads the same.
    fn peer(&mut self, path: &str, guest: &[u8]) -> Result<(), String> {
        let raw = self.dir.file("guest.raw");
        std::fs::write(&raw, guest).map_err(|e| format!("{raw}: {e}"))?;
        let check = tools::qemu_img().dir(self.dir.path()).line("check -q -f qcow2").arg(path).run();
        let same =
            tools::qemu_img().dir(self.dir.path()).line("compare -f qcow2 -F raw").arg(path).arg(&raw).run();
        self.tally.compared += 1;
        match (check.code, same.code) {
            (0, 0) => Ok(()),
            _ => Err(format!("{path}: the peer:\n{}{}", check.describe(), same.describe())),
        }
    }
}

/// The file below an image, and its format.
type Below = Option<(usize, &'static str)>;

/// The files of a sequence: raw ones, and images of several kinds, some on others.
fn make_files(dir: &TestDir, rng: &mut Rng) -> Result<Files, String> {
    let mut files = Files::default();
    let mut add = |name: &str, bytes: &[u8], content: Content| -> Result<usize, String> {
        let path = dir.file(name);
        std::fs::write(&path, bytes).map_err(|e| format!("{path}: {e}"))?;
        files.0.push(HostFile { path: format!("{HERE}{name}"), content });
        Ok(files.0.len() - 1)
    };
    for (name, most) in [("a.raw", 300), ("b.raw", 500), ("c.raw", 40)] {
        let sectors = 1 + rng.below(most);
        let bytes = guest::pattern(rng.next_u64() | 1, 0, sectors * SECTOR);
        add(name, &bytes, Content::Bytes(bytes.clone()))?;
    }
    let size = |rng: &mut Rng| (1 + rng.below(500)) * SECTOR;
    let plain = |size| CreateOptions { size, ..CreateOptions::default() };
    let backed = |o: CreateOptions, name: &str, format: &str| CreateOptions {
        backing_file: Some(name.into()),
        backing_format: Some(format.into()),
        ..o
    };
    let data = add("data", &[], Content::Opaque)?;
    let images: Vec<(&str, CreateOptions, Below)> = vec![
        ("base", plain(size(rng)), None),
        ("top", backed(plain(size(rng)), "base", "qcow2"), Some((data + 1, "qcow2"))),
        (
            "tip",
            CreateOptions { cluster_size: 4096, ..backed(plain(size(rng)), "top", "qcow2") },
            Some((data + 2, "qcow2")),
        ),
        (
            "c512",
            CreateOptions { cluster_size: 512, refcount_bits: 1, ..backed(plain(size(rng)), "a.raw", "raw") },
            Some((0, "raw")),
        ),
        (
            "sub",
            CreateOptions {
                extended_l2: true,
                cluster_size: 16384,
                ..backed(plain(size(rng)), "b.raw", "raw")
            },
            Some((1, "raw")),
        ),
        ("v2", CreateOptions { version: 2, cluster_size: 4096, ..plain(size(rng)) }, None),
        (
            "v2-top",
            CreateOptions { version: 2, ..backed(plain(size(rng)), "c.raw", "raw") },
            Some((2, "raw")),
        ),
        ("lazy", CreateOptions { lazy_refcounts: true, cluster_size: 1024, ..plain(size(rng)) }, None),
        (
            "split",
            CreateOptions { cluster_size: 4096, data_file: Some("data".into()), ..plain(size(rng)) },
            None,
        ),
    ];
    for (name, options, backing) in images {
        let new = create(&options).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; new.file_size as usize];
        for (at, part) in new.writes() {
            bytes[at.0 as usize..at.0 as usize + part.len()].copy_from_slice(&part);
        }
        let grain = if options.extended_l2 { options.cluster_size / 32 } else { options.cluster_size };
        let mut image = Image::new(options.size, grain);
        (image.backing, image.hides) = (backing, options.version > 2);
        if let Some(len) = new.data_file_size {
            image.data_file = Some(data);
            std::fs::write(dir.file("data"), vec![0; len as usize]).map_err(|e| e.to_string())?;
        }
        add(name, &bytes, Content::Image(image))?;
    }
    Ok(files)
}
