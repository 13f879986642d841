//! Block nodes: the options of every driver.
//!
//! ```text
//! BlockdevOptions = node-name, cache, … + driver ─┬─ file, host_device   a file or device of the host
//!                                                 ├─ null-co, null-aio   nothing at all
//!                                                 ├─ raw                 file: BlockdevRef
//!                                                 ├─ throttle            file: BlockdevRef
//!                                                 └─ qcow2               file, backing, data-file: BlockdevRef
//! BlockdevRef     = options in place | name of an existing node
//! ```

use super::size::Size;
use super::types::{
    BlockdevAioOptions, BlockdevCacheOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions, OnOffAuto,
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
        /// Another node, with limits.
        Throttle(Box<BlockdevOptionsThrottle>) = "throttle",
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

    /// Another node, with limits.
    struct BlockdevOptionsThrottle {
        /// The throttle-group object whose limits apply.
        throttle_group: String = "throttle-group",
        /// The node.
        file: BlockdevRef = "file",
        /// Its share beside other members of the group that wait, from 1 to 10000 (default: 100).
        weight: Option<u32> = "weight",
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
            BlockdevDriver::Raw(o) => vec![("file", &o.file)],
            BlockdevDriver::Throttle(o) => vec![("file", &o.file)],
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
