//! Block nodes: the options of every driver.
//!
//! ```text
//! BlockdevOptions = node-name, cache, … + driver ─┬─ file, host_device   a file or device of the host
//!                                                 ├─ null-co, null-aio   nothing at all
//!                                                 ├─ blkdebug             image: BlockdevRef
//!                                                 ├─ raw                 file: BlockdevRef
//!                                                 ├─ qcow2               file, backing, data-file: BlockdevRef
//!                                                 ├─ blklogwrites        file, log: BlockdevRef
//!                                                 └─ blkverify           test, raw: BlockdevRef
//! BlockdevRef     = options in place | name of an existing node
//! ```

use super::size::Size;
use super::types::{
    BlockPermission, BlockdevAioOptions, BlockdevCacheOptions, BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions, OnOffAuto,
};

crate::qapi! {
    /// What every block node has.
    struct BlockdevOptionsBase: Default {
        /// The name of the node; inner nodes get one of their own if it is left out.
        node_name: Option<String> = "node-name",
        /// What happens to discard requests (default: ignore).
        discard: Option<BlockdevDiscardOptions> = "discard",
        /// Use of the host's page cache.
        cache: Option<BlockdevCacheOptions> = "cache",
        /// Whether the node refuses writes (default: off).
        read_only: Option<bool> = "read-only",
        /// Whether the node becomes read-only if it cannot be opened for writing (default: off).
        auto_read_only: Option<bool> = "auto-read-only",
        /// Whether locks of other users of the image are ignored; the node must be read-only (default: off).
        force_share: Option<bool> = "force-share",
        /// Whether writes of zeroes are found and made zero writes (default: off).
        detect_zeroes: Option<BlockdevDetectZeroesOptions> = "detect-zeroes",
    }

    /// A block node.
    union BlockdevOptions {
        base: BlockdevOptionsBase,
        tag driver: BlockdevDriver = "driver",
        /// A node whose changes are logged.
        Blklogwrites(Box<BlockdevOptionsBlklogwrites>) = "blklogwrites",
        /// Two nodes that must always be the same.
        Blkverify(Box<BlockdevOptionsBlkverify>) = "blkverify",
        /// A filter that makes chosen requests fail, for tests.
        Blkdebug(Box<BlockdevOptionsBlkdebug>) = "blkdebug",
        /// A regular file of the host.
        File(BlockdevOptionsFile) = "file",
        /// A block device of the host.
        HostDevice(BlockdevOptionsFile) = "host_device",
        /// No storage: writes vanish (for tests and benchmarks).
        NullAio(BlockdevOptionsNull) = "null-aio",
        /// The same as null-aio.
        NullCo(BlockdevOptionsNull) = "null-co",
        /// A qcow2 image.
        Qcow2(Box<BlockdevOptionsQcow2>) = "qcow2",
        /// The bytes of another node, or a part of them.
        Raw(Box<BlockdevOptionsRaw>) = "raw",
    }

    /// A node whose changes are logged, in the format of dm-log-writes.
    struct BlockdevOptionsBlklogwrites {
        /// The node that is changed.
        file: BlockdevRef = "file",
        /// The node that holds the log.
        log: BlockdevRef = "log",
        /// Bytes of a sector of a new log: a power of two from 32 to 8 MiB (default: 512).
        log_sector_size: Option<u32> = "log-sector-size",
        /// Whether the log that is there is continued (default: off).
        log_append: Option<bool> = "log-append",
        /// After how many entries the log's super block is written (default: 4096).
        log_super_update_interval: Option<u64> = "log-super-update-interval",
    }

    /// Two nodes that must always be the same.
    struct BlockdevOptionsBlkverify {
        /// The node under test.
        test: BlockdevRef = "test",
        /// The node that it is compared with.
        raw: BlockdevRef = "raw",
    }

    /// A file or device of the host.
    struct BlockdevOptionsFile {
        /// Its path.
        filename: String = "filename",
        /// Whether the file is locked against other processes (default: auto).
        locking: Option<OnOffAuto> = "locking",
        /// How it is read and written; every value means io_uring here (default: io_uring).
        aio: Option<BlockdevAioOptions> = "aio",
    }

    /// No storage.
    struct BlockdevOptionsNull: Default {
        /// Its size in bytes (default: 1 GiB).
        size: Option<Size> = "size",
        /// How long each request takes, in nanoseconds (default: 0).
        latency_ns: Option<u64> = "latency-ns",
        /// Whether reads fill the buffer with zeroes (default: off).
        read_zeroes: Option<bool> = "read-zeroes",
    }

    /// The bytes of another node.
    struct BlockdevOptionsRaw {
        /// The node that holds the bytes.
        file: BlockdevRef = "file",
        /// Where they begin in it (default: 0).
        offset: Option<Size> = "offset",
        /// How many there are (default: all that follow).
        size: Option<Size> = "size",
    }

    /// A qcow2 image.
    struct BlockdevOptionsQcow2 {
        /// The node that holds the image.
        file: BlockdevRef = "file",
        /// The node below it; null for none (default: the one that the image names).
        backing: Option<BlockdevRefOrNull> = "backing",
        /// Whether discards of the guest reach the file (default: as discard).
        pass_discard_request: Option<bool> = "pass-discard-request",
        /// Memory for cached metadata in all.
        cache_size: Option<Size> = "cache-size",
        /// Memory for cached L2 tables.
        l2_cache_size: Option<Size> = "l2-cache-size",
        /// The size of a cached piece of an L2 table: a power of two from 512 to the cluster size.
        l2_cache_entry_size: Option<Size> = "l2-cache-entry-size",
        /// Memory for cached refcount blocks.
        refcount_cache_size: Option<Size> = "refcount-cache-size",
        /// After how many seconds unused cache entries are dropped (default: 600; 0: never).
        cache_clean_interval: Option<u32> = "cache-clean-interval",
        /// The node that holds the guest's data, for images with an external data file.
        data_file: Option<BlockdevRef> = "data-file",
    }

    /// The points of a format's work at which a blkdebug rule comes into force.
    enum BlkdebugEvent {
        /// An L1 entry is written.
        L1Update = "l1_update",
        /// Space for a longer L1 table is allocated.
        L1GrowAllocTable = "l1_grow_alloc_table",
        /// The longer L1 table is written.
        L1GrowWriteTable = "l1_grow_write_table",
        /// The header is made to name it.
        L1GrowActivateTable = "l1_grow_activate_table",
        /// A piece of an L2 table is read.
        L2Load = "l2_load",
        /// A piece of an L2 table is written.
        L2Update = "l2_update",
        /// An entry for a compressed cluster is set.
        L2UpdateCompressed = "l2_update_compressed",
        /// A shared L2 table is read to be copied.
        L2AllocCowRead = "l2_alloc_cow_read",
        /// A new L2 table is written.
        L2AllocWrite = "l2_alloc_write",
        /// Guest data is read.
        ReadAio = "read_aio",
        /// Guest data is read from the backing node.
        ReadBackingAio = "read_backing_aio",
        /// A compressed cluster is read.
        ReadCompressed = "read_compressed",
        /// Guest data is written.
        WriteAio = "write_aio",
        /// A compressed cluster is written.
        WriteCompressed = "write_compressed",
        /// Machine state is read (never raised: there is none).
        VmstateLoad = "vmstate_load",
        /// Machine state is written (never raised: there is none).
        VmstateSave = "vmstate_save",
        /// Old data around a write is read.
        CowRead = "cow_read",
        /// Old data around a write is written to the new place.
        CowWrite = "cow_write",
        /// The refcount table is read.
        ReftableLoad = "reftable_load",
        /// The refcount table is about to grow.
        ReftableGrow = "reftable_grow",
        /// A piece of the refcount table is written.
        ReftableUpdate = "reftable_update",
        /// A refcount block is read.
        RefblockLoad = "refblock_load",
        /// A refcount block is written as a whole.
        RefblockUpdate = "refblock_update",
        /// A part of a refcount block is written.
        RefblockUpdatePart = "refblock_update_part",
        /// A refcount block is about to be made.
        RefblockAlloc = "refblock_alloc",
        /// A new refcount block's entry is set.
        RefblockAllocHookup = "refblock_alloc_hookup",
        /// A new refcount block is written.
        RefblockAllocWrite = "refblock_alloc_write",
        /// Blocks for a larger refcount table are written.
        RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
        /// The larger refcount table is written.
        RefblockAllocWriteTable = "refblock_alloc_write_table",
        /// The header is made to name it.
        RefblockAllocSwitchTable = "refblock_alloc_switch_table",
        /// Clusters are allocated.
        ClusterAlloc = "cluster_alloc",
        /// Space for a compressed cluster is allocated.
        ClusterAllocBytes = "cluster_alloc_bytes",
        /// Clusters are freed.
        ClusterFree = "cluster_free",
        /// A flush begins: what the node holds is handed down.
        FlushToOs = "flush_to_os",
        /// What was handed down is made durable.
        FlushToDisk = "flush_to_disk",
        /// The first block of an unaligned write is read.
        PwritevRmwHead = "pwritev_rmw_head",
        /// It has been read.
        PwritevRmwAfterHead = "pwritev_rmw_after_head",
        /// The last block of an unaligned write is read.
        PwritevRmwTail = "pwritev_rmw_tail",
        /// It has been read.
        PwritevRmwAfterTail = "pwritev_rmw_after_tail",
        /// A write reaches the node.
        Pwritev = "pwritev",
        /// A write of zeroes reaches the node.
        PwritevZero = "pwritev_zero",
        /// A write, of zeroes or not, has ended.
        PwritevDone = "pwritev_done",
        /// An image is about to be emptied (never raised: no operation empties one).
        EmptyImagePrepare = "empty_image_prepare",
        /// L1 entries behind a new end are cleared.
        L1ShrinkWriteTable = "l1_shrink_write_table",
        /// The L2 tables behind a new end are freed.
        L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
        /// Data is copied on read (never raised: there is no copy-on-read).
        CorWrite = "cor_write",
        /// Allocated clusters are zeroed.
        ClusterAllocSpace = "cluster_alloc_space",
        /// Nothing: raised once, when the listener is opened.
        None = "none",
    }

    /// Kinds of requests.
    enum BlkdebugIOType {
        /// Reads.
        Read = "read",
        /// Writes.
        Write = "write",
        /// Writes of zeroes.
        WriteZeroes = "write-zeroes",
        /// Discards.
        Discard = "discard",
        /// Flushes.
        Flush = "flush",
        /// Queries of block status.
        BlockStatus = "block-status",
    }

    /// An error to inject.
    struct BlkdebugInjectErrorOptions {
        /// The event that puts it into force.
        event: BlkdebugEvent = "event",
        /// The state in which the event must find the node (default: any).
        state: Option<i64> = "state",
        /// The kind of requests that fail (default: all but block-status).
        iotype: Option<BlkdebugIOType> = "iotype",
        /// The error number; 0 for none (default: 5, EIO).
        errno: Option<i64> = "errno",
        /// Only requests that touch this sector fail (default: all).
        sector: Option<i64> = "sector",
        /// Whether only one request fails (default: off).
        once: Option<bool> = "once",
        /// Whether the request fails without going through the scheduler (default: off).
        immediately: Option<bool> = "immediately",
    }

    /// A change of state.
    struct BlkdebugSetStateOptions {
        /// The event that brings it about.
        event: BlkdebugEvent = "event",
        /// The state in which the event must find the node (default: any).
        state: Option<i64> = "state",
        /// The state afterwards; a node begins in state 1.
        new_state: i64 = "new_state",
    }

    /// A filter that injects errors.
    struct BlockdevOptionsBlkdebug {
        /// The node below.
        image: BlockdevRef = "image",
        /// A file with rules in sections [inject-error] and [set-state].
        config: Option<String> = "config",
        /// Alignment that requests must have: a power of two.
        align: Option<Size> = "align",
        /// Most bytes of a read or write.
        max_transfer: Option<Size> = "max-transfer",
        /// Alignment that writes of zeroes must have.
        opt_write_zero: Option<Size> = "opt-write-zero",
        /// Most bytes of a write of zeroes.
        max_write_zero: Option<Size> = "max-write-zero",
        /// Alignment that discards have where they can.
        opt_discard: Option<Size> = "opt-discard",
        /// Most bytes of a discard.
        max_discard: Option<Size> = "max-discard",
        /// Errors to inject.
        inject_error: Option<Vec<BlkdebugInjectErrorOptions>> = "inject-error",
        /// Changes of state.
        set_state: Option<Vec<BlkdebugSetStateOptions>> = "set-state",
        /// Permissions on the child that the node uses whatever its users do.
        take_child_perms: Option<Vec<BlockPermission>> = "take-child-perms",
        /// Permissions on the child that others may not use.
        unshare_child_perms: Option<Vec<BlockPermission>> = "unshare-child-perms",
    }

    /// A block node in place, or the name of an existing one.
    alternate BlockdevRef {
        /// In place.
        Definition(Box<BlockdevOptions>),
        /// By name.
        Reference(String),
    }

    /// As BlockdevRef, or null for no node at all.
    alternate BlockdevRefOrNull {
        /// In place.
        Definition(Box<BlockdevOptions>),
        /// By name.
        Reference(String),
        /// None.
        Null(()),
    }
}

impl BlockdevOptions {
    /// The name of the node, if one is given.
    pub fn node_name(&self) -> Option<&str> {
        self.base.node_name.as_deref()
    }

    /// The nodes that this one names or defines, with the names of their edges, in the order in which they are opened.
    pub fn children(&self) -> Vec<(&'static str, &BlockdevRef)> {
        match &self.driver {
            BlockdevDriver::Blklogwrites(o) => vec![("file", &o.file), ("log", &o.log)],
            BlockdevDriver::Blkverify(o) => vec![("raw", &o.raw), ("test", &o.test)],
            BlockdevDriver::Blkdebug(o) => vec![("image", &o.image)],
            BlockdevDriver::Raw(o) => vec![("file", &o.file)],
            BlockdevDriver::Qcow2(o) => {
                let mut all = vec![("file", &o.file)];
                all.extend(o.data_file.as_ref().map(|d| ("data-file", d)));
                all
            }
            BlockdevDriver::File(_)
            | BlockdevDriver::HostDevice(_)
            | BlockdevDriver::NullAio(_)
            | BlockdevDriver::NullCo(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Qapi, from_arg, from_json};
    use serde_json::json;

    /// Goal: what is read is written back the same. Method: a tree with every kind of member.
    #[test]
    fn round_trip() {
        let v = json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap", "detect-zeroes": "unmap",
            "cache": {"direct": true, "no-flush": false},
            "file": {"driver": "file", "filename": "a.qcow2", "locking": "off", "aio": "io_uring"},
            "backing": null, "l2-cache-size": 1048576, "data-file": "other",
        });
        let o: BlockdevOptions = from_json(&v).unwrap();
        assert_eq!(from_json::<BlockdevOptions>(&o.write()).unwrap(), o);
        assert_eq!(o.write().as_object().unwrap().len(), v.as_object().unwrap().len());
        assert_eq!(o.children().len(), 2);
    }

    /// Goal: dotted and JSON forms mean the same. Method: one node in both.
    #[test]
    fn dotted_form() {
        let dotted = "raw,node-name=n,cache.direct=on,file.driver=null-co,file.size=1M,offset=512";
        let a: BlockdevOptions = from_arg(dotted, Some("driver")).unwrap();
        let text = "{'driver':'raw','node-name':'n','cache':{'direct':true},'offset':512,
                     'file':{'driver':'null-co','size':1048576}}";
        let b: BlockdevOptions = from_arg(text, Some("driver")).unwrap();
        assert_eq!(a, b);
    }

    /// Goal: the peer's error texts. Method: recorded from it.
    #[test]
    fn errors() {
        for (text, want) in [
            ("{}", "Parameter 'driver' is missing"),
            ("{'driver':'nope'}", "Parameter 'driver' does not accept value 'nope'"),
            ("{'driver':1}", "Invalid parameter type for 'driver', expected: string"),
            (
                "{'driver':'null-co','node-name':5}",
                "Invalid parameter type for 'node-name', expected: string",
            ),
            ("{'driver':'null-co','foo':1}", "Parameter 'foo' is unexpected"),
            ("{'driver':'null-co','size':'1'}", "Invalid parameter type for 'size', expected: integer"),
            ("{'driver':'raw','file':1}", "Invalid parameter type for 'file', expected: BlockdevRef"),
            ("{'driver':'raw','file':null}", "Invalid parameter type for 'file', expected: BlockdevRef"),
            ("{'driver':'raw'}", "Parameter 'file' is missing"),
            ("{'driver':'raw','file':{}}", "Parameter 'file.driver' is missing"),
            ("{'driver':'raw','file':{'driver':'null-co','bar':1}}", "Parameter 'file.bar' is unexpected"),
            ("{'driver':'raw','file':{'driver':'file'}}", "Parameter 'file.filename' is missing"),
            (
                "{'driver':'null-co','cache':{'direct':1}}",
                "Invalid parameter type for 'cache.direct', expected: boolean",
            ),
            ("{'driver':'raw','file':{'driver':'nope'}}", "Parameter 'driver' does not accept value 'nope'"),
            ("{'driver':'null-co','discard':'x'}", "Parameter 'discard' does not accept value 'x'"),
            (
                "{'driver':'qcow2','file':'x','backing':5}",
                "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
            ),
        ] {
            let got = from_arg::<BlockdevOptions>(text, Some("driver")).unwrap_err();
            assert_eq!(got.message, want, "{text}");
        }
    }
}
