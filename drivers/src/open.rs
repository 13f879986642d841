//! From typed options to a node that the engine can open: one tree of options, one tree of nodes.
//!
//! Nothing is opened here: each function only checks what can be told from the options and returns a description
//! ([`NodeSpec`]); the engine opens it bottom-up, all or nothing.
//!
//! ```text
//! BlockdevOptions ─ common (inherited from the parent where not given) ─┐
//!                 └ driver ─► its open function ────────────────────────┴─► NodeSpec ─► Graph::add
//!                                └ children: child(ref, &cx.common, role) ─► ChildSpec ─► OpenCx::open_child
//! ```

use crate::filter::{blklogwrites, blkverify, throttle};
use crate::format::qcow2::Qcow2;
use crate::format::raw::{self, RawConfig};
use crate::open_qcow2;
use crate::options::blockdev::{
    BlockdevDriver, BlockdevOptions, BlockdevOptionsBase, BlockdevOptionsBlklogwrites,
    BlockdevOptionsBlkverify, BlockdevOptionsFile, BlockdevOptionsNull, BlockdevOptionsQcow2,
    BlockdevOptionsRaw, BlockdevOptionsThrottle, BlockdevRef, BlockdevRefOrNull,
};
use crate::options::types::{BlockdevAioOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions};
use crate::protocol::file::{FileConfig, FileDriver, locking};
use crate::protocol::null::{DEFAULT_SIZE, NullConfig, NullDriver};
use ringblock_engine::driver::{LocalFuture, OpenFn, Opened, Role};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{
    ChildSpec, Common, DetectZeroes, GraphInfo, NodeInfo, NodeSpec, OpenCx, Reopen,
};
use std::sync::Arc;

/// How a node differs from what its options alone say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    /// Nobody named the format, it was guessed: a raw node guards its block 0.
    pub probed: bool,
    /// Home core; `None` lets the engine choose.
    pub home: Option<usize>,
}

/// A node of its own: what is not given is at its default.
pub fn node(options: BlockdevOptions) -> Result<NodeSpec, Error> {
    node_with(options, How::default())
}

/// As [`node`], with more to say.
pub fn node_with(options: BlockdevOptions, how: How) -> Result<NodeSpec, Error> {
    let common = common(&options.base, Common::default())?;
    spec(options, common, how)
}

/// A node to be checked with [`crate::format::qcow2::Qcow2::check`]: damage is no reason to refuse it, backing files
/// stay closed, and the node itself writes nothing. `EOPNOTSUPP` for formats that cannot be checked.
pub fn node_for_check(options: BlockdevOptions) -> Result<NodeSpec, Error> {
    let common = common(&options.base, Common::default())?;
    let BlockdevDriver::Qcow2(o) = &options.driver else {
        return Err(Error::new(Errno::ENOTSUP, "This image format does not support checks"));
    };
    let open = crate::open_qcow2::open_for_check(o, &common)?;
    Ok(NodeSpec { name: options.base.node_name.clone(), common, home: None, config: Arc::new(options), open })
}

/// A child as an option of its parent gives it: in place, inheriting from the parent, or by name.
pub fn child(of: &BlockdevRef, parent: &Common, role: Role) -> Result<ChildSpec, Error> {
    let options = match of {
        BlockdevRef::Reference(name) => return Ok(ChildSpec::Reference(name.clone())),
        BlockdevRef::Definition(options) => (**options).clone(),
    };
    let common = common(&options.base, inherit(parent, role))?;
    Ok(ChildSpec::Inline(Box::new(spec(options, common, How::default())?)))
}

/// A child that no option describes, with what it inherits.
pub(crate) fn implicit(options: BlockdevOptions, inherited: Common) -> Result<ChildSpec, Error> {
    let common = common(&options.base, inherited)?;
    Ok(ChildSpec::Inline(Box::new(spec(options, common, How::default())?)))
}

/// What a child in place takes over from its parent. A parent that settles for read-only passes the right on.
fn inherit(parent: &Common, role: Role) -> Common {
    Common { auto_read_only: parent.auto_read_only, ..parent.for_child(role) }
}

/// The options every node has, over what is inherited.
pub fn common(base: &BlockdevOptionsBase, inherited: Common) -> Result<Common, Error> {
    let cache = base.cache.as_ref();
    let common = Common {
        read_only: base.read_only.unwrap_or(inherited.read_only),
        auto_read_only: base.auto_read_only.unwrap_or(inherited.auto_read_only),
        force_share: base.force_share.unwrap_or(inherited.force_share),
        direct: cache.and_then(|c| c.direct).unwrap_or(inherited.direct),
        no_flush: cache.and_then(|c| c.no_flush).unwrap_or(inherited.no_flush),
        discard: base.discard.map_or(inherited.discard, |d| d == BlockdevDiscardOptions::Unmap),
        detect_zeroes: base.detect_zeroes.map_or(inherited.detect_zeroes, |d| match d {
            BlockdevDetectZeroesOptions::Off => DetectZeroes::Off,
            BlockdevDetectZeroesOptions::On => DetectZeroes::On,
            BlockdevDetectZeroesOptions::Unmap => DetectZeroes::Unmap,
        }),
    };
    if common.force_share && !common.read_only {
        return Err(Error::invalid("force-share=on can only be used with read-only images"));
    }
    if common.detect_zeroes == DetectZeroes::Unmap && !common.discard {
        return Err(Error::invalid(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    Ok(common)
}

pub(crate) fn spec(options: BlockdevOptions, common: Common, how: How) -> Result<NodeSpec, Error> {
    let open = open_fn(&options, &common, how)?;
    Ok(NodeSpec {
        name: options.base.node_name.clone(),
        common,
        home: how.home,
        config: Arc::new(options),
        open,
    })
}

pub(crate) fn open_fn(options: &BlockdevOptions, common: &Common, how: How) -> Result<OpenFn, Error> {
    match &options.driver {
        BlockdevDriver::Blklogwrites(o) => blklogwrites(o, common),
        BlockdevDriver::Blkverify(o) => blkverify(o, common),
        BlockdevDriver::Blkdebug(o) => crate::filter::blkdebug::open_fn(o, common),
        BlockdevDriver::File(o) => file(o, common, false),
        BlockdevDriver::HostDevice(o) => file(o, common, true),
        BlockdevDriver::NullAio(o) => null(o, "null-aio"),
        BlockdevDriver::NullCo(o) => null(o, "null-co"),
        BlockdevDriver::Raw(o) => Ok(raw(o, common, how)?),
        BlockdevDriver::Throttle(o) => throttled(o, common),
        BlockdevDriver::Qcow2(o) => crate::open_qcow2::open_fn(o, common),
    }
}

fn file(o: &BlockdevOptionsFile, common: &Common, device: bool) -> Result<OpenFn, Error> {
    if o.aio == Some(BlockdevAioOptions::Native) && !common.direct {
        return Err(Error::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    let config = FileConfig {
        device,
        filename: o.filename.clone().into(),
        direct: common.direct,
        read_only: common.read_only,
        auto_read_only: common.auto_read_only,
        locking: locking(o.locking),
        force_share: common.force_share,
    };
    Ok(Box::new(move |_cx| {
        Box::pin(async move {
            let driver = FileDriver::open(config).await?;
            Ok(Opened { driver: Arc::new(driver), owner: None })
        })
    }))
}

fn null(o: &BlockdevOptionsNull, name: &'static str) -> Result<OpenFn, Error> {
    let driver = NullDriver::new(NullConfig {
        name,
        size: o.size.map_or(DEFAULT_SIZE, |s| s.0),
        latency_ns: o.latency_ns.unwrap_or(0),
        read_zeroes: o.read_zeroes.unwrap_or(false),
    })?;
    Ok(Box::new(move |_cx| Box::pin(async move { Ok(Opened { driver: Arc::new(driver), owner: None }) })))
}

fn raw(o: &BlockdevOptionsRaw, common: &Common, how: How) -> Result<OpenFn, Error> {
    let config =
        RawConfig { offset: o.offset.map_or(0, |s| s.0), size: o.size.map(|s| s.0), probed: how.probed };
    let file = child(&o.file, common, Role::Data)?;
    Ok(Box::new(move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
        Box::pin(raw::open(cx, config, file))
    }))
}

fn blklogwrites(o: &BlockdevOptionsBlklogwrites, common: &Common) -> Result<OpenFn, Error> {
    let append = o.log_append.unwrap_or(false);
    if append && o.log_sector_size.is_some() {
        return Err(Error::invalid("log-append and log-sector-size are mutually exclusive"));
    }
    let config = blklogwrites::Config {
        sector_size: o.log_sector_size.unwrap_or(blklogwrites::SECTOR_SIZE),
        append,
        interval: o.log_super_update_interval.unwrap_or(blklogwrites::INTERVAL),
    };
    let (file, log) = (child(&o.file, common, Role::Filtered)?, child(&o.log, common, Role::Image)?);
    Ok(Box::new(move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
        Box::pin(blklogwrites::open(cx, config, file, log))
    }))
}

fn blkverify(o: &BlockdevOptionsBlkverify, common: &Common) -> Result<OpenFn, Error> {
    let (test, raw) = (child(&o.test, common, Role::Data)?, child(&o.raw, common, Role::Filtered)?);
    Ok(Box::new(move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
        Box::pin(blkverify::open(cx, test, raw))
    }))
}

fn throttled(o: &BlockdevOptionsThrottle, common: &Common) -> Result<OpenFn, Error> {
    throttle::check(o)?;
    let (options, file) = (o.clone(), child(&o.file, common, Role::Filtered)?);
    Ok(Box::new(move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
        Box::pin(throttle::open(cx, options, file))
    }))
}

/// The changes that `blockdev-reopen` asks for: the nodes named, and the children they describe in place.
///
/// Options that are not given go back to their defaults. A child given by another name takes the place of the one that is
/// there, where the format can be opened again on its edges (qcow2); `null` lets the backing node go.
pub fn reopen(all: Vec<BlockdevOptions>, graph: &GraphInfo) -> Result<Vec<Reopen>, Error> {
    let mut items = Vec::new();
    for options in all {
        let Some(name) = options.node_name().map(str::to_owned) else {
            return Err(Error::invalid("node-name not specified"));
        };
        let node = graph.nodes.iter().find(|n| n.name == name);
        let node = node.ok_or_else(|| {
            Error::new(Errno::ENODEV, format!("Failed to find node with node-name='{name}'"))
        })?;
        reopen_one(options, node, Common::default(), graph, &mut items)?;
    }
    Ok(items)
}

fn reopen_one(
    options: BlockdevOptions,
    node: &NodeInfo,
    inherited: Common,
    graph: &GraphInfo,
    items: &mut Vec<Reopen>,
) -> Result<(), Error> {
    if options.driver.as_str() != node.driver.name() {
        return Err(Error::invalid("Cannot change the option 'driver'"));
    }
    if options.node_name().is_some_and(|n| n != node.name) {
        return Err(Error::invalid("Cannot change the option 'node-name'"));
    }
    let common = common(&options.base, inherited)?;
    let mut children: Vec<_> = options.children().into_iter().map(|(edge, of)| (edge, of.clone())).collect();
    let (mut open, mut detach) = (None, Vec::new());
    if let BlockdevDriver::Qcow2(new) = &options.driver {
        children.extend(reopen_backing(new.backing.as_ref(), node, &mut detach)?.map(|of| ("backing", of)));
        open = Some(qcow2_again(new, &common, node)?);
    }
    let again = open.is_some();
    items.push(Reopen {
        name: node.name.clone(),
        flags: common.flags(),
        common,
        config: Arc::new(options),
        open,
        detach,
    });
    for (edge, of) in children {
        let role = if edge == "backing" { Role::Cow } else { Role::Data };
        let there = node.edges.iter().find(|e| e.name == edge);
        match of {
            BlockdevRef::Reference(name) if again || there.is_some_and(|e| e.child == name) => {}
            BlockdevRef::Definition(options) => {
                let child = there.and_then(|e| graph.nodes.iter().find(|n| n.id == e.node));
                match child {
                    Some(child) => reopen_one(*options, child, inherit(&common, role), graph, items)?,
                    // opened as a new node when its parent is opened again
                    None if again => {}
                    None => return Err(replaced(edge, node)),
                }
            }
            BlockdevRef::Reference(_) => return Err(replaced(edge, node)),
        }
    }
    Ok(())
}

/// What opens a qcow2 node again: with the new options, and with those it has.
fn qcow2_again(
    new: &BlockdevOptionsQcow2,
    common: &Common,
    node: &NodeInfo,
) -> Result<(OpenFn, OpenFn), Error> {
    let old = node.config.downcast_ref::<BlockdevOptions>().map(|o| &o.driver);
    let Some(BlockdevDriver::Qcow2(old)) = old else {
        return Err(Error::invalid("Cannot change the option 'driver'"));
    };
    // an edge that was given by name is found again by its name now
    Ok((open_qcow2::open_fn(new, common)?, open_qcow2::open_fn(old, &node.common)?))
}

fn replaced(edge: &str, node: &NodeInfo) -> Error {
    let text = format!("Changing the '{edge}' child of node '{}' is not supported", node.name);
    Error::new(Errno::ENOTSUP, text)
}

/// The `backing` option must be there if a backing node is, or if the image names one: leaving it out would not say which.
fn reopen_backing(
    given: Option<&BlockdevRefOrNull>,
    node: &NodeInfo,
    detach: &mut Vec<&'static str>,
) -> Result<Option<BlockdevRef>, Error> {
    let image = node.driver.as_any().downcast_ref::<Qcow2>();
    let there = node.edges.iter().any(|e| e.name == "backing")
        || image.is_some_and(|image| image.header().backing_file.is_some());
    match given {
        None if there => Err(Error::invalid(format!("backing is missing for '{}'", node.name))),
        None => Ok(None),
        Some(BlockdevRefOrNull::Null(())) => {
            detach.push("backing");
            Ok(None)
        }
        Some(BlockdevRefOrNull::Definition(o)) => Ok(Some(BlockdevRef::Definition(o.clone()))),
        Some(BlockdevRefOrNull::Reference(n)) => Ok(Some(BlockdevRef::Reference(n.clone()))),
    }
}
