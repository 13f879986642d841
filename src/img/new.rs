//! New images: the options of `-o`, their checks, and making the files.
//!
//! Invariants: nothing is written before every option is checked; the backing file is opened (read-only) unless the
//! user says not to, so that a chain is never born broken; an interrupted creation leaves a file that is no image.
//!
//! ```text
//! format + "-o" pairs + size, backing ─► Plan (checked, printable) ─► make: files, tables, header last
//! ```

use crate::tool::image::{self, Access, Source};
use crate::tool::{Tool, names};
use ringblock_drivers::format::qcow2::create::{self as layout, CreateOptions};
use ringblock_drivers::open::How;
use ringblock_drivers::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevRefOrNull};
use ringblock_drivers::options::size;
use ringblock_drivers::options::{Mode, from_tree};
use ringblock_drivers::protocol::file;
use ringblock_engine::driver::{Flags, Preallocation};
use ringblock_engine::{Errno, Error};
use std::path::Path;

/// What a value of an option must look like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Bool,
    Size,
    Number,
}

/// A creation option: name, kind, help.
type Known = (&'static str, Kind, &'static str);

const RAW: &[Known] = &[
    ("size", Kind::Size, "Virtual disk size"),
    ("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
];

const QCOW2: &[Known] = &[
    ("cluster_size", Kind::Size, "qcow2 cluster size"),
    ("extended_l2", Kind::Bool, "Extended L2 tables"),
    ("preallocation", Kind::Text, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ("compression_type", Kind::Text, "Compression method used for image cluster compression"),
    ("size", Kind::Size, "Virtual disk size"),
    ("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("backing_file", Kind::Text, "File name of a base image"),
    ("backing_fmt", Kind::Text, "Image format of the base image"),
    ("data_file", Kind::Text, "File name of an external data file"),
    ("data_file_raw", Kind::Bool, "The external data file must stay valid as a raw image"),
    ("lazy_refcounts", Kind::Bool, "Postpone refcount updates"),
    ("refcount_bits", Kind::Number, "Width of a reference count entry in bits"),
];

/// Formats that are read but not created, or not known at all.
fn known(format: &str) -> Result<&'static [Known], Error> {
    match format {
        "raw" => Ok(RAW),
        "qcow2" => Ok(QCOW2),
        other => Err(Error::invalid(format!("Unknown file format '{other}'"))),
    }
}

/// The creation options of a format, for `-o help`.
pub(super) fn help(format: &str) -> Result<String, Error> {
    let mut lines: Vec<String> = Vec::new();
    for (name, kind, text) in known(format)? {
        let value = match kind {
            Kind::Text => "<str>",
            Kind::Bool => "<bool (on/off)>",
            Kind::Size => "<size>",
            Kind::Number => "<num>",
        };
        lines.push(format!("  {:<22} - {text}\n", format!("{name}={value}")));
    }
    lines.sort();
    Ok(format!("Supported {format} options:\n{}", lines.concat()))
}

/// Whether an `-o` argument asks for help.
pub(super) fn wants_help(text: &str) -> bool {
    text.split(',').any(|part| part == "help" || part == "?")
}

/// Options as given: checked names and values, in the order of the format's table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Given(Vec<(&'static str, String)>);

impl Given {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
    }

    fn set(&mut self, name: &'static str, value: String) {
        self.0.retain(|(n, _)| *n != name);
        self.0.push((name, value));
    }

    fn on(&self, name: &str) -> bool {
        self.get(name) == Some("on")
    }

    fn number(&self, name: &str, default: u64) -> u64 {
        self.get(name).and_then(|v| v.parse().ok()).unwrap_or(default)
    }
}

/// What is wanted, as typed.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    /// Name of the image file.
    pub(super) name: String,
    /// Its format.
    pub(super) format: String,
    /// Arguments of `-o`.
    pub(super) options: Vec<String>,
    /// `-b`.
    pub(super) backing: Option<String>,
    /// `-F`.
    pub(super) backing_format: Option<String>,
    /// `-u`: the backing file is not opened.
    pub(super) unsafe_backing: bool,
    /// Size in bytes, if given apart from `-o`.
    pub(super) size: Option<u64>,
    /// Uses `size` only if `-o` gives none, instead of refusing both.
    pub(super) size_is_default: bool,
}

/// A new image with everything checked.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Name of the image file.
    pub(super) name: String,
    /// Its format.
    pub(super) format: String,
    given: Given,
    /// Size in bytes as asked for.
    pub(super) size: u64,
}

fn parse_pairs(table: &'static [Known], text: &str, given: &mut Given) -> Result<(), Error> {
    for pair in split_pairs(text) {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None if table.iter().any(|k| k.0 == pair) => (pair.as_str(), "on".to_owned()),
            None => (pair.strip_prefix("no").unwrap_or(&pair), "off".to_owned()),
        };
        let found = table.iter().find(|k| k.0 == key);
        let (name, kind, _) = found.ok_or_else(|| {
            let key = pair.split_once('=').map_or(pair.as_str(), |(k, _)| k);
            Error::invalid(format!("Invalid parameter '{key}'"))
        })?;
        given.set(name, typed(name, *kind, value)?);
    }
    Ok(())
}

/// Splits at single commas; doubled ones stand for one.
fn split_pairs(text: &str) -> Vec<String> {
    let mut pairs = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            if let Some(last) = pairs.last_mut() {
                last.push(c);
            }
        } else if chars.next_if_eq(&',').is_some() {
            if let Some(last) = pairs.last_mut() {
                last.push(',');
            }
        } else {
            pairs.push(String::new());
        }
    }
    pairs.retain(|p| !p.is_empty());
    pairs
}

/// A value in its plain form.
fn typed(name: &str, kind: Kind, value: String) -> Result<String, Error> {
    match kind {
        Kind::Text => Ok(value),
        Kind::Bool => match value.as_str() {
            "on" | "yes" | "true" | "y" => Ok("on".into()),
            "off" | "no" | "false" | "n" => Ok("off".into()),
            _ => Err(Error::invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
        },
        Kind::Size => match size::parse(&value, 0) {
            Ok(n) => Ok(n.to_string()),
            Err(_) => Err(Error::invalid(format!(
                "Parameter '{name}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            ))),
        },
        Kind::Number => match value.parse::<u64>() {
            Ok(n) => Ok(n.to_string()),
            Err(_) => Err(Error::invalid(format!("Parameter '{name}' expects a number"))),
        },
    }
}

/// Checks what is wanted, and opens the backing file to see that it is there and how large it is.
pub(super) async fn plan(tool: &Tool, wanted: &Wanted) -> Result<Plan, Error> {
    let table = known(&wanted.format)?;
    names::plain_path(&wanted.name)?;
    let mut given = Given::default();
    for text in &wanted.options {
        parse_pairs(table, text, &mut given)?;
    }
    let backs = table.iter().any(|k| k.0 == "backing_file");
    if let Some(name) = &wanted.backing {
        if !backs {
            return Err(no_backing(&wanted.format));
        }
        given.set("backing_file", name.clone());
    }
    if let Some(format) = &wanted.backing_format {
        if !backs {
            let text = format!("Backing file format not supported for file format '{}'", wanted.format);
            return Err(Error::new(Errno::ENOTSUP, text));
        }
        given.set("backing_fmt", format.clone());
    }
    let mut size = given.get("size").and_then(|s| s.parse().ok());
    match (size, wanted.size) {
        (Some(_), Some(_)) if !wanted.size_is_default => {
            return Err(Error::invalid("The image size must be specified only once"));
        }
        (None, Some(n)) => size = Some(n),
        _ => {}
    }
    let below = backing_size(tool, wanted, &given).await?;
    let size = size.or(below).ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?;
    given.set("size", size.to_string());
    Ok(Plan { name: wanted.name.clone(), format: wanted.format.clone(), given, size })
}

/// Said of a backing file whose format is not named.
pub(super) const NO_BACKING_FORMAT: &str = "Backing file specified without backing format";

fn no_backing(format: &str) -> Error {
    Error::new(Errno::ENOTSUP, format!("Backing file not supported for file format '{format}'"))
}

/// The size of the backing file, if there is one and it may be opened.
async fn backing_size(tool: &Tool, wanted: &Wanted, given: &Given) -> Result<Option<u64>, Error> {
    let Some(backing) = given.get("backing_file").filter(|b| !b.is_empty()) else { return Ok(None) };
    if backing == wanted.name {
        return Err(Error::invalid(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    let format = given.get("backing_fmt");
    if let Some(format) = format
        && known(format).is_err()
    {
        return Err(Error::invalid(format!("Unknown driver '{format}'\nCould not open backing image.")));
    }
    let source = Source::file(beside(&wanted.name, backing)?, format);
    if wanted.unsafe_backing {
        return match format {
            Some(_) => Ok(None),
            None => Err(Error::invalid(NO_BACKING_FORMAT)),
        };
    }
    let access = Access { cache: crate::tool::cache::Cache::WRITEBACK, ..Access::default() };
    let image = match source.open(tool, access).await {
        Ok(image) => image,
        Err(e) => return Err(backing_error(&source, e)),
    };
    let (size, detected) = (image.size, image.format);
    image.close().await?;
    if format.is_none() {
        return Err(Error::invalid(format!(
            "Backing file specified without backing format\nDetected format of {detected}."
        )));
    }
    Ok(Some(size))
}

/// The peer does not repeat the name in front.
fn backing_error(source: &Source, mut e: Error) -> Error {
    let prefix = format!("Could not open '{}': ", source.name);
    if let Some(rest) = e.message.strip_prefix(&prefix) {
        e.message = rest.to_owned();
    }
    e.message.push_str("\nCould not open backing image.");
    e
}

/// A backing file's name as seen from the working directory: relative names start at the image's directory.
pub(super) fn beside(image: &str, name: &str) -> Result<String, Error> {
    if name.starts_with("json:") {
        return Ok(name.to_owned());
    }
    let path = names::plain_path(name)?;
    if path.starts_with('/') || path.len() != name.len() {
        return Ok(name.to_owned());
    }
    let image = names::plain_path(image)?;
    let folder = Path::new(image).parent().filter(|p| !p.as_os_str().is_empty());
    Ok(folder.map_or_else(|| name.to_owned(), |f| f.join(name).to_string_lossy().into_owned()))
}

impl Plan {
    /// The line that announces it.
    pub(super) fn announcement(&self) -> String {
        let mut text = format!("Formatting '{}', fmt={}", self.name, self.format);
        for (name, _, _) in known(&self.format).unwrap_or_default() {
            let default = match (self.format.as_str(), *name) {
                ("qcow2", "cluster_size") => Some("65536"),
                ("qcow2", "extended_l2" | "lazy_refcounts") => Some("off"),
                ("qcow2", "compression_type") => Some("zlib"),
                ("qcow2", "refcount_bits") => Some("16"),
                _ => None,
            };
            if let Some(value) = self.given.get(name).or(default) {
                text += &format!(" {name}={value}");
            }
        }
        text + "\n"
    }

    /// The external data file, as it was named.
    pub(super) fn data_file(&self) -> Option<&str> {
        self.given.get("data_file").filter(|v| !v.is_empty())
    }

    /// Makes the files.
    pub(super) async fn make(&self) -> Result<(), Error> {
        let made = match self.format.as_str() {
            "qcow2" => self.make_qcow2().await,
            _ => self.make_raw().await,
        };
        made.map_err(|e| image::lock_hint(e, &self.name))
    }

    async fn make_raw(&self) -> Result<(), Error> {
        let mode = self.given.get("preallocation");
        if mode == Some("metadata") {
            return Err(Error::new(Errno::ENOTSUP, "Unsupported preallocation mode: metadata"));
        }
        let prealloc = preallocation(mode)?;
        let size = whole_sectors(self.size)?;
        file::create(Path::new(names::plain_path(&self.name)?), size, prealloc).await
    }

    fn qcow2_options(&self) -> Result<CreateOptions, Error> {
        let g = &self.given;
        let text = |name: &str| g.get(name).filter(|v| !v.is_empty()).map(str::to_owned);
        let defaults = CreateOptions::default();
        Ok(CreateOptions {
            size: whole_sectors(self.size)?,
            cluster_size: g.number("cluster_size", defaults.cluster_size),
            version: g.get("compat").map_or(Ok(defaults.version), layout::parse_compat)?,
            refcount_bits: g.number("refcount_bits", defaults.refcount_bits),
            extended_l2: g.on("extended_l2"),
            lazy_refcounts: g.on("lazy_refcounts"),
            compression: g
                .get("compression_type")
                .map_or(Ok(defaults.compression), layout::parse_compression)?,
            backing_file: text("backing_file"),
            backing_format: text("backing_fmt"),
            data_file: text("data_file"),
            data_file_raw: g.on("data_file_raw"),
            preallocation: g
                .get("preallocation")
                .map_or(Ok(defaults.preallocation), layout::Preallocation::parse)?,
        })
    }

    async fn make_qcow2(&self) -> Result<(), Error> {
        let options = self.qcow2_options()?;
        let image = layout::create(&options)?;
        let prealloc = match image.preallocation {
            layout::Preallocation::Off | layout::Preallocation::Metadata => Preallocation::Off,
            layout::Preallocation::Falloc => Preallocation::Falloc,
            layout::Preallocation::Full => Preallocation::Full,
        };
        let mut own = prealloc;
        if let (Some(data), Some(size)) = (&options.data_file, image.data_file_size) {
            file::create(Path::new(names::plain_path(data)?), size, prealloc).await?;
            own = Preallocation::Off;
        }
        let path = names::plain_path(&self.name)?;
        file::create(Path::new(path), image.file_size, own).await?;
        write_layout(&self.name, &image).await
    }
}

/// Writes the tables and at last the header into the file, and makes them durable.
async fn write_layout(name: &str, image: &layout::NewImage) -> Result<(), Error> {
    let tree = names::protocol_node(name)?;
    let access = Access { write: true, ..Access::default() };
    let options = from_tree(&tree, Mode::Keyval)?;
    let file = image::attach(name, options, How::default(), access).await?;
    let result = async {
        if file.format == "host_device" {
            file.root.write_zeroes(0, image.file_size, Flags::NONE).await?;
        }
        image.write_to(&file.root).await
    };
    let written = result.await.map_err(|e| Error::io(e, format!("Could not write '{name}'")));
    let closed = file.close().await;
    written.and(closed)
}

/// Puts a temporary qcow2 image over a node to be: writes go there and vanish with the program.
///
/// The file is made in `$TMPDIR` or /var/tmp and has no name any more when this returns.
pub async fn temporary_overlay(mut below: BlockdevOptions, access: Access) -> Result<BlockdevOptions, Error> {
    let read = Access { write: false, unmap: false, ..access };
    let base = std::mem::take(&mut below.base);
    read.apply(&mut below);
    let image = image::attach("", below.clone(), How::default(), read).await?;
    let size = image.size;
    image.close().await?;
    let folder = std::env::var("TMPDIR").unwrap_or_else(|_| "/var/tmp".into());
    let name = format!("{folder}/rb.{}", std::process::id());
    let plan = Plan {
        name: name.clone(),
        format: "qcow2".into(),
        given: Given(vec![("size", size.to_string())]),
        size,
    };
    plan.make().await?;
    // opened once more by number, so that the name can go at once
    let file = std::fs::File::options().read(true).write(true).open(&name);
    let file = file.map_err(|e| Error::io(Errno::of(&e), format!("Could not open '{name}'")))?;
    let _ = std::fs::remove_file(&name);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    // lives as long as the program: the node may be reopened
    std::mem::forget(file);
    let tree = serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path, "locking": "off"}});
    let mut top: BlockdevOptions = from_tree(&tree, Mode::Keyval)?;
    top.base = base;
    if let BlockdevDriver::Qcow2(q) = &mut top.driver {
        q.backing = Some(BlockdevRefOrNull::Definition(Box::new(below)));
    }
    Ok(top)
}

fn whole_sectors(size: u64) -> Result<u64, Error> {
    let whole = size.checked_next_multiple_of(512).filter(|n| *n <= i64::MAX as u64);
    whole.ok_or_else(|| Error::new(Errno::EFBIG, "Could not resize file: File too large"))
}

/// A preallocation mode by name.
pub(super) fn preallocation(text: Option<&str>) -> Result<Preallocation, Error> {
    match text {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => {
            Err(Error::invalid(format!("Parameter 'preallocation' does not accept value '{other}'")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: option strings are split and typed as the peer does it. Method: a table, and its error texts.
    #[test]
    fn pairs() {
        let mut given = Given::default();
        parse_pairs(QCOW2, "cluster_size=64k,lazy_refcounts,noextended_l2,data_file=a,,b", &mut given)
            .unwrap();
        assert_eq!(given.number("cluster_size", 0), 65536);
        assert!(given.on("lazy_refcounts") && !given.on("extended_l2"));
        assert_eq!(given.get("data_file"), Some("a,b"));
        for (text, want) in [
            ("foo=1", "Invalid parameter 'foo'"),
            ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("refcount_bits=x", "Parameter 'refcount_bits' expects a number"),
        ] {
            assert_eq!(parse_pairs(QCOW2, text, &mut given).unwrap_err().message, want);
        }
    }

    /// Goal: relative backing names start at the overlay. Method: a table.
    #[test]
    fn backing_names() {
        for (image, name, want) in [
            ("d/a", "b", "d/b"),
            ("a", "b", "b"),
            ("d/a", "/b", "/b"),
            ("d/a", "json:{}", "json:{}"),
            ("file:d/a", "b", "d/b"),
        ] {
            assert_eq!(beside(image, name), Ok(want.to_owned()), "{image} {name}");
        }
    }
}
