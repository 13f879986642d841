//! Requests of guests: who sends them, what they may see.

use ringblock_tests::Rng;
use ringblock_tests::nbd::{self, Nbd};

use super::files::{Change, Files, SECTOR};
use super::graph::{Graph, Key, User};
use super::step::{Io, Step};
use super::world::{Answer, LARGEST, World, refuse};

/// Guests at once.
const SLOTS: u64 = 5;

/// The real end of a guest.
pub(super) enum Link {
    Client(Nbd),
    Disk(ringblock::Disk),
}

/// A request's failure, as a text.
type Done<T> = Result<T, String>;

impl Link {
    pub(super) fn read(&mut self, off: u64, len: u64) -> Done<Vec<u8>> {
        let mut data = vec![0xee; len as usize];
        match self {
            Link::Client(c) => c.read(off, &mut data).map_err(|e| e.to_string())?,
            Link::Disk(d) => d.read_at(&mut data, off).map_err(|e| e.text())?,
        }
        Ok(data)
    }

    fn write(&mut self, off: u64, data: &[u8], fua: bool) -> Done<()> {
        match self {
            Link::Client(c) => {
                c.write(off, data, if fua { nbd::FLAG_FUA } else { 0 }).map_err(|e| e.to_string())
            }
            Link::Disk(d) => d.write_at(data, off).map_err(|e| e.text()),
        }
    }

    fn zero(&mut self, off: u64, len: u64, unmap: bool) -> Done<()> {
        match self {
            Link::Client(c) => {
                c.zero(off, len as u32, if unmap { 0 } else { nbd::FLAG_NO_HOLE }).map_err(|e| e.to_string())
            }
            Link::Disk(d) => wait(d.write_zeroes(off, len, unmap)),
        }
    }

    fn discard(&mut self, off: u64, len: u64) -> Done<()> {
        match self {
            Link::Client(c) => c.trim(off, len as u32).map_err(|e| e.to_string()),
            Link::Disk(d) => wait(d.discard(off, len)),
        }
    }

    fn flush(&mut self) -> Done<()> {
        match self {
            Link::Client(c) => c.flush().map_err(|e| e.to_string()),
            Link::Disk(d) => d.flush_now().map_err(|e| e.text()),
        }
    }
}

fn wait(f: impl Future<Output = Result<(), ringblock::Errno>>) -> Done<()> {
    ringblock::engine::sync::block_on(f).map_err(|e| e.text())
}

/// The node of a guest, whether it may write, and the size that it goes by.
pub(super) fn place(w: &World, slot: usize) -> Option<(Key, bool, Option<u64>)> {
    Some(match w.graph.users.get(&slot)? {
        User::Disk { node, writable } => (*node, *writable, w.files.size(&w.graph, *node)),
        User::Client { export, size } => {
            let export = w.graph.exports.get(export)?;
            // A window may have been moved since it was told a size.
            let now = w.files.size(&w.graph, export.node);
            (export.node, export.writable, now.map(|now| now.min(*size)))
        }
    })
}

/// Whether a guest may attach to a node.
pub(super) fn attach(w: &mut World, slot: usize, node: &str, writable: bool) -> Answer {
    let Some(key) = w.graph.find(node) else { return refuse("Cannot find device=") };
    if writable && w.graph.nodes[&key].common.read_only {
        return refuse("Block node is read-only");
    }
    w.graph.users.insert(slot, User::Disk { node: key, writable });
    super::nodes::agreed(&w.graph)
}

/// Sends one request and compares what comes back with the reference.
pub(super) fn request(w: &mut World, slot: usize, link: &mut Link, io: &Io) -> Result<(), String> {
    let Some((key, writable, Some(size))) = place(w, slot) else { return Ok(()) };
    let (off, len) = io.range();
    let end = off + len;
    let writes = !matches!(io, Io::Read { .. } | Io::Flush);
    if end > size || writes && !writable {
        let failed = send(link, io).is_err();
        return if failed {
            Ok(())
        } else {
            Err(format!("{io:?} succeeded on a disk of {size} bytes, writable {writable}"))
        };
    }
    let World { graph: g, files, .. } = w;
    if let Io::Flush = io {
        return link.flush().map_err(|e| format!("flush: {e}"));
    }
    // What a request may copy is known first.
    let (from, to) = files.around(g, key, off, end);
    let (from, to) = (from.min(size), to.min(size));
    let failed = |what: &str, e: String| format!("{what} {off:#x}+{len:#x} of {}: {e}", g.label(key));
    let before = link.read(from, to - from).map_err(|e| failed("read", e))?;
    files.seen(g, key, from, &before)?;
    let before = &before[(off - from) as usize..(end - from) as usize];
    match io {
        Io::Read { .. } | Io::Flush => return Ok(()),
        Io::Write { stamp, fua, .. } => {
            let data = pattern(*stamp, off, len);
            link.write(off, &data, *fua).map_err(|e| failed("write", e))?;
            files.store(g, key, off, &data, Change::Data);
        }
        Io::Zero { unmap, .. } => {
            link.zero(off, len, *unmap).map_err(|e| failed("write-zeroes", e))?;
            files.store(g, key, off, &vec![0; len as usize], Change::Zeroes);
        }
        Io::Discard { .. } => {
            link.discard(off, len).map_err(|e| failed("discard", e))?;
            let after = link.read(off, len).map_err(|e| failed("read", e))?;
            files.discarded(g, key, off, before, &after)?;
        }
    }
    after(files, g, key, link, from, to)
}

fn after(files: &mut Files, g: &Graph, key: Key, link: &mut Link, from: u64, to: u64) -> Result<(), String> {
    let data = link.read(from, to - from).map_err(|e| format!("read after it: {e}"))?;
    files.seen(g, key, from, &data).map_err(|e| format!("after it, {e}"))
}

/// For requests that must fail.
fn send(link: &mut Link, io: &Io) -> Result<(), String> {
    let (off, len) = io.range();
    match io {
        Io::Read { .. } => link.read(off, len).map(drop),
        Io::Write { stamp, fua, .. } => link.write(off, &pattern(*stamp, off, len), *fua),
        Io::Zero { unmap, .. } => link.zero(off, len, *unmap),
        Io::Discard { .. } => link.discard(off, len),
        Io::Flush => link.flush(),
    }
}

/// What is written: a stamp in every sector; stamp 0 is zeroes.
pub(super) fn pattern(stamp: u64, off: u64, len: u64) -> Vec<u8> {
    let byte = |at: u64| match stamp {
        0 => 0,
        _ => ((stamp.wrapping_mul(0x9e37_79b9) >> (at % 4 * 8)) ^ (at / SECTOR)) as u8,
    };
    (off..off + len).map(byte).collect()
}

/// A request, a guest that comes, a guest that goes.
pub(super) fn draw(rng: &mut Rng, w: &World) -> Option<Step> {
    let slot = rng.below(SLOTS) as usize;
    match place(w, slot) {
        None => arrive(rng, w, slot),
        Some(_) if rng.chance(8) => Some(Step::Leave { slot }),
        Some((_, writable, size)) => Some(Step::Request { slot, io: draw_io(rng, size?, writable) }),
    }
}

fn arrive(rng: &mut Rng, w: &World, slot: usize) -> Option<Step> {
    if rng.chance(50) && !w.graph.exports.is_empty() {
        let exports: Vec<&String> = w.graph.exports.values().map(|e| &e.name).collect();
        return Some(Step::Connect { slot, export: (*rng.pick(&exports)).clone() });
    }
    let node = super::nodes::draw_node(rng, &w.graph);
    Some(Step::Attach { slot, node, writable: rng.chance(75) })
}

fn draw_io(rng: &mut Rng, size: u64, writable: bool) -> Io {
    let unit = *rng.pick(&[1, SECTOR, SECTOR, 4096, 16384]);
    let off = rng.below(size.max(1)) / unit * unit;
    let most = *rng.pick(&[100, 4096, 20_000, 70_000]);
    let mut len = (1 + rng.below(most)).next_multiple_of(unit);
    if !rng.chance(2) {
        len = len.min(size - off.min(size));
    }
    let len = len.clamp(1, LARGEST);
    match rng.below(100) {
        0..35 => Io::Read { off, len },
        _ if !writable && !rng.chance(5) => Io::Read { off, len },
        35..65 => Io::Write { off, len, stamp: rng.next_u64() >> 40 | 1, fua: rng.chance(10) },
        65..70 => Io::Write { off, len, stamp: 0, fua: false },
        70..83 => Io::Zero { off, len, unmap: rng.chance(50) },
        83..94 => Io::Discard { off, len },
        _ => Io::Flush,
    }
}
