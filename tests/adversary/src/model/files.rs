//! The reference's contents: what each file of the host holds, as bytes, and what a node shows of it.
//!
//! A raw file is its bytes. A qcow2 image is a layer: bytes of its own, and for each sector whether they are what is seen
//! or what lies below is. A cluster that was written holds copies of its other sectors, and which zeroes take space is
//! the format's own business; so a sector may be *either*: then both are allowed, until a read tells.
//!
//! ```text
//!   node ─► driver: window (raw) ─► layer (qcow2) ┬ own bytes ┐
//!                                                 └ below ────┴─► candidates of a sector ─► what a read may return
//! ```

use super::graph::{Driver, Graph, Key};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// A sector of an image shows its own bytes.
const OWN: u8 = 1;
/// A sector of an image may show what lies below.
const BELOW: u8 = 2;
/// Nothing is known of it until it is read.
const UNKNOWN: u8 = 4;

/// What a file holds.
#[derive(Debug)]
pub(super) enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A qcow2 image.
    Image(Image),
    /// Something that only another file explains.
    Opaque,
}

/// A qcow2 image as the guest sees it.
#[derive(Debug)]
pub(super) struct Image {
    /// What is copied when a part of it is written, in bytes.
    pub(super) grain: u64,
    /// It can say that a cluster is zero over something below (version 3).
    pub(super) hides: bool,
    /// The file below that it names, and its format.
    pub(super) backing: Option<(usize, &'static str)>,
    /// The file that has its data.
    pub(super) data_file: Option<usize>,
    bytes: Vec<u8>,
    mask: Vec<u8>,
}

/// A file of the host.
#[derive(Debug)]
pub(super) struct HostFile {
    pub(super) path: String,
    pub(super) content: Content,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Files(pub(super) Vec<HostFile>);

/// What a sector may read as; empty: anything.
type Candidates = Vec<Vec<u8>>;

/// How a range was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Change {
    Data,
    Zeroes,
    /// What is seen stays as it is, but where it lies may be another place.
    Moved,
}

impl Image {
    pub(super) fn new(size: u64, grain: u64) -> Image {
        let sectors = (size / SECTOR) as usize;
        Image {
            grain,
            hides: true,
            backing: None,
            data_file: None,
            bytes: vec![0; size as usize],
            mask: vec![BELOW; sectors],
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
}

fn sector_of(bytes: &[u8], sector: u64) -> Vec<u8> {
    let start = (sector * SECTOR) as usize;
    let mut out = bytes.get(start..).unwrap_or_default().to_vec();
    out.resize(SECTOR as usize, 0);
    out
}

impl Files {
    pub(super) fn find(&self, path: &str) -> Option<usize> {
        self.0.iter().position(|f| f.path == path)
    }

    pub(super) fn image(&self, file: usize) -> Option<&Image> {
        match &self.0[file].content {
            Content::Image(image) => Some(image),
            _ => None,
        }
    }

    /// The file whose image a node shows as it is stored.
    pub(super) fn stored(&self, g: &Graph, key: Key) -> Option<usize> {
        match g.nodes[&key].driver {
            Driver::File(f) => self.image(f).map(|_| f),
            Driver::Raw { offset: 0, size: None } => self.stored(g, g.child(key, "file")?),
            _ => None,
        }
    }

    /// The image that a qcow2 node shows.
    fn layer(&self, g: &Graph, key: Key) -> Option<usize> {
        self.stored(g, g.child(key, "file")?)
    }

    /// A node's size; `None` if the reference does not know it.
    pub(super) fn size(&self, g: &Graph, key: Key) -> Option<u64> {
        match g.nodes[&key].driver {
            Driver::File(f) => match &self.0[f].content {
                Content::Bytes(b) => Some((b.len() as u64).next_multiple_of(SECTOR)),
                _ => None,
            },
            Driver::Null { size } => Some(size),
            Driver::Raw { .. } => g.nodes[&key].len,
            Driver::Qcow2 => self.image(self.layer(g, key)?).map(Image::size),
        }
    }

    fn candidates(&self, g: &Graph, key: Key, sector: u64) -> Candidates {
        match g.nodes[&key].driver {
            Driver::File(f) => match &self.0[f].content {
                Content::Bytes(b) => vec![sector_of(b, sector)],
                _ => Vec::new(),
            },
            Driver::Null { .. } => vec![vec![0; SECTOR as usize]],
            Driver::Raw { offset, .. } => match g.child(key, "file") {
                Some(child) => self.candidates(g, child, sector + offset / SECTOR),
                None => Vec::new(),
            },
            Driver::Qcow2 => self.layered(g, key, sector),
        }
    }

    fn layered(&self, g: &Graph, key: Key, sector: u64) -> Candidates {
        let Some(image) = self.layer(g, key).and_then(|f| self.image(f)) else { return Vec::new() };
        let mask = image.mask.get(sector as usize).copied().unwrap_or(UNKNOWN);
        if mask & UNKNOWN != 0 {
            return Vec::new();
        }
        let mut all = Vec::new();
        if mask & BELOW != 0 {
            all = match g.child(key, "backing") {
                Some(b) if self.size(g, b).is_none_or(|s| sector * SECTOR < s) => {
                    self.candidates(g, b, sector)
                }
                _ => vec![vec![0; SECTOR as usize]],
            };
            if all.is_empty() {
                return all;
            }
        }
        if mask & OWN != 0 {
            all.push(sector_of(&image.bytes, sector));
        }
        all.dedup();
        all
    }

    /// Whether a node may have given `data` from `off`; what was unsure is known afterwards.
    pub(super) fn seen(&mut self, g: &Graph, key: Key, off: u64, data: &[u8]) -> Result<(), String> {
        let end = off + data.len() as u64;
        for sector in off / SECTOR..end.div_ceil(SECTOR) {
            let (from, to) = ((sector * SECTOR).max(off), ((sector + 1) * SECTOR).min(end));
            let found = &data[(from - off) as usize..(to - off) as usize];
            let part = (from - sector * SECTOR) as usize..(to - sector * SECTOR) as usize;
            let all = self.candidates(g, key, sector);
            if !all.is_empty() && !all.iter().any(|c| &c[part.clone()] == found) {
                let at = all[0][part.clone()].iter().zip(found).position(|(a, b)| a != b).unwrap_or(0);
                return Err(format!(
                    "byte {:#x} of {} is {:#x}, should be {:#x} ({} candidates)",
                    from + at as u64,
                    g.label(key),
                    found[at],
                    all[0][part][at],
                    all.len()
                ));
            }
            if all.len() != 1 && part.len() == SECTOR as usize {
                self.adopt(g, key, sector, found);
            }
        }
        Ok(())
    }

    /// Learns what an unsure sector holds.
    fn adopt(&mut self, g: &Graph, key: Key, sector: u64, found: &[u8]) {
        match g.nodes[&key].driver {
            Driver::Raw { offset, .. } => {
                if let Some(child) = g.child(key, "file") {
                    self.adopt(g, child, sector + offset / SECTOR, found);
                }
            }
            Driver::Qcow2 => {
                let Some(file) = self.layer(g, key) else { return };
                let Content::Image(image) = &mut self.0[file].content else { return };
                let Some(mask) = image.mask.get_mut(sector as usize) else { return };
                let start = (sector * SECTOR) as usize;
                let own = &mut image.bytes[start..start + SECTOR as usize];
                if *mask & UNKNOWN != 0 {
                    own.copy_from_slice(found);
                    *mask = OWN | BELOW;
                } else if *mask & OWN != 0 && own != found {
                    *mask = BELOW;
                } else if *mask == OWN | BELOW {
                    // its own bytes are what is seen; they may be those below as well
                }
            }
            _ => {}
        }
    }

    /// The range around a request that it may have copied.
    pub(super) fn around(&self, g: &Graph, key: Key, off: u64, end: u64) -> (u64, u64) {
        match g.nodes[&key].driver {
            Driver::Raw { offset, .. } => match g.child(key, "file") {
                Some(child) => {
                    let (from, to) = self.around(g, child, off + offset, end + offset);
                    (from.saturating_sub(offset), to.saturating_sub(offset))
                }
                None => (off, end),
            },
            Driver::Qcow2 => {
                let grain = self.layer(g, key).and_then(|f| self.image(f)).map_or(SECTOR, |i| i.grain);
                (off / grain * grain, end.next_multiple_of(grain))
            }
            _ => (off / SECTOR * SECTOR, end.next_multiple_of(SECTOR)),
        }
    }

    /// A write that succeeded. What lies around it has just been read, and is known.
    pub(super) fn store(&mut self, g: &Graph, key: Key, off: u64, data: &[u8], change: Change) {
        let change = match g.nodes[&key].common.detect {
            _ if change == Change::Moved => change,
            0 => change,
            _ if data.iter().all(|b| *b == 0) => Change::Zeroes,
            _ => change,
        };
        match g.nodes[&key].driver {
            Driver::File(f) => {
                if let Content::Bytes(bytes) = &mut self.0[f].content {
                    bytes[off as usize..off as usize + data.len()].copy_from_slice(data);
                }
            }
            Driver::Null { .. } => {}
            Driver::Raw { offset, .. } => {
                if let Some(child) = g.child(key, "file") {
                    self.store(g, child, off + offset, data, change);
                }
            }
            Driver::Qcow2 => self.store_in_layer(g, key, off, data, change),
        }
    }

    fn store_in_layer(&mut self, g: &Graph, key: Key, off: u64, data: &[u8], change: Change) {
        let end = off + data.len() as u64;
        let backed = g.child(key, "backing").is_some();
        let (from, to) = self.around(g, key, off, end);
        let Some(file) = self.layer(g, key) else { return };
        let now: Vec<Option<Vec<u8>>> =
            (from / SECTOR..to / SECTOR).map(|s| self.layered(g, key, s).into_iter().next_back()).collect();
        let Content::Image(image) = &mut self.0[file].content else { return };
        for (sector, now) in (from / SECTOR..to / SECTOR).zip(now) {
            let Some(mask) = image.mask.get_mut(sector as usize) else { continue };
            let start = (sector * SECTOR) as usize;
            match now {
                // copied, or not
                Some(now) if *mask & BELOW != 0 => {
                    image.bytes[start..start + SECTOR as usize].copy_from_slice(&now);
                    *mask |= OWN;
                }
                Some(_) => {}
                None => *mask = UNKNOWN,
            }
            if sector * SECTOR < end && off < (sector + 1) * SECTOR {
                *mask = match change {
                    Change::Moved => *mask,
                    // a part of what is not known
                    _ if *mask == UNKNOWN && (off > sector * SECTOR || end < (sector + 1) * SECTOR) => {
                        UNKNOWN
                    }
                    Change::Zeroes if !backed => OWN | BELOW,
                    Change::Data | Change::Zeroes => OWN,
                };
            }
        }
        image.bytes[off as usize..end as usize].copy_from_slice(data);
    }

    /// Whether a discard at a node does anything.
    pub(super) fn discards(&self, g: &Graph, key: Key) -> bool {
        let node = &g.nodes[&key];
        node.common.discard
            && match node.driver {
                Driver::Raw { .. } => g.child(key, "file").is_some_and(|c| self.discards(g, c)),
                Driver::Null { .. } => false,
                _ => true,
            }
    }

    /// A discard of a range that held `before` and reads as `after` now: each sector as before, or as zeroes.
    pub(super) fn discarded(
        &mut self,
        g: &Graph,
        key: Key,
        off: u64,
        before: &[u8],
        after: &[u8],
    ) -> Result<(), String> {
        let sound = before.iter().zip(after).all(|(b, a)| a == b || *a == 0);
        let passes = self.discards(g, key);
        if !sound || !passes && before != after {
            let label = g.label(key);
            return Err(format!(
                "a discard of {} bytes at {off:#x} of {label} left something else",
                before.len()
            ));
        }
        let (mut at, end) = (off, off + if passes { after.len() as u64 } else { 0 });
        while at < end {
            let next = ((at / SECTOR + 1) * SECTOR).min(end);
            let part = (at - off) as usize..(next - off) as usize;
            let change =
                if before[part.clone()] == after[part.clone()] { Change::Moved } else { Change::Zeroes };
            self.store(g, key, at, &after[part], change);
            at = next;
        }
        Ok(())
    }

    /// Whether a qcow2 node can grow to `size` and keep what lies below from coming to light; `None`: not known.
    pub(super) fn can_hide(&self, g: &Graph, key: Key, size: u64) -> Option<bool> {
        let image = self.image(self.layer(g, key)?)?;
        let below = match g.child(key, "backing") {
            Some(below) if !image.hides => self.size(g, below)?,
            _ => 0,
        };
        let from = image.size().next_multiple_of(image.grain);
        Some(from >= below.next_multiple_of(image.grain).min(size))
    }

    /// Whether the size of a node may become `size` as far as its contents go; and makes it so.
    pub(super) fn resize(&mut self, g: &Graph, key: Key, size: u64) {
        match g.nodes[&key].driver {
            Driver::File(f) => {
                if let Content::Bytes(bytes) = &mut self.0[f].content {
                    bytes.resize(size as usize, 0);
                }
            }
            Driver::Null { .. } => {}
            Driver::Raw { offset, .. } => {
                if let Some(child) = g.child(key, "file") {
                    self.resize(g, child, size + offset);
                }
            }
            Driver::Qcow2 => self.resize_layer(g, key, size),
        }
    }

    fn resize_layer(&mut self, g: &Graph, key: Key, size: u64) {
        let hidden = g.child(key, "backing").and_then(|b| self.size(g, b)).unwrap_or(0);
        let Some(file) = self.layer(g, key) else { return };
        let Some(old) = self.image(file).map(Image::size) else { return };
        // The last piece may be copied, up to the old end.
        let (from, _) = self.around(g, key, old.saturating_sub(1), old);
        let tail: Vec<Candidates> = (from / SECTOR..old / SECTOR).map(|s| self.layered(g, key, s)).collect();
        let Content::Image(image) = &mut self.0[file].content else { return };
        for (sector, mut tail) in (from / SECTOR..old / SECTOR).zip(tail) {
            let (mask, start) = (&mut image.mask[sector as usize], (sector * SECTOR) as usize);
            match tail.pop() {
                Some(one) if tail.is_empty() && *mask & BELOW != 0 => {
                    image.bytes[start..start + SECTOR as usize].copy_from_slice(&one);
                    *mask |= OWN;
                }
                Some(_) if tail.is_empty() => {}
                _ => *mask = UNKNOWN,
            }
        }
        image.bytes.resize(size as usize, 0);
        let sectors = image.mask.len() as u64;
        image.mask.truncate((size / SECTOR) as usize);
        for sector in sectors..size / SECTOR {
            // What lies below must not come to light; beyond its end there is nothing to hide.
            image.mask.push(if sector * SECTOR < hidden { OWN } else { OWN | BELOW });
        }
    }
}
