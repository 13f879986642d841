//! Debug events: named points of a parent's update sequence that a filter below it may listen to.
//!
//! A format raises an event on its child edge right before (or after) the step that the name says; filters hand it down to
//! the first node that listens (`blkdebug`), which may make later requests fail, or hold the raising request up. The names
//! are those of QEMU's `blkdebug`.
//!
//! ```text
//!   qcow2 ── L2Load ──► edge "file" ─► [filter] ─► blkdebug: rules for "l2_load" take effect
//!     └─ then reads the table through the same edge ─────────► blkdebug: the read fails, if a rule says so
//! ```
//!
//! Invariant: without a listener below the edge an event is one load of a flag that is false: no allocation, no await.

use crate::core::Core;
use crate::graph::NodeId;

macro_rules! events {
    ($($name:ident = $word:literal: $doc:literal,)*) => {
        /// A point of an update sequence.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum DebugEvent {
            $( #[doc = $doc] $name, )*
        }

        impl DebugEvent {
            /// All of them.
            pub const ALL: &'static [DebugEvent] = &[ $( DebugEvent::$name, )* ];

            /// Its name on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $( DebugEvent::$name => $word, )* }
            }

            /// The event of this name.
            pub fn from_word(word: &str) -> Option<DebugEvent> {
                match word { $( $word => Some(DebugEvent::$name), )* _ => None }
            }
        }
    };
}

events! {
    L1Update = "l1_update": "An L1 entry is written.",
    L1GrowAllocTable = "l1_grow_alloc_table": "Space for a longer L1 table is allocated.",
    L1GrowWriteTable = "l1_grow_write_table": "The longer L1 table is written.",
    L1GrowActivateTable = "l1_grow_activate_table": "The header is made to name it.",
    L2Load = "l2_load": "A piece of an L2 table is read.",
    L2Update = "l2_update": "A piece of an L2 table is written.",
    L2UpdateCompressed = "l2_update_compressed": "An entry for a compressed cluster is set.",
    L2AllocCowRead = "l2_alloc_cow_read": "A shared L2 table is read to be copied.",
    L2AllocWrite = "l2_alloc_write": "A new L2 table is written.",
    ReadAio = "read_aio": "Guest data is read.",
    ReadBackingAio = "read_backing_aio": "Guest data is read from the backing node.",
    ReadCompressed = "read_compressed": "A compressed cluster is read.",
    WriteAio = "write_aio": "Guest data is written.",
    WriteCompressed = "write_compressed": "A compressed cluster is written.",
    VmstateLoad = "vmstate_load": "Machine state is read (never raised: there is none).",
    VmstateSave = "vmstate_save": "Machine state is written (never raised: there is none).",
    CowRead = "cow_read": "Old data around a write is read.",
    CowWrite = "cow_write": "Old data around a write is written to the new place.",
    ReftableLoad = "reftable_load": "The refcount table is read.",
    ReftableGrow = "reftable_grow": "The refcount table is about to grow.",
    ReftableUpdate = "reftable_update": "A piece of the refcount table is written.",
    RefblockLoad = "refblock_load": "A refcount block is read.",
    RefblockUpdate = "refblock_update": "A refcount block is written as a whole.",
    RefblockUpdatePart = "refblock_update_part": "A part of a refcount block is written.",
    RefblockAlloc = "refblock_alloc": "A refcount block is about to be made.",
    RefblockAllocHookup = "refblock_alloc_hookup": "A new refcount block's entry is set.",
    RefblockAllocWrite = "refblock_alloc_write": "A new refcount block is written.",
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks": "Blocks for a larger refcount table are written.",
    RefblockAllocWriteTable = "refblock_alloc_write_table": "The larger refcount table is written.",
    RefblockAllocSwitchTable = "refblock_alloc_switch_table": "The header is made to name it.",
    ClusterAlloc = "cluster_alloc": "Clusters are allocated.",
    ClusterAllocBytes = "cluster_alloc_bytes": "Space for a compressed cluster is allocated.",
    ClusterFree = "cluster_free": "Clusters are freed.",
    FlushToOs = "flush_to_os": "A flush begins: what the node holds is handed down.",
    FlushToDisk = "flush_to_disk": "What was handed down is made durable.",
    PwritevRmwHead = "pwritev_rmw_head": "The first block of an unaligned write is read.",
    PwritevRmwAfterHead = "pwritev_rmw_after_head": "It has been read.",
    PwritevRmwTail = "pwritev_rmw_tail": "The last block of an unaligned write is read.",
    PwritevRmwAfterTail = "pwritev_rmw_after_tail": "It has been read.",
    Pwritev = "pwritev": "A write reaches the node.",
    PwritevZero = "pwritev_zero": "A write of zeroes reaches the node.",
    PwritevDone = "pwritev_done": "A write, of zeroes or not, has ended.",
    EmptyImagePrepare = "empty_image_prepare": "An image is about to be emptied (never raised: no operation empties one).",
    L1ShrinkWriteTable = "l1_shrink_write_table": "L1 entries behind a new end are cleared.",
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters": "The L2 tables behind a new end are freed.",
    CorWrite = "cor_write": "Data is copied on read (never raised: there is no copy-on-read).",
    ClusterAllocSpace = "cluster_alloc_space": "Allocated clusters are zeroed.",
    None = "none": "Nothing: raised once, when the listener is opened.",
}

/// Raises an event at a node: the first listener, from there down through filters, hears it.
#[inline]
pub(crate) async fn raise(core: &Core, node: NodeId, event: DebugEvent) {
    if core.view.borrow().node(node).is_ok_and(|n| n.listens) {
        raise_slow(node, event).await;
    }
}

#[cold]
fn raise_slow(mut node: NodeId, event: DebugEvent) -> crate::driver::LocalFuture<'static, ()> {
    Box::pin(async move {
        let core = Core::current();
        loop {
            let Ok(view) = core.view.borrow().node(node).cloned() else { return };
            if view.driver.listens() {
                return view.driver.debug_event(event).await;
            }
            match view.filtered.filter(|_| view.listens) {
                Some(child) => node = child,
                None => return,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::DebugEvent;

    /// Goal: names and events are one to one. Method: every event there and back; the number known from the reference.
    #[test]
    fn names() {
        assert_eq!(DebugEvent::ALL.len(), 48);
        assert!(DebugEvent::ALL.iter().all(|e| DebugEvent::from_word(e.as_str()) == Some(*e)));
        assert_eq!(DebugEvent::from_word("l2_loaf"), None);
    }
}
