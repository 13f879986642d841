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

use crate::format::raw::{self, RawConfig};
use crate::options::blockdev::{
    BlockdevDriver, BlockdevOptions, BlockdevOptionsBase, BlockdevOptionsFile, BlockdevOptionsNull,
    BlockdevOptionsRaw, BlockdevRef,
};
use crate::options::types::{
    BlockdevAioOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions, OnOffAuto,
};
use crate::protocol::file::{FileConfig, FileDriver};
use crate::protocol::null::{DEFAULT_SIZE, NullConfig, NullDriver};
use ringblock_engine::driver::{LocalFuture, OpenFn, Opened, Role};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, Common, DetectZeroes, NodeSpec, OpenCx};
use ringblock_engine::host::linux::lock::Locking;
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

/// A child as an option of its parent gives it: in place, inheriting from the parent, or by name.
pub fn child(of: &BlockdevRef, parent: &Common, role: Role) -> Result<ChildSpec, Error> {
    let options = match of {
        BlockdevRef::Reference(name) => return Ok(ChildSpec::Reference(name.clone())),
        BlockdevRef::Definition(options) => (**options).clone(),
    };
    // A parent that settles for read-only passes the right to do so on.
    let inherited = Common {
        auto_read_only: parent.auto_read_only,
        ..parent.for_child(role)
    };
    let common = common(&options.base, inherited)?;
    Ok(ChildSpec::Inline(Box::new(spec(
        options,
        common,
        How::default(),
    )?)))
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
        discard: base
            .discard
            .map_or(inherited.discard, |d| d == BlockdevDiscardOptions::Unmap),
        detect_zeroes: base.detect_zeroes.map_or(inherited.detect_zeroes, |d| match d {
            BlockdevDetectZeroesOptions::Off => DetectZeroes::Off,
            BlockdevDetectZeroesOptions::On => DetectZeroes::On,
            BlockdevDetectZeroesOptions::Unmap => DetectZeroes::Unmap,
        }),
    };
    if common.force_share && !common.read_only {
        return Err(Error::invalid(
            "force-share=on can only be used with read-only images",
        ));
    }
    if common.detect_zeroes == DetectZeroes::Unmap && !common.discard {
        return Err(Error::invalid(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    Ok(common)
}

fn spec(options: BlockdevOptions, common: Common, how: How) -> Result<NodeSpec, Error> {
    let open = open_fn(&options, &common, how)?;
    Ok(NodeSpec {
        name: options.base.node_name.clone(),
        common,
        home: how.home,
        config: Arc::new(options),
        open,
    })
}

fn open_fn(options: &BlockdevOptions, common: &Common, how: How) -> Result<OpenFn, Error> {
    match &options.driver {
        BlockdevDriver::File(o) => file(o, common, false),
        BlockdevDriver::HostDevice(o) => file(o, common, true),
        BlockdevDriver::NullAio(o) => null(o, "null-aio"),
        BlockdevDriver::NullCo(o) => null(o, "null-co"),
        BlockdevDriver::Raw(o) => Ok(raw(o, common, how)?),
        BlockdevDriver::Qcow2(_) => Err(Error::new(Errno::ENOTSUP, "Unknown driver 'qcow2'")),
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
        locking: match o.locking {
            None | Some(OnOffAuto::Auto) => Locking::Auto,
            Some(OnOffAuto::On) => Locking::On,
            Some(OnOffAuto::Off) => Locking::Off,
        },
        force_share: common.force_share,
    };
    Ok(Box::new(move |_cx| {
        Box::pin(async move {
            let driver = FileDriver::open(config).await?;
            Ok(Opened {
                driver: Arc::new(driver),
                owner: None,
            })
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
    Ok(Box::new(move |_cx| {
        Box::pin(async move {
            Ok(Opened {
                driver: Arc::new(driver),
                owner: None,
            })
        })
    }))
}

fn raw(o: &BlockdevOptionsRaw, common: &Common, how: How) -> Result<OpenFn, Error> {
    let config = RawConfig {
        offset: o.offset.map_or(0, |s| s.0),
        size: o.size.map(|s| s.0),
        probed: how.probed,
    };
    let file = child(&o.file, common, Role::Data)?;
    Ok(Box::new(
        move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
            Box::pin(raw::open(cx, config, file))
        },
    ))
}
