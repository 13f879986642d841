//! `serve` and `serve IMAGE`: one image, everything else chosen for the user.
//!
//! ```text
//! data folder (0700) ─┬ disk.qcow2          made if there is none: sparse, 10 GiB
//!                     ├ nbd.sock (0600)     NBD, export "disk"
//!                     └ qmp.sock (0600)     the control pipe
//! ```
//!
//! With an image of the user's own the sockets are named after it, so several servers can share the folder.

use super::chardev::serve_listener;
use super::exports::listen;
use super::run::Serving;
use crate::cli::Simple;
use crate::{Errno, Error};
use ringblock_drivers::format::qcow2::create::{CreateOptions, create};
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::export::{
    BlockExportOptions, BlockExportOptionsBase, BlockExportOptionsNbd, BlockExportType, NbdServerOptions,
};
use ringblock_drivers::options::size::human;
use ringblock_drivers::options::types::{Empty, SocketAddress, SocketAddressType, UnixSocketAddress};
use ringblock_drivers::options::{Size, from_json};
use serde_json::json;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Size of the image that is made when there is none.
const NEW_SIZE: u64 = 10 << 30;
/// Name of node and export.
const NAME: &str = "disk";

/// Where things are.
struct Places {
    image: PathBuf,
    format: &'static str,
    nbd: PathBuf,
    qmp: PathBuf,
}

/// Opens the image, starts the NBD server and the control pipe, and tells the user.
pub(super) fn bring_up(simple: &Simple, serving: &mut Serving) -> Result<(), Error> {
    let places = places(simple)?;
    serving.image = Some(claim(&places.image, simple.read_only)?);
    serving.daemon.blockdev_add(node(&places, simple.read_only)?).map_err(|e| in_use(&places.image, e))?;
    serving.daemon.nbd_server_start(&NbdServerOptions {
        base: ringblock_drivers::options::export::NbdServerOptionsBase::default(),
        addr: unix(&places.nbd)?,
    })?;
    serving.daemon.block_export_add(BlockExportOptions {
        base: BlockExportOptionsBase {
            id: NAME.into(),
            node_name: NAME.into(),
            writable: Some(!simple.read_only),
            writethrough: None,
            iothread: None,
            fixed_iothread: None,
        },
        kind: BlockExportType::Nbd(BlockExportOptionsNbd::default()),
    })?;
    let listener = listen(&unix(&places.qmp)?)?;
    serve_listener(&serving.server, &listener, false)?;
    serving.monitors.push(listener);
    let size = serving.daemon.storage()?.on_graph(|graph| {
        Box::pin(
            async move { graph.info().nodes.iter().find(|n| n.name == NAME).map_or(0, |n| n.driver.size()) },
        )
    });
    print!("{}", greeting(&places, size, serving.daemon.storage()?.cores(), simple.read_only));
    Ok(())
}

fn unix(path: &Path) -> Result<SocketAddress, Error> {
    let path = path.to_str().ok_or_else(|| Error::invalid(format!("'{}' is not UTF-8", path.display())))?;
    let kind = SocketAddressType::Unix(UnixSocketAddress { path: path.to_owned() });
    Ok(SocketAddress { base: Empty {}, kind })
}

fn places(simple: &Simple) -> Result<Places, Error> {
    let folder = data_folder(simple.data.as_deref())?;
    let Some(image) = &simple.image else {
        if !matches!(simple.format.as_deref(), None | Some("qcow2")) {
            return Err(Error::invalid("--format is for an image of your own; the one made here is qcow2"));
        }
        let image = folder.join("disk.qcow2");
        if !image.exists() {
            make_image(&image, simple.size.unwrap_or(Size(NEW_SIZE)).0)?;
        } else if simple.size.is_some() {
            let text = format!("'{}' exists already; --size is for a new image", image.display());
            return Err(Error::invalid(text));
        }
        let (nbd, qmp) = (folder.join("nbd.sock"), folder.join("qmp.sock"));
        return Ok(Places { image, format: "qcow2", nbd, qmp });
    };
    let image = fs::canonicalize(image)
        .map_err(|e| Error::io(Errno::of(&e), format!("Could not open '{}'", image.display())))?;
    let format = format_of(&image, simple.format.as_deref())?;
    let stem = socket_stem(&image);
    let (nbd, qmp) = (folder.join(format!("{stem}.nbd")), folder.join(format!("{stem}.qmp")));
    Ok(Places { image, format, nbd, qmp })
}

/// The folder given, or the user's own, made with mode 0700 if it is missing.
fn data_folder(given: Option<&Path>) -> Result<PathBuf, Error> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let own = || var("XDG_DATA_HOME").or_else(|| Some(var("HOME")?.join(".local/share")));
    let folder = match given {
        Some(folder) => folder.to_owned(),
        None => match own() {
            Some(base) => base.join("ringblock"),
            None => return Err(Error::invalid("HOME is not set; name a folder with --data")),
        },
    };
    let failed = |e: std::io::Error| {
        Error::io(Errno::of(&e), format!("Could not make the folder '{}'", folder.display()))
    };
    if !folder.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(failed)?;
    }
    if given.is_none() {
        fs::set_permissions(&folder, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    fs::canonicalize(&folder).map_err(failed)
}

/// Nothing is guessed from the content: a guest could have written it.
fn format_of(image: &Path, named: Option<&str>) -> Result<&'static str, Error> {
    let by_name = image.extension().and_then(|e| e.to_str());
    match (named, by_name) {
        (Some("qcow2"), _) | (None, Some("qcow2")) => Ok("qcow2"),
        (Some("raw"), _) | (None, Some("raw")) => Ok("raw"),
        (Some(other), _) => Err(Error::invalid(format!("--format {other}: must be qcow2 or raw"))),
        (None, _) => Err(Error::invalid(format!(
            "Cannot tell the format of '{}' from its name: add --format qcow2 or --format raw",
            image.display()
        ))),
    }
}

/// The image's name and a number for its folder.
fn socket_stem(image: &Path) -> String {
    // FNV-1a: short, and the same in every run.
    let hash = image
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    let name = image.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let name: String =
        name.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(32).collect();
    format!("{name}-{:08x}", hash as u32)
}

/// Makes an empty qcow2 image: complete under its name, or not at all.
fn make_image(path: &Path, size: u64) -> Result<(), Error> {
    let failed =
        |e: std::io::Error| Error::io(Errno::of(&e), format!("Could not create '{}'", path.display()));
    let image = create(&CreateOptions { size, ..CreateOptions::default() })?;
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let write = || {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.set_len(image.file_size)?;
        for (at, bytes) in image.writes() {
            file.write_all_at(&bytes, at.0)?;
        }
        file.sync_all()?;
        // Fails if another server has made one in the meantime; that one is as good.
        match fs::hard_link(&new, path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    };
    let done = write();
    let removed = fs::remove_file(&new);
    done.and(removed).map_err(failed)
}

fn node(places: &Places, read_only: bool) -> Result<BlockdevOptions, Error> {
    let device = fs::metadata(&places.image).is_ok_and(|m| m.file_type().is_block_device());
    let path = places.image.to_str();
    let path = path.ok_or_else(|| Error::invalid(format!("'{}' is not UTF-8", places.image.display())))?;
    from_json(&json!({
        "driver": places.format, "node-name": NAME, "read-only": read_only, "discard": "unmap",
        "file": {"driver": if device { "host_device" } else { "file" }, "filename": path},
    }))
}

/// Makes this the only server of an image. The locks of the node itself are for the format: two programs may share a
/// raw image if they want to, but two of these servers are a mistake.
fn claim(image: &Path, read_only: bool) -> Result<File, Error> {
    let file = File::open(image);
    let file = file.map_err(|e| Error::io(Errno::of(&e), format!("Could not open '{}'", image.display())))?;
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Errno::EBUSY,
            format!("'{}' is being served already; stop that server first", image.display()),
        )),
        // A file system without such locks has to do with the node's own.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// A lock that somebody else holds is the likeliest reason of all, and deserves words of its own.
fn in_use(image: &Path, e: Error) -> Error {
    if e.message.contains(" lock") {
        let text = format!(
            "'{}' is in use by another process; is a server for it running already?",
            image.display()
        );
        return Error::new(e.errno, format!("{text} ({})", e.message));
    }
    e
}

fn uri(socket: &Path) -> String {
    let mut out = format!("nbd+unix:///{NAME}?socket=");
    for b in socket.as_os_str().as_bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(*b))
            }
            _ => {
                let _ = write!(out, "%{b:02X}");
            }
        }
    }
    out
}

fn greeting(places: &Places, size: u64, cores: usize, read_only: bool) -> String {
    let uri = uri(&places.nbd);
    let how = if read_only { ", read-only" } else { "" };
    format!(
        "\
Serving {image} ({format}, {size}{how}) on {cores} core{s}.

  NBD  {uri}
  QMP  {qmp}

Try:
  nbdinfo '{uri}'
  fio --name=try --ioengine=nbd --uri='{uri}' --rw={rw} --bs=4k --iodepth=32 --time_based --runtime=10 --size=1g
  qmp-shell {qmp}

Ctrl-C stops it.
",
        image = places.image.display(),
        format = places.format,
        size = human(size),
        s = if cores == 1 { "" } else { "s" },
        qmp = places.qmp.display(),
        rw = if read_only { "randread" } else { "randrw" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: formats come from names, never from contents.
    #[test]
    fn formats() {
        let of = |p: &str, f: Option<&str>| format_of(Path::new(p), f).map_err(|e| e.message);
        assert_eq!(of("a.qcow2", None), Ok("qcow2"));
        assert_eq!(of("a.img", Some("raw")), Ok("raw"));
        assert!(of("a.img", None).unwrap_err().contains("--format"));
        assert!(of("a.raw", Some("vmdk")).is_err());
    }

    /// Goal: URIs survive odd names, and images of one name in two folders do not share sockets.
    #[test]
    fn names() {
        assert_eq!(uri(Path::new("/a b/ü")), "nbd+unix:///disk?socket=/a%20b/%C3%BC");
        let (a, b) = (socket_stem(Path::new("/x/d.qcow2")), socket_stem(Path::new("/y/d.qcow2")));
        assert!(a != b && a.starts_with("d-"), "{a} {b}");
    }
}
