//! Queries: nodes with their images, counters, the graph itself.

use super::Daemon;
use crate::Error;
use crate::qmp::dispatch::{Call, Registry};
use ringblock_drivers::format::qcow2::Qcow2;
use ringblock_drivers::format::qcow2::header::{CompressionType, Header, incompatible};
use ringblock_drivers::options::types::{BlockPermission, BlockdevDetectZeroesOptions, Empty};
use ringblock_engine::driver::perm;
use ringblock_engine::graph::{DetectZeroes, GraphInfo, NodeId, NodeInfo};
use ringblock_engine::path::{OpClass, Snapshot};
use ringblock_engine::throttle::Member;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

ringblock_drivers::qapi! {
    /// A device of a guest; this program has none.
    struct BlockInfo {
        /// Its name.
        device: String = "device",
        /// Always "unknown".
        kind: String = "type",
        /// Whether its medium can be taken out.
        removable: bool = "removable",
        /// Whether its medium is locked.
        locked: bool = "locked",
    }

    /// Arguments of query-named-block-nodes.
    struct QueryNamedBlockNodesArgs: Default {
        /// Whether backing images are left out of the images above them (default: off).
        flat: Option<bool> = "flat",
    }

    /// Arguments of query-blockstats.
    struct QueryBlockstatsArgs: Default {
        /// Whether nodes are listed and not devices of guests (default: off).
        query_nodes: Option<bool> = "query-nodes",
    }

    /// Use of the page cache.
    struct BlockdevCacheInfo {
        /// Whether writes may be held in memory until a flush.
        writeback: bool = "writeback",
        /// Whether the host's page cache is passed by.
        direct: bool = "direct",
        /// Whether flushes are ignored.
        no_flush: bool = "no-flush",
    }

    /// An image.
    struct ImageInfo {
        /// Its file name.
        filename: String = "filename",
        /// Its format.
        format: String = "format",
        /// Size that a client sees, in bytes.
        virtual_size: i64 = "virtual-size",
        /// Space that it takes on the host, in bytes.
        actual_size: Option<i64> = "actual-size",
        /// Whether it was not closed properly.
        dirty_flag: Option<bool> = "dirty-flag",
        /// Cluster size in bytes.
        cluster_size: Option<i64> = "cluster-size",
        /// File name of the image below.
        backing_filename: Option<String> = "backing-filename",
        /// The same with its folder.
        full_backing_filename: Option<String> = "full-backing-filename",
        /// Format of the image below.
        backing_filename_format: Option<String> = "backing-filename-format",
        /// The image below.
        backing_image: Option<Box<ImageInfo>> = "backing-image",
        /// What only its format has.
        format_specific: Option<ImageInfoSpecific> = "format-specific",
    }

    /// What only one format has.
    union ImageInfoSpecific {
        base: Empty,
        tag kind: ImageInfoSpecificKind = "type",
        /// A qcow2 image.
        Qcow2(ImageInfoSpecificQCow2Wrapper) = "qcow2",
    }

    /// A qcow2 image.
    struct ImageInfoSpecificQCow2Wrapper {
        /// What it has.
        data: ImageInfoSpecificQCow2 = "data",
    }

    /// How compressed clusters are packed.
    enum Qcow2CompressionType {
        /// Deflate.
        Zlib = "zlib",
        /// Zstandard.
        Zstd = "zstd",
    }

    /// What only qcow2 images have.
    struct ImageInfoSpecificQCow2 {
        /// The lowest version of QEMU that reads it.
        compat: String = "compat",
        /// File name of the external data file.
        data_file: Option<String> = "data-file",
        /// Whether that is readable as a raw image.
        data_file_raw: Option<bool> = "data-file-raw",
        /// Whether there are subclusters.
        extended_l2: Option<bool> = "extended-l2",
        /// Whether refcounts may be written late.
        lazy_refcounts: Option<bool> = "lazy-refcounts",
        /// Whether it is known to be broken.
        corrupt: Option<bool> = "corrupt",
        /// Bits of a refcount.
        refcount_bits: i64 = "refcount-bits",
        /// How compressed clusters are packed.
        compression_type: Qcow2CompressionType = "compression-type",
    }

    /// A node.
    struct BlockDeviceInfo {
        /// Its file name.
        file: String = "file",
        /// Its name.
        node_name: Option<String> = "node-name",
        /// Whether it refuses writes.
        ro: bool = "ro",
        /// Its driver.
        drv: String = "drv",
        /// File name of the image below.
        backing_file: Option<String> = "backing_file",
        /// How many images are below.
        backing_file_depth: i64 = "backing_file_depth",
        /// Whether it is encrypted.
        encrypted: bool = "encrypted",
        /// Whether it is in use here (always).
        active: bool = "active",
        /// Whether writes of zeroes are found.
        detect_zeroes: BlockdevDetectZeroesOptions = "detect_zeroes",
        /// Limit of bytes per second (0: none).
        bps: i64 = "bps",
        /// Limit of bytes read per second.
        bps_rd: i64 = "bps_rd",
        /// Limit of bytes written per second.
        bps_wr: i64 = "bps_wr",
        /// Limit of requests per second.
        iops: i64 = "iops",
        /// Limit of reads per second.
        iops_rd: i64 = "iops_rd",
        /// Limit of writes per second.
        iops_wr: i64 = "iops_wr",
        /// The image.
        image: ImageInfo = "image",
        /// Use of the page cache.
        cache: BlockdevCacheInfo = "cache",
        /// Offset that a write must pass to be told of (0: none).
        write_threshold: i64 = "write_threshold",
    }

    /// Statistics over an interval.
    struct BlockDeviceTimedStats {
        /// Its length in seconds.
        interval_length: i64 = "interval_length",
    }

    /// How long requests were held back by limits, as counts by duration.
    struct ThrottleWaits {
        /// Where a bin ends and the next begins, in ns.
        boundaries: Vec<i64> = "boundaries",
        /// Requests in each bin; there is one more bin than boundaries.
        bins: Vec<i64> = "bins",
    }

    /// What a throttle node holds back.
    struct BlockThrottleStats {
        /// Its group.
        group: String = "group",
        /// Its share beside other members of the group.
        weight: i64 = "weight",
        /// Reads that wait now.
        rd_queue_length: i64 = "rd-queue-length",
        /// Writes, write-zeroes and discards that wait now.
        wr_queue_length: i64 = "wr-queue-length",
        /// How long requests had to wait; those that had not are not counted.
        waits: ThrottleWaits = "waits",
    }

    /// Counters.
    struct BlockDeviceStats: Default {
        /// Bytes read.
        rd_bytes: i64 = "rd_bytes",
        /// Bytes written.
        wr_bytes: i64 = "wr_bytes",
        /// Bytes discarded or zeroed.
        unmap_bytes: i64 = "unmap_bytes",
        /// Reads.
        rd_operations: i64 = "rd_operations",
        /// Writes.
        wr_operations: i64 = "wr_operations",
        /// Flushes.
        flush_operations: i64 = "flush_operations",
        /// Discards and zero writes.
        unmap_operations: i64 = "unmap_operations",
        /// Time in reads, in ns.
        rd_total_time_ns: i64 = "rd_total_time_ns",
        /// Time in writes, in ns.
        wr_total_time_ns: i64 = "wr_total_time_ns",
        /// Time in flushes, in ns.
        flush_total_time_ns: i64 = "flush_total_time_ns",
        /// Time in discards and zero writes, in ns.
        unmap_total_time_ns: i64 = "unmap_total_time_ns",
        /// Reads that failed.
        failed_rd_operations: i64 = "failed_rd_operations",
        /// Writes that failed.
        failed_wr_operations: i64 = "failed_wr_operations",
        /// Flushes that failed.
        failed_flush_operations: i64 = "failed_flush_operations",
        /// Discards and zero writes that failed.
        failed_unmap_operations: i64 = "failed_unmap_operations",
        /// End of the highest write so far, in bytes.
        wr_highest_offset: i64 = "wr_highest_offset",
        /// Reads that were merged with others (none).
        rd_merged: i64 = "rd_merged",
        /// Writes that were merged with others (none).
        wr_merged: i64 = "wr_merged",
        /// Discards that were merged with others (none).
        unmap_merged: i64 = "unmap_merged",
        /// Refused reads; not counted.
        invalid_rd_operations: i64 = "invalid_rd_operations",
        /// Refused writes; not counted.
        invalid_wr_operations: i64 = "invalid_wr_operations",
        /// Refused flushes; not counted.
        invalid_flush_operations: i64 = "invalid_flush_operations",
        /// Refused discards; not counted.
        invalid_unmap_operations: i64 = "invalid_unmap_operations",
        /// Zone appends; there are no zones.
        zone_append_operations: i64 = "zone_append_operations",
        /// Bytes of those.
        zone_append_bytes: i64 = "zone_append_bytes",
        /// Those merged.
        zone_append_merged: i64 = "zone_append_merged",
        /// Time in those.
        zone_append_total_time_ns: i64 = "zone_append_total_time_ns",
        /// Those that failed.
        failed_zone_append_operations: i64 = "failed_zone_append_operations",
        /// Those refused.
        invalid_zone_append_operations: i64 = "invalid_zone_append_operations",
        /// Statistics over intervals; none are kept.
        timed_stats: Vec<BlockDeviceTimedStats> = "timed_stats",
        /// Whether failed requests count in the other counters.
        account_failed: bool = "account_failed",
        /// Whether refused requests count in the other counters.
        account_invalid: bool = "account_invalid",
    }

    /// A node's counters: those of all its users together.
    struct BlockStats {
        /// The node.
        node_name: Option<String> = "node-name",
        /// The counters.
        stats: BlockDeviceStats = "stats",
        /// What limits do to it, for throttle nodes.
        throttle: Option<BlockThrottleStats> = "throttle",
        /// The node that holds the bytes.
        parent: Option<Box<BlockStats>> = "parent",
        /// The node below.
        backing: Option<Box<BlockStats>> = "backing",
    }

    /// Kinds of nodes of the graph.
    enum XDbgBlockGraphNodeType {
        /// A user of a node.
        BlockBackend = "block-backend",
        /// A job.
        BlockJob = "block-job",
        /// A node.
        BlockDriver = "block-driver",
    }

    /// A node of the graph.
    struct XDbgBlockGraphNode {
        /// Its number in this answer.
        id: u64 = "id",
        /// Its kind.
        kind: XDbgBlockGraphNodeType = "type",
        /// Its name.
        name: String = "name",
    }

    /// An edge of the graph.
    struct XDbgBlockGraphEdge {
        /// Number of the user.
        parent: u64 = "parent",
        /// Number of the node used.
        child: u64 = "child",
        /// Its name.
        name: String = "name",
        /// What the user does.
        perm: Vec<BlockPermission> = "perm",
        /// What it lets others do.
        shared_perm: Vec<BlockPermission> = "shared-perm",
    }

    /// The whole graph.
    struct XDbgBlockGraph {
        /// Nodes and their users.
        nodes: Vec<XDbgBlockGraphNode> = "nodes",
        /// Who uses what.
        edges: Vec<XDbgBlockGraphEdge> = "edges",
    }
}

type DaemonCall<'a> = Call<'a, Daemon>;

/// Adds the commands.
pub(super) fn register(registry: &mut Registry<Daemon>) {
    registry.command("query-block", |_: &DaemonCall<'_>, _: Empty| Ok(Vec::<BlockInfo>::new()));
    registry.command("query-named-block-nodes", |call: &DaemonCall<'_>, args: QueryNamedBlockNodesArgs| {
        call.context.query_named_block_nodes(!args.flat.unwrap_or(false))
    });
    registry.command("query-blockstats", |call: &DaemonCall<'_>, args: QueryBlockstatsArgs| {
        call.context.query_blockstats(args.query_nodes.unwrap_or(false))
    });
    registry.marked_command("x-debug-query-block-graph", &["unstable"], |call: &DaemonCall<'_>, _: Empty| {
        Ok(block_graph(&call.context.storage()?.info()))
    });
}

impl Daemon {
    /// Drivers are asked on the graph's core; the host, which may be slow, is asked here.
    fn query_named_block_nodes(&self, nested: bool) -> Result<Vec<BlockDeviceInfo>, Error> {
        let storage = self.storage()?;
        let files = storage.on_graph(|graph| Box::pin(async move { host_files(&graph.info()) }));
        let sizes: Sizes = files.into_iter().map(|(id, name)| (id, host_size(&name))).collect();
        Ok(storage.on_graph(move |graph| {
            Box::pin(async move {
                let view = View { graph: graph.info(), sizes, nested };
                view.graph.nodes.iter().map(|n| view.device_info(n)).collect()
            })
        }))
    }

    fn query_blockstats(&self, nodes: bool) -> Result<Vec<BlockStats>, Error> {
        let storage = self.storage()?;
        if !nodes {
            return Ok(Vec::new());
        }
        let graph = storage.info();
        let mut sums: BTreeMap<String, BlockDeviceStats> = BTreeMap::new();
        for root in &graph.roots {
            add(sums.entry(root.node.clone()).or_default(), &storage.stats(root.root));
        }
        let stats = |n: &NodeInfo| BlockStats {
            node_name: Some(n.name.clone()),
            stats: sums.get(&n.name).cloned().unwrap_or_default(),
            throttle: n.driver.throttle().map(|m| throttle_stats(&m)),
            parent: None,
            backing: None,
        };
        Ok(graph.nodes.iter().map(stats).collect())
    }
}

/// Ends of bins: 1, 2 and 5 times powers of ten, from 10 microseconds to 100 seconds.
fn wait_boundaries() -> Vec<u64> {
    let decades = (4..11).map(|e| 10u64.pow(e));
    decades.flat_map(|d| [d, 2 * d, 5 * d]).chain([10u64.pow(11)]).collect()
}

fn throttle_stats(member: &Member) -> BlockThrottleStats {
    let stats = member.stats();
    let ends = wait_boundaries();
    let mut bins = vec![0u64; ends.len() + 1];
    for step in stats.waits.iter().flat_map(|w| w.iter_recorded()) {
        bins[ends.partition_point(|&e| e <= step.value_iterated_to())] += step.count_at_value();
    }
    let list = |v: Vec<u64>| v.into_iter().map(signed).collect();
    BlockThrottleStats {
        group: member.group().name().to_owned(),
        weight: i64::from(member.weight()),
        rd_queue_length: signed(stats.waiting_reads),
        wr_queue_length: signed(stats.waiting_writes),
        waits: ThrottleWaits { boundaries: list(ends), bins: list(bins) },
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn add(to: &mut BlockDeviceStats, from: &Snapshot) {
    let one = |class: OpClass, ops: &mut i64, bytes: Option<&mut i64>, ns: &mut i64, failed: &mut i64| {
        let s = from.get(class);
        let more = |n: &mut i64, by: u64| *n = n.saturating_add(signed(by));
        more(ops, s.ops);
        more(ns, s.total_ns);
        more(failed, s.failed);
        if let Some(bytes) = bytes {
            more(bytes, s.bytes);
        }
    };
    to.wr_highest_offset = to.wr_highest_offset.max(signed(from.highest_write()));
    one(
        OpClass::Read,
        &mut to.rd_operations,
        Some(&mut to.rd_bytes),
        &mut to.rd_total_time_ns,
        &mut to.failed_rd_operations,
    );
    one(
        OpClass::Write,
        &mut to.wr_operations,
        Some(&mut to.wr_bytes),
        &mut to.wr_total_time_ns,
        &mut to.failed_wr_operations,
    );
    one(
        OpClass::Flush,
        &mut to.flush_operations,
        None,
        &mut to.flush_total_time_ns,
        &mut to.failed_flush_operations,
    );
    one(
        OpClass::Unmap,
        &mut to.unmap_operations,
        Some(&mut to.unmap_bytes),
        &mut to.unmap_total_time_ns,
        &mut to.failed_unmap_operations,
    );
}

fn child<'a>(graph: &'a GraphInfo, node: &NodeInfo, edge: &str) -> Option<&'a NodeInfo> {
    let id = node.edges.iter().find(|e| e.name == edge)?.node;
    graph.nodes.iter().find(|n| n.id == id)
}

/// Space on the host by file node.
type Sizes = BTreeMap<NodeId, i64>;

fn host_files(graph: &GraphInfo) -> Vec<(NodeId, String)> {
    let of_host = |n: &&NodeInfo| matches!(n.driver.name(), "file" | "host_device");
    graph.nodes.iter().filter(of_host).map(|n| (n.id, n.driver.filename())).collect()
}

fn host_size(name: &str) -> i64 {
    std::fs::metadata(name).map_or(0, |m| signed(m.blocks().saturating_mul(512)))
}

/// What the answer is made from.
struct View {
    graph: GraphInfo,
    sizes: Sizes,
    nested: bool,
}

impl View {
    fn device_info(&self, n: &NodeInfo) -> BlockDeviceInfo {
        let mut depth = 0;
        let mut below = child(&self.graph, n, "backing");
        let backing_file = below.map(|b| b.driver.filename());
        while let Some(b) = below {
            depth += 1;
            below = child(&self.graph, b, "backing");
        }
        BlockDeviceInfo {
            file: n.driver.filename(),
            node_name: Some(n.name.clone()),
            ro: n.flags.read_only,
            drv: n.driver.name().into(),
            backing_file,
            backing_file_depth: depth,
            encrypted: false,
            active: true,
            detect_zeroes: match n.flags.detect_zeroes {
                DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
                DetectZeroes::On => BlockdevDetectZeroesOptions::On,
                DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
            },
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image: self.image_info(n),
            cache: BlockdevCacheInfo {
                writeback: true,
                direct: n.common.direct,
                no_flush: n.common.no_flush,
            },
            write_threshold: 0,
        }
    }

    fn image_info(&self, n: &NodeInfo) -> ImageInfo {
        let backing = child(&self.graph, n, "backing");
        let cluster = n.driver.limits().cluster_size;
        let header = n.driver.as_any().downcast_ref::<Qcow2>().map(Qcow2::header);
        ImageInfo {
            filename: n.driver.filename(),
            format: n.driver.name().into(),
            virtual_size: signed(n.driver.size()),
            actual_size: Some(self.actual_size(n)),
            dirty_flag: header.as_ref().map(|h| h.has(incompatible::DIRTY)),
            cluster_size: (cluster > 0).then(|| i64::from(cluster)),
            backing_filename: match &header {
                Some(h) => h.backing_file.clone(),
                None => backing.map(|b| b.driver.filename()),
            },
            full_backing_filename: backing.map(|b| b.driver.filename()),
            backing_filename_format: backing.map(|b| b.driver.name().into()),
            backing_image: backing.filter(|_| self.nested).map(|b| Box::new(self.image_info(b))),
            format_specific: header.map(|h| ImageInfoSpecific {
                base: Empty {},
                kind: ImageInfoSpecificKind::Qcow2(ImageInfoSpecificQCow2Wrapper { data: specific(&h) }),
            }),
        }
    }

    /// Space on the host of the files that a node keeps its own bytes in.
    fn actual_size(&self, n: &NodeInfo) -> i64 {
        if let Some(size) = self.sizes.get(&n.id) {
            return *size;
        }
        let own = ["file", "data-file", "image"].iter().filter_map(|e| child(&self.graph, n, e));
        own.map(|c| self.actual_size(c)).fold(0, i64::saturating_add)
    }
}

/// What only qcow2 images have, as it was when the image was opened.
fn specific(h: &Header) -> ImageInfoSpecificQCow2 {
    let v3 = h.version >= 3;
    ImageInfoSpecificQCow2 {
        compat: if v3 { "1.1" } else { "0.10" }.into(),
        data_file: h.extensions.data_file.clone(),
        data_file_raw: h.external_data().then(|| h.data_file_raw()),
        extended_l2: v3.then(|| h.extended_l2()),
        lazy_refcounts: v3.then(|| h.lazy_refcounts()),
        corrupt: v3.then(|| h.has(incompatible::CORRUPT)),
        refcount_bits: 1i64.checked_shl(h.refcount_order).unwrap_or(0),
        compression_type: match h.compression {
            CompressionType::Zlib => Qcow2CompressionType::Zlib,
            CompressionType::Zstd => Qcow2CompressionType::Zstd,
        },
    }
}

fn permissions(bits: u8) -> Vec<BlockPermission> {
    let all = [
        (perm::CONSISTENT_READ, BlockPermission::ConsistentRead),
        (perm::WRITE, BlockPermission::Write),
        (perm::WRITE_UNCHANGED, BlockPermission::WriteUnchanged),
        (perm::RESIZE, BlockPermission::Resize),
    ];
    all.into_iter().filter(|(bit, _)| bits & bit != 0).map(|(_, p)| p).collect()
}

fn block_graph(graph: &GraphInfo) -> XDbgBlockGraph {
    let mut out = XDbgBlockGraph { nodes: Vec::new(), edges: Vec::new() };
    let mut numbers: BTreeMap<NodeId, u64> = BTreeMap::new();
    let mut names: BTreeMap<&str, u64> = BTreeMap::new();
    for (number, n) in (1..).zip(&graph.nodes) {
        numbers.insert(n.id, number);
        names.insert(&n.name, number);
        let kind = XDbgBlockGraphNodeType::BlockDriver;
        out.nodes.push(XDbgBlockGraphNode { id: number, kind, name: n.name.clone() });
    }
    let first = out.nodes.len() as u64 + 1;
    for (next, root) in (first..).zip(&graph.roots) {
        let kind = XDbgBlockGraphNodeType::BlockBackend;
        out.nodes.push(XDbgBlockGraphNode { id: next, kind, name: String::new() });
        if let Some(node) = names.get(root.node.as_str()) {
            out.edges.push(XDbgBlockGraphEdge {
                parent: next,
                child: *node,
                name: "root".into(),
                perm: permissions(root.perms.0),
                shared_perm: permissions(root.perms.1),
            });
        }
    }
    for n in &graph.nodes {
        for e in &n.edges {
            if let (Some(parent), Some(child)) = (numbers.get(&n.id), numbers.get(&e.node)) {
                out.edges.push(XDbgBlockGraphEdge {
                    parent: *parent,
                    child: *child,
                    name: e.name.into(),
                    perm: permissions(e.perms.0),
                    shared_perm: permissions(e.perms.1),
                });
            }
        }
    }
    out
}
