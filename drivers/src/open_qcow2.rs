//! The qcow2 part of [`crate::open`]: its options, and the files that an image names.
//!
//! Names found in an image become nodes only as plain files (or block devices), with the format the image names; a
//! backing file without a format is probed, which is safe because backing nodes are read-only.

use crate::format::probe::{self, probe};
use crate::format::qcow2::{self, Backing, CacheOptions, NameOpener, NamedInImage, Qcow2Options};
use crate::open::{child, implicit};
use crate::options::blockdev::{
    BlockdevDriver, BlockdevOptions, BlockdevOptionsBase, BlockdevOptionsFile, BlockdevOptionsQcow2,
    BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull,
};
use ringblock_engine::driver::{OpenFn, Role};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, Common};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

/// What opens a qcow2 node.
pub(crate) fn open_fn(o: &BlockdevOptionsQcow2, common: &Common) -> Result<OpenFn, Error> {
    Ok(qcow2::open(options(o, common)?))
}

/// The typed options of the driver.
fn options(o: &BlockdevOptionsQcow2, common: &Common) -> Result<Qcow2Options, Error> {
    let backing = match &o.backing {
        None => Backing::FromImage,
        Some(BlockdevRefOrNull::Null(())) => Backing::None,
        Some(BlockdevRefOrNull::Definition(d)) => {
            Backing::Node(child(&BlockdevRef::Definition(d.clone()), common, Role::Cow)?)
        }
        Some(BlockdevRefOrNull::Reference(name)) => Backing::Node(ChildSpec::Reference(name.clone())),
    };
    let data_file = o.data_file.as_ref().map(|d| child(d, common, Role::Data)).transpose()?;
    let opener: NameOpener = Arc::new(open_named);
    Ok(Qcow2Options {
        backing,
        data_file,
        cache: CacheOptions {
            total: o.cache_size.map(|s| s.0),
            l2: o.l2_cache_size.map(|s| s.0),
            l2_entry: o.l2_cache_entry_size.map(|s| s.0),
            refcount: o.refcount_cache_size.map(|s| s.0),
            clean_interval: o.cache_clean_interval,
        },
        pass_discard_request: o.pass_discard_request,
        opener: Some(opener),
        ..Qcow2Options::new(child(&o.file, common, Role::Image)?)
    })
}

/// The node for a file that an image names.
fn open_named(named: &NamedInImage<'_>) -> Result<ChildSpec, Error> {
    let file = || BlockdevOptionsFile { filename: named.path.to_owned(), locking: None, aio: None };
    let device = std::fs::metadata(named.path).is_ok_and(|m| m.file_type().is_block_device());
    let driver = if device { BlockdevDriver::HostDevice(file()) } else { BlockdevDriver::File(file()) };
    let base = BlockdevOptionsBase::default;
    let file = BlockdevOptions { base: base(), driver };
    if named.role == Role::Data {
        return implicit(file, named.common);
    }
    let file = BlockdevRef::Definition(Box::new(file));
    let format = match named.format {
        Some(f) => f,
        None => probe_file(named.path)?,
    };
    let driver = match format {
        "raw" | "file" | "host_device" => {
            BlockdevDriver::Raw(Box::new(BlockdevOptionsRaw { file, offset: None, size: None }))
        }
        "qcow2" => BlockdevDriver::Qcow2(Box::new(bare(file))),
        other => return Err(Error::new(Errno::ENOENT, format!("Unknown driver '{other}'"))),
    };
    implicit(BlockdevOptions { base: base(), driver }, named.common)
}

/// A qcow2 node with default options.
fn bare(file: BlockdevRef) -> BlockdevOptionsQcow2 {
    BlockdevOptionsQcow2 {
        file,
        backing: None,
        lazy_refcounts: None,
        pass_discard_request: None,
        pass_discard_snapshot: None,
        pass_discard_other: None,
        cache_size: None,
        l2_cache_size: None,
        l2_cache_entry_size: None,
        refcount_cache_size: None,
        cache_clean_interval: None,
        data_file: None,
    }
}

/// The format that a file looks like.
fn probe_file(path: &str) -> Result<&'static str, Error> {
    let io = |e: std::io::Error| Error::io(Errno::of(&e), format!("Could not open '{path}'"));
    let file = std::fs::File::open(path).map_err(io)?;
    let mut head = Vec::with_capacity(probe::HEAD);
    file.take(probe::HEAD as u64).read_to_end(&mut head).map_err(io)?;
    Ok(probe(&head))
}
