//! What the data path sees of the block graph: an immutable snapshot, replaced as a whole.
//!
//! ```text
//!   View(version)
//!    ├ roots[RootId] ─► NodeId        nodes[NodeId] ─► driver, children (edges by index), home core, flags
//!    └ replaced by an Install barrier; every core holds its own pointer
//! ```

use std::sync::Arc;

use super::NodeId;
use crate::driver::{ChildIx, Driver, Limits};
use crate::error::Errno;
use crate::path::{RootId, Serial};
use crate::throttle::Member;
use smallvec::SmallVec;

/// What zero-detection does with writes of zeroes (reference, part 5 item 21).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum DetectZeroes {
    /// Nothing.
    #[default]
    Off,
    /// Turns them into write-zeroes.
    On,
    /// The same, and allows unmapping.
    Unmap,
}

/// Settings of a node that the request path looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeFlags {
    /// Writes are refused.
    pub read_only: bool,
    /// Flushes stop here.
    pub no_flush: bool,
    /// Discards are passed on (`discard=unmap`).
    pub discard: bool,
    /// Zero detection.
    pub detect_zeroes: DetectZeroes,
}

impl NodeFlags {
    /// Settings that change nothing.
    pub(crate) const NEUTRAL: NodeFlags =
        NodeFlags { read_only: false, no_flush: false, discard: true, detect_zeroes: DetectZeroes::Off };

    /// What a request meets that passes a node with these settings and then one with others.
    pub(crate) fn and(self, other: NodeFlags) -> NodeFlags {
        NodeFlags {
            read_only: self.read_only || other.read_only,
            no_flush: self.no_flush || other.no_flush,
            discard: self.discard && other.discard,
            detect_zeroes: self.detect_zeroes.max(other.detect_zeroes),
        }
    }
}

/// A node as the data path sees it.
pub(crate) struct NodeView {
    pub(crate) id: NodeId,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) children: Vec<Option<NodeId>>,
    pub(crate) home: usize,
    pub(crate) has_owner: bool,
    pub(crate) flags: NodeFlags,
    pub(crate) limits: Limits,
    pub(crate) serial: Arc<Serial>,
    /// The child whose content a filter shows.
    pub(crate) filtered: Option<NodeId>,
    /// The node hears debug events, or is a filter above one that does.
    pub(crate) listens: bool,
}

impl NodeView {
    pub(crate) fn child(&self, ix: ChildIx) -> Result<NodeId, Errno> {
        self.children.get(usize::from(ix)).copied().flatten().ok_or(Errno::ENOMEDIUM)
    }
}

/// A root as the data path sees it.
#[derive(Clone)]
pub(crate) struct RootView {
    /// The node it is attached to.
    pub(crate) attached: NodeId,
    /// Where its requests go: the first node below that is no throttle node.
    pub(crate) node: NodeId,
    pub(crate) writable: bool,
    /// Whose limits its requests are admitted by: its own, then those of throttle nodes from the top down.
    pub(crate) limits: SmallVec<[Arc<Member>; 1]>,
    /// The settings of those throttle nodes together.
    pub(crate) above: NodeFlags,
}

impl RootView {
    /// Whether requests of this direction have to ask somebody.
    #[inline]
    pub(crate) fn is_limited(&self, write: bool) -> bool {
        self.limits.iter().any(|m| m.is_limited(write))
    }
}

/// One version of the graph.
#[derive(Clone, Default)]
pub(crate) struct View {
    pub(crate) nodes: Vec<Option<Arc<NodeView>>>,
    pub(crate) roots: Vec<Option<RootView>>,
}

impl View {
    pub(crate) fn node(&self, id: NodeId) -> Result<&Arc<NodeView>, Errno> {
        self.nodes.get(id.0 as usize).and_then(Option::as_ref).ok_or(Errno::ENOMEDIUM)
    }

    pub(crate) fn root(&self, id: RootId) -> Result<&RootView, Errno> {
        self.roots.get(id.0 as usize).and_then(Option::as_ref).ok_or(Errno::ENOMEDIUM)
    }
}
