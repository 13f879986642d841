//! Translation of a node's range down to segments of host files, synchronously.
//!
//! ```text
//!   qcow2 lookup ─► Data(file, off) ─► raw lookup ─► Data(file, off + 64K) ─► Leaf::File ─► Seg(slot, off, pos, len)
//!                 └► Below(backing) ─► … ─► Zero ─► plan.zeroes(pos, len)
//! ```
//!
//! Invariant: the caller holds an epoch pin from before the first lookup and hands it to the transfer (I3).

use std::ops::Range;

use smallvec::SmallVec;

use super::Serial;
use crate::debug::DebugEvent;
use crate::driver::{Access, Extents, Kind, Leaf, Lookup, Target};
use crate::error::Errno;
use crate::graph::{DetectZeroes, NodeId, NodeView, View};
use crate::mem::Buf;
use crate::mutant;
use crate::ring::{Seg, Segs};

/// Depth of a chain of nodes; opening refuses longer ones.
pub(crate) const DEPTH_MAX: usize = 512;

/// What a range turned into, from its start.
#[derive(Default)]
pub(crate) struct Plan {
    /// Where in the buffer the range begins. Direct I/O asks for aligned memory, so it decides what a leaf can take.
    base: u32,
    pub(crate) segs: Segs,
    pub(crate) zeroes: SmallVec<[(u32, u32); 2]>,
    /// Bytes covered from the start of the range.
    pub(crate) covered: u64,
}

/// Why translation could not go on; the piece begins where the plan ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// Metadata of `node` has to be loaded.
    Miss { node: NodeId, key: u64 },
    /// `len` bytes at `off` of `node` cannot be written in place.
    Claim { node: NodeId, off: u64, len: u64 },
    /// `len` bytes need decoding by `node`; `guest` is their offset in it.
    Encoded { node: NodeId, cookie: u64, guest: u64, len: u64 },
    /// `node` answers requests itself.
    Full { node: NodeId, off: u64, len: u64, via: Via },
    /// A leaf that the ring cannot serve directly: unaligned, being serialised, zero detection, or with a latency.
    SlowLeaf { node: NodeId, off: u64, len: u64 },
    /// The request fails.
    Bad(Errno),
}

/// How the request came to a node: what its parent would call it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Via {
    /// It was addressed to the node itself.
    Itself,
    /// The parent has its guest's data there.
    Data,
    /// It shows through from there.
    Below,
}

impl Via {
    /// The event that the parent raises before it reads.
    pub(crate) fn read_event(self) -> Option<DebugEvent> {
        match self {
            Via::Itself => None,
            Via::Data => Some(DebugEvent::ReadAio),
            Via::Below => Some(DebugEvent::ReadBackingAio),
        }
    }
}

impl Stop {
    /// A node reached from a parent: the nearest one counts.
    #[cold]
    fn from(self, parent: Via) -> Stop {
        match self {
            Stop::Full { node, off, len, via: Via::Itself } => Stop::Full { node, off, len, via: parent },
            other => other,
        }
    }
}

impl Plan {
    /// A plan for a range that begins `base` bytes into the buffer.
    pub(crate) fn at(base: usize) -> Plan {
        Plan { base: base as u32, ..Plan::default() }
    }

    /// Where in the buffer the next piece begins.
    fn pos(&self) -> u32 {
        self.base + self.covered as u32
    }

    /// Translates `range` of `node`; `Ok` if all of it is covered.
    pub(crate) fn add(
        &mut self,
        view: &View,
        access: Access,
        node: NodeId,
        range: Range<u64>,
    ) -> Result<(), Stop> {
        self.add_at(view, access, node, range, 0)
    }

    fn add_at(
        &mut self,
        view: &View,
        access: Access,
        id: NodeId,
        range: Range<u64>,
        depth: usize,
    ) -> Result<(), Stop> {
        let node = view.node(id).map_err(Stop::Bad)?;
        if depth > DEPTH_MAX {
            return Err(Stop::Bad(Errno(libc::ELOOP)));
        }
        match node.driver.kind() {
            Kind::Leaf(leaf) => self.leaf(node, leaf, access, range),
            Kind::Full => {
                let (off, len) = (range.start, range.end - range.start);
                Err(Stop::Full { node: id, off, len, via: Via::Itself })
            }
            Kind::Map(_) => self.map(view, node, access, range, depth),
        }
    }

    fn leaf(&mut self, node: &NodeView, leaf: &Leaf, access: Access, range: Range<u64>) -> Result<(), Stop> {
        let len = range.end - range.start;
        let slow = Stop::SlowLeaf { node: node.id, off: range.start, len };
        let pos = self.pos();
        match leaf {
            Leaf::Null { latency_ns: 1.., .. } => return Err(slow),
            Leaf::Null { read_zeroes, .. } => {
                if *read_zeroes && access != Access::Write {
                    self.zeroes.push((pos, len as u32));
                }
            }
            Leaf::File(file) => {
                let limits = node.driver.limits();
                let align = u64::from(limits.request_alignment) - 1;
                let memory = limits.memory_alignment - 1;
                let write = access == Access::Write;
                if (range.start | len) & align != 0
                    || pos & memory != 0
                    || write
                        && (node.serial.is_active() && !mutant!("serial-wait")
                            || node.flags.detect_zeroes != DetectZeroes::Off)
                {
                    return Err(slow);
                }
                self.push_seg(Seg { file: file.slot(), off: range.start, pos, len: len as u32 });
            }
        }
        self.covered += len;
        Ok(())
    }

    fn push_seg(&mut self, seg: Seg) {
        if let Some(last) = self.segs.last_mut()
            && last.file == seg.file
            && last.off + u64::from(last.len) == seg.off
            && last.pos + last.len == seg.pos
        {
            last.len += seg.len;
            return;
        }
        self.segs.push(seg);
    }

    fn map(
        &mut self,
        view: &View,
        node: &NodeView,
        access: Access,
        range: Range<u64>,
        depth: usize,
    ) -> Result<(), Stop> {
        let Kind::Map(map) = node.driver.kind() else {
            return Err(Stop::Bad(Errno::EIO));
        };
        let (mut at, mut extents) = (range.start, Extents::new());
        while at < range.end {
            extents.clear();
            match map.lookup(access, at..range.end, &mut extents) {
                Lookup::Hit => {}
                Lookup::Miss(key) => return Err(Stop::Miss { node: node.id, key }),
                Lookup::NeedsClaim { len } => {
                    return Err(Stop::Claim { node: node.id, off: at, len });
                }
                Lookup::Bad(e) => return Err(Stop::Bad(e)),
            }
            debug_assert!(extents.covered() > 0 && extents.covered() <= range.end - at);
            for extent in extents.as_slice() {
                match extent.target {
                    Target::Data { child, off } => {
                        let child = node.child(child).map_err(Stop::Bad)?;
                        self.add_at(view, access, child, off..off + extent.len, depth + 1)
                            .map_err(|stop| stop.from(Via::Data))?;
                    }
                    Target::Below { child, off } => {
                        let child = node.child(child).map_err(Stop::Bad)?;
                        self.below(view, child, off..off + extent.len, depth + 1)?;
                    }
                    Target::Zero { .. } | Target::Hole { .. } => self.zero(extent.len),
                    Target::Encoded { cookie } => {
                        return Err(Stop::Encoded { node: node.id, cookie, guest: at, len: extent.len });
                    }
                }
                at += extent.len;
            }
        }
        Ok(())
    }

    /// A range of a backing node, which may be shorter.
    fn below(&mut self, view: &View, child: NodeId, range: Range<u64>, depth: usize) -> Result<(), Stop> {
        let size = view.node(child).map_err(Stop::Bad)?.driver.size();
        let there = range.end.min(size).max(range.start);
        if there > range.start {
            self.add_at(view, Access::Read, child, range.start..there, depth)
                .map_err(|stop| stop.from(Via::Below))?;
        }
        if range.end > there {
            self.zero(range.end - there);
        }
        Ok(())
    }

    fn zero(&mut self, len: u64) {
        self.zeroes.push((self.pos(), len as u32));
        self.covered += len;
    }

    /// Fills what is known to be zero.
    pub(crate) fn fill_zeroes(&self, buf: &mut Buf) {
        for &(pos, len) in &self.zeroes {
            buf[pos as usize..(pos + len) as usize].fill(0);
        }
    }
}

impl Serial {
    /// For the type's sake: see [`super::serial`].
    pub(crate) fn is_active(&self) -> bool {
        self.active() > 0
    }
}
