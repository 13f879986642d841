//! The qcow2 part of [`crate::open`]: its options, and the files that an image names.
//!
//! Names found in an image become nodes only as plain files (or block devices), with the format the image names; a
//! backing file without a format is probed, which is safe because backing nodes are read-only.

use crate::format::qcow2::{self, Backing, CacheOptions, NameOpener, NamedInImage, Qcow2Options};
use crate::image;
use crate::open::{child, implicit};
use crate::options::blockdev::{
    BlockdevOptions, BlockdevOptionsBase, BlockdevOptionsQcow2, BlockdevRef, BlockdevRefOrNull,
};
use ringblock_engine::driver::{OpenFn, Role};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{ChildSpec, Common};
use std::sync::Arc;

/// What opens a qcow2 node.
pub(crate) fn open_fn(o: &BlockdevOptionsQcow2, common: &Common) -> Result<OpenFn, Error> {
    Ok(qcow2::open(options(o, common)?))
}

/// What opens a qcow2 node to be checked.
pub(crate) fn open_for_check(o: &BlockdevOptionsQcow2, common: &Common) -> Result<OpenFn, Error> {
    Ok(qcow2::open(Qcow2Options { check: true, ..options(o, common)? }))
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

/// The node for a file that an image names. Nothing is opened or read here: a guess, where one is needed, is made when
/// the node is opened.
fn open_named(named: &NamedInImage<'_>) -> Result<ChildSpec, Error> {
    let spec = match (named.role, named.format) {
        (Role::Data, _) => {
            let options =
                BlockdevOptions { base: BlockdevOptionsBase::default(), driver: image::protocol(named.path) };
            return implicit(options, named.common);
        }
        // Old images name the protocol driver where they mean its bytes as they are.
        (_, Some("file" | "host_device")) => image::named(named.path, Some("raw"), named.common)?,
        (_, format) => image::named(named.path, format, named.common)?,
    };
    Ok(ChildSpec::Inline(Box::new(spec)))
}
