//! Images named by a path alone: which protocol driver, which format.
//!
//! Tools and images name other images by a path and perhaps a format; the control pipe never does, it names every
//! driver. Guessing a format reads the first sector; a node that was guessed to be raw keeps that sector guarded.
//!
//! ```text
//! path ─ block or character device? ─► host_device | file ┐
//! format given ────────────────────────► raw | qcow2 ─────┴─► BlockdevOptions
//!        └ not given ─ probe(first sector) ─┘   (How::probed)
//! ```

use crate::format::probe;
use crate::open::{self, How};
use crate::options::blockdev::{
    BlockdevDriver, BlockdevOptions, BlockdevOptionsBase, BlockdevOptionsFile, BlockdevOptionsQcow2,
    BlockdevOptionsRaw, BlockdevRef,
};
use crate::options::{Map, Value, json};
use ringblock_engine::driver::{LocalFuture, Opened};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{Common, NodeSpec, OpenCx};
use ringblock_engine::host::{Access, Expect, File, OpenOptions};
use ringblock_engine::mem::Buf;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

/// The options of the image called `path`: a path, one with the prefix `file:` or `host_device:`, or `json:{…}`; with `base` for its top node, and whether its format was guessed.
///
/// Runs on a core: without a format the first sector is read. Errors: those of opening the file;
/// "Unknown driver 'x'" for formats that are not known or not supported.
pub async fn options(
    path: &str,
    format: Option<&str>,
    base: BlockdevOptionsBase,
) -> Result<(BlockdevOptions, How), Error> {
    if let Some(text) = path.strip_prefix("json:") {
        return Ok((
            from_json_name(text, format, base).map_err(|e| e.context(format!("Could not open '{path}'")))?,
            How::default(),
        ));
    }
    let path = plain(path)?;
    match format {
        Some(format) => Ok((with_format(path, format, base)?, How::default())),
        None => {
            let format = probe_path(Path::new(path)).await?;
            Ok((with_format(path, format, base)?, How { probed: true, ..How::default() }))
        }
    }
}

/// A path without the prefix of a protocol driver. A colon before any slash makes a prefix (reference, part 5 item 28).
fn plain(name: &str) -> Result<&str, Error> {
    match name.split('/').next().unwrap_or(name).split_once(':') {
        None => Ok(name),
        Some(("file" | "host_device", _)) => Ok(name.split_once(':').map_or(name, |(_, path)| path)),
        Some((other, _)) => {
            Err(Error::invalid(format!("Could not open '{name}': Unknown protocol '{other}'")))
        }
    }
}

/// Options written in JSON in the place of a name; what is given beside them comes first.
fn from_json_name(
    text: &str,
    format: Option<&str>,
    base: BlockdevOptionsBase,
) -> Result<BlockdevOptions, Error> {
    let tree = json::parse(text).map_err(|e| e.context("Could not parse the JSON options"))?;
    let Value::Object(members) = tree else { return Err(Error::invalid("Invalid JSON object given")) };
    let mut tree = nested(members)?;
    if let Some(format) = format {
        let given = tree.as_object_mut().and_then(|o| o.insert("driver".into(), Value::from(format)));
        if given.is_some_and(|g| g != *format) {
            return Err(Error::invalid("Driver specified twice"));
        }
    }
    let mut options: BlockdevOptions = crate::options::from_json(&tree)?;
    let inner = std::mem::replace(&mut options.base, base);
    let outer = &mut options.base;
    macro_rules! fill { ($($member:ident)*) => { $( outer.$member = outer.$member.take().or(inner.$member); )* } }
    fill!(node_name discard cache read_only auto_read_only force_share detect_zeroes);
    Ok(options)
}

/// `{"file.filename": …}` as `{"file": {"filename": …}}`.
fn nested(flat: Map<String, Value>) -> Result<Value, Error> {
    let mut tree = Map::new();
    for (key, value) in flat {
        let twice = || Error::invalid(format!("Option '{key}' is given twice"));
        let mut at = &mut tree;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                if at.contains_key(part) {
                    return Err(twice());
                }
                at.insert(part.to_owned(), value);
                break;
            }
            let inner = at.entry(part).or_insert_with(|| Value::Object(Map::new()));
            at = inner.as_object_mut().ok_or_else(twice)?;
        }
    }
    Ok(Value::Object(tree))
}

/// The options of the image at `path` in a format that is known.
pub fn with_format(path: &str, format: &str, base: BlockdevOptionsBase) -> Result<BlockdevOptions, Error> {
    let file = BlockdevOptions { base: BlockdevOptionsBase::default(), driver: protocol(path) };
    let file = BlockdevRef::Definition(Box::new(file));
    let driver = match format {
        "raw" => BlockdevDriver::Raw(Box::new(BlockdevOptionsRaw { file, offset: None, size: None })),
        "qcow2" => BlockdevDriver::Qcow2(Box::new(qcow2(file))),
        other => return Err(Error::new(Errno::ENOENT, format!("Unknown driver '{other}'"))),
    };
    Ok(BlockdevOptions { base, driver })
}

/// The protocol driver for a path: `host_device` for devices, `file` for everything else.
pub fn protocol(path: &str) -> BlockdevDriver {
    let options = BlockdevOptionsFile { filename: path.to_owned(), locking: None, aio: None };
    // Looked at only to choose the driver; the driver checks what it really opened.
    let device = std::fs::metadata(path)
        .is_ok_and(|m| m.file_type().is_block_device() || m.file_type().is_char_device());
    if device { BlockdevDriver::HostDevice(options) } else { BlockdevDriver::File(options) }
}

/// qcow2 options with only the file given.
pub fn qcow2(file: BlockdevRef) -> BlockdevOptionsQcow2 {
    BlockdevOptionsQcow2 {
        file,
        backing: None,
        pass_discard_request: None,
        cache_size: None,
        l2_cache_size: None,
        l2_cache_entry_size: None,
        refcount_cache_size: None,
        cache_clean_interval: None,
        data_file: None,
    }
}

/// The format that the image at `path` looks like. Takes no locks: reading a sector disturbs nobody.
pub async fn probe_path(path: &Path) -> Result<&'static str, Error> {
    let opts = OpenOptions { expect: Expect::Any, access: Access::ReadOnly, direct: false };
    let file = File::open(path, opts).await?;
    // no more than it says it has: some devices (/dev/kmsg) have nothing, and a read of it waits
    let len = file.size().await.map_or(0, |n| n.min(probe::HEAD as u64));
    if len == 0 {
        return Ok(probe::probe(&[]));
    }
    let (done, head) = file.read(0, Buf::new(len as usize)).await;
    done.map_err(|e| {
        Error::io(e, format!("Could not read image '{}' for determining its format", path.display()))
    })?;
    Ok(probe::probe(&head))
}

/// A node for an image that another image names, with the common options it inherits. Read-only, so guessing its
/// format is allowed where none is named.
pub fn named(path: &str, format: Option<&str>, common: Common) -> Result<NodeSpec, Error> {
    if let Some(format) = format {
        let options = with_format(path, format, BlockdevOptionsBase::default())?;
        return open::spec(options, common, How::default());
    }
    if !common.read_only {
        let text = format!("The format of '{path}' is not named and will not be guessed for writing");
        return Err(Error::new(Errno::EACCES, text));
    }
    let config = with_format(path, "raw", BlockdevOptionsBase::default())?;
    let path = path.to_owned();
    let open = move |cx: OpenCx| -> LocalFuture<'static, Result<Opened, Error>> {
        Box::pin(async move {
            let (options, how) = options(&path, None, BlockdevOptionsBase::default()).await?;
            let open = open::open_fn(&options, &cx.common, how)?;
            open(cx).await
        })
    };
    Ok(NodeSpec { name: None, common, home: None, config: Arc::new(config), open: Box::new(open) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the driver follows what the path is. Method: a device, a file that is not there.
    #[test]
    fn protocols() {
        assert!(matches!(protocol("/dev/null"), BlockdevDriver::HostDevice(_)));
        assert!(matches!(protocol("/nowhere/x"), BlockdevDriver::File(_)));
    }

    /// Goal: prefixes and JSON names mean what they mean elsewhere. Method: texts recorded from the peer.
    #[test]
    fn names() {
        assert_eq!(plain("file:a:b"), Ok("a:b"));
        assert_eq!(plain("./a:b"), Ok("./a:b"));
        assert_eq!(plain("foo:bar").unwrap_err().message, "Could not open 'foo:bar': Unknown protocol 'foo'");
        let json = |text| from_json_name(text, None, BlockdevOptionsBase::default());
        let dotted = json(r#"{"driver":"qcow2","file.driver":"file","file.filename":"q"}"#).unwrap();
        let nested = json(r#"{"driver":"qcow2","file":{"driver":"file","filename":"q"}}"#).unwrap();
        assert_eq!(dotted, nested);
        assert_eq!(json("3").unwrap_err().message, "Invalid JSON object given");
        assert!(json("{").unwrap_err().message.starts_with("Could not parse the JSON options: "));
        assert!(json(r#"{"driver":"raw","file":"a","file.x":1}"#).is_err());
        assert!(json(r#"{"driver":"raw","file.x":1,"file":"a"}"#).is_err());
        let base = BlockdevOptionsBase { read_only: Some(true), ..Default::default() };
        let o =
            from_json_name(r#"{"driver":"null-co","read-only":false,"node-name":"n"}"#, None, base).unwrap();
        assert_eq!((o.base.read_only, o.node_name()), (Some(true), Some("n")));
    }

    /// Goal: formats by name; unknown ones are refused by name.
    #[test]
    fn formats() {
        let base = BlockdevOptionsBase::default;
        assert!(matches!(with_format("x", "qcow2", base()).map(|o| o.driver), Ok(BlockdevDriver::Qcow2(_))));
        assert_eq!(with_format("x", "vmdk", base()).unwrap_err().message, "Unknown driver 'vmdk'");
        let common = Common::default();
        assert!(named("x", None, common).is_err(), "never guessed for writing");
        assert!(named("x", None, Common { read_only: true, ..common }).is_ok());
    }
}
