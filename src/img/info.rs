//! `info`: what an image is.
//!
//! A qcow2 image is looked at through its file alone: neither its data file nor its backing file is opened.
//!
//! ```text
//! Source ─► options ─┬ qcow2: file node ─► header, snapshot table, bitmap directory ─┐
//!                    └ others: the node itself ─────────────────────────────────────┴► Info ─► text | JSON
//! ```

use super::human::{self, SnapshotLine};
use super::{Command, Common, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARE, one_image};
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{self, Access, Image, Source};
use crate::tool::{Outcome, Tool, json, on_engine, out};
use ringblock_drivers::format::qcow2::header::{self, Header};
use ringblock_drivers::format::qcow2::open::is_plain_path;
use ringblock_drivers::format::qcow2::snapshot_table::{self, Snapshot};
use ringblock_drivers::open::How;
use ringblock_drivers::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevRef};
use ringblock_drivers::options::{Map, Qapi, Value};
use ringblock_drivers::protocol::file::FileDriver;
use ringblock_engine::driver::{Driver, perm};
use ringblock_engine::mem::Buf;
use ringblock_engine::{Errno, Error};
use serde_json::json;

pub(super) const COMMAND: Command = Command {
    name: "info",
    summary: "Tell what an image is",
    operands: "FILENAME",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        opt('b', "backing-chain", "", "the backing files too"),
        SHARE,
        OBJECT,
        OUTPUT,
    ],
    run,
};

/// Images in one backing chain, at most.
const CHAIN_MAX: usize = 200;

/// What there is to tell about one image.
struct Info {
    filename: String,
    format: String,
    size: u64,
    disk_size: u64,
    cluster_size: Option<u64>,
    dirty: bool,
    /// As stored, its format, and the path from here.
    backing: Option<(String, Option<String>, String)>,
    snapshots: Vec<Snapshot>,
    /// Format specific members.
    specific: Option<Value>,
    file: Option<FileInfo>,
}

/// What there is to tell about the node below.
struct FileInfo {
    filename: String,
    driver: String,
    size: u64,
    disk_size: u64,
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let (mut common, mut chain) = (Common::default(), false);
    for (option, value) in &parsed.options {
        if !common.take(option, value)? {
            chain = true;
        }
    }
    let name = one_image(&parsed)?;
    common.check()?;
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let list = collect(&tool, common.source(&name), chain, common.force_share).await?;
            print(&list, chain, common.output);
            Ok(0)
        })
    })
}

/// What `info` tells of an image and of what it is based on, for people and then as JSON. For tasks of core 0.
///
/// # Errors
/// Why it cannot be told.
pub async fn describe(tool: &Tool, source: Source, chain: bool) -> Result<String, Error> {
    let list = collect(tool, source, chain, false).await?;
    let texts = list.iter().map(|i| human_text(i) + &json::pretty(&json_value(i)));
    Ok(texts.collect())
}

fn print(list: &[Info], chain: bool, output: Output) {
    match output {
        Output::Human => {
            let texts: Vec<String> = list.iter().map(human_text).collect();
            out(&texts.join("\n"));
        }
        Output::Json if chain => out(&json::pretty(&list.iter().map(json_value).collect())),
        Output::Json => list.iter().for_each(|i| out(&json::pretty(&json_value(i)))),
    }
}

async fn collect(tool: &Tool, first: Source, chain: bool, share: bool) -> Result<Vec<Info>, Error> {
    let mut list: Vec<Info> = Vec::new();
    let mut names: Vec<String> = Vec::new();
    let mut next = Some(first);
    while let Some(source) = next.take() {
        if names.contains(&source.name) || names.len() >= CHAIN_MAX {
            let text = format!("Backing file '{}' creates an infinite loop.", source.name);
            return Err(Error::invalid(text));
        }
        let info = one(tool, &source, share).await;
        let info = info.map_err(|e| {
            image::lock_hint(e.context(format_args!("Could not open '{}'", source.name)), &source.name)
        })?;
        names.push(source.name);
        if chain && let Some((name, format, full)) = &info.backing {
            if !is_plain_path(name) {
                return Err(Error::new(
                    Errno::EACCES,
                    format!(
                        "The image names the file '{name}': only plain paths are opened from inside an image"
                    ),
                ));
            }
            next = Some(Source::file(full.clone(), format.as_deref()));
        }
        list.push(info);
    }
    Ok(list)
}

async fn one(tool: &Tool, source: &Source, share: bool) -> Result<Info, Error> {
    let _ = tool;
    let (mut options, _) = source.options().await?;
    let access = Access { force_share: share, no_backing: true, ..Access::default() };
    if let BlockdevDriver::Qcow2(o) = &options.driver
        && let BlockdevRef::Definition(file) = &o.file
    {
        let mut below = (**file).clone();
        access.apply(&mut below);
        let shared = if share { perm::ALL } else { perm::CONSISTENT_READ | perm::WRITE_UNCHANGED };
        let image = image::attach_sharing(&source.name, below, How::default(), access, shared).await?;
        let info = qcow2(&image, &options).await;
        image.close().await?;
        return info;
    }
    let plain = plain_name(&options);
    access.apply(&mut options);
    let image = image::attach(&source.name, options, How::default(), access).await?;
    let info = other(&image, plain);
    image.close().await?;
    info
}

/// A name under which the same node could be opened again: the path if nothing but a path was given.
fn plain_name(options: &BlockdevOptions) -> String {
    let path = match &options.driver {
        BlockdevDriver::File(f) | BlockdevDriver::HostDevice(f) => Some(f.filename.clone()),
        BlockdevDriver::Raw(r) if r.offset.is_none() && r.size.is_none() => below_name(&r.file),
        BlockdevDriver::Qcow2(q) => below_name(&q.file),
        _ => None,
    };
    path.unwrap_or_else(|| {
        // a space after commas and colons, as in the peer's
        let text = json::pretty(&options.write());
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        format!("json:{}", lines.join(" ").replace("{ ", "{").replace(" }", "}"))
    })
}

fn below_name(of: &BlockdevRef) -> Option<String> {
    match of {
        BlockdevRef::Definition(o) => match &o.driver {
            BlockdevDriver::File(f) | BlockdevDriver::HostDevice(f) => Some(f.filename.clone()),
            _ => None,
        },
        BlockdevRef::Reference(_) => None,
    }
}

fn disk_size(driver: &dyn Driver) -> u64 {
    driver.as_any().downcast_ref::<FileDriver>().and_then(FileDriver::allocated_size).unwrap_or(0)
}

fn other(image: &Image, filename: String) -> Result<Info, Error> {
    let top = image.info().ok_or(Errno::ENOMEDIUM)?;
    let file = image.child("file").map(|child| FileInfo {
        filename: child.driver.filename(),
        driver: child.driver.name().to_owned(),
        size: child.driver.size(),
        disk_size: disk_size(&*child.driver),
    });
    Ok(Info {
        filename,
        format: image.format.to_owned(),
        size: image.size,
        disk_size: file.as_ref().map_or_else(|| disk_size(&*top.driver), |f| f.disk_size),
        cluster_size: None,
        dirty: false,
        backing: None,
        snapshots: Vec::new(),
        specific: None,
        file,
    })
}

async fn read(image: &Image, off: u64, len: u64) -> Result<Buf, Error> {
    let broken = || Error::new(Errno::EIO, "The image is shorter than its tables");
    let end = off.checked_add(len).ok_or_else(broken)?;
    if end > image.size {
        return Err(broken());
    }
    let (done, buf) = image.root.read(off, Buf::new(usize::try_from(len).map_err(|_| broken())?)).await;
    done.map_err(|e| Error::io(e, "Could not read the image's tables"))?;
    Ok(buf)
}

async fn qcow2(image: &Image, options: &BlockdevOptions) -> Result<Info, Error> {
    let start = read(image, 0, image.size.min(512)).await?;
    let cluster = 1u64 << header::peek_cluster_bits(&start)?;
    let head = Header::parse(&read(image, 0, cluster.min(image.size)).await?)?;
    let snapshots = read_snapshots(image, &head).await?;
    let bitmaps = read_bitmaps(image, &head).await?;
    let file = image.info().ok_or(Errno::ENOMEDIUM)?;
    let file = FileInfo {
        filename: file.driver.filename(),
        driver: file.driver.name().to_owned(),
        size: file.driver.size(),
        disk_size: disk_size(&*file.driver),
    };
    let filename = plain_name(options);
    let backing = match &head.backing_file {
        None => None,
        Some(name) => {
            let full = super::new::beside(&filename, name).unwrap_or_else(|_| name.clone());
            Some((name.clone(), head.extensions.backing_format.clone(), full))
        }
    };
    Ok(Info {
        filename,
        format: "qcow2".into(),
        size: head.size,
        disk_size: file.disk_size,
        cluster_size: Some(cluster),
        dirty: head.has(header::incompatible::DIRTY),
        backing,
        snapshots,
        specific: Some(specific(&head, bitmaps)),
        file: Some(file),
    })
}

/// `ImageInfoSpecificQCow2`.
pub(super) fn specific(head: &Header, bitmaps: Vec<Value>) -> Value {
    let mut data = Map::new();
    let mut put = |name: &str, value: Value| data.insert(name.to_owned(), value);
    if head.version < 3 {
        put("compat", "0.10".into());
        put("compression-type", head.compression.name().into());
        put("refcount-bits", (1u64 << head.refcount_order).into());
        return Value::Object(data);
    }
    put("compat", "1.1".into());
    put("compression-type", head.compression.name().into());
    put("lazy-refcounts", head.lazy_refcounts().into());
    if !bitmaps.is_empty() {
        put("bitmaps", bitmaps.into());
    }
    put("refcount-bits", (1u64 << head.refcount_order).into());
    if let Some(name) = &head.extensions.data_file {
        put("data-file", name.as_str().into());
    }
    if head.external_data() {
        put("data-file-raw", head.data_file_raw().into());
    }
    put("corrupt", head.has(header::incompatible::CORRUPT).into());
    put("extended-l2", head.extended_l2().into());
    Value::Object(data)
}

async fn read_snapshots(image: &Image, head: &Header) -> Result<Vec<Snapshot>, Error> {
    if head.snapshot_count == 0 {
        return Ok(Vec::new());
    }
    let left = image.size.saturating_sub(head.snapshots_offset.0);
    let mut len = 65536;
    loop {
        let table = read(image, head.snapshots_offset.0, left.min(len)).await?;
        match snapshot_table::parse(&table, head.snapshot_count)? {
            snapshot_table::Parsed::Done(snapshots, _) => return Ok(snapshots),
            snapshot_table::Parsed::Need(n) if n > len && n <= left => len = n.max(2 * len),
            snapshot_table::Parsed::Need(_) => {
                return Err(Error::invalid("The snapshot table is larger than the image file"));
            }
        }
    }
}

/// The bitmap directory (specification, "Bitmap directory"), as `Qcow2BitmapInfo`.
async fn read_bitmaps(image: &Image, head: &Header) -> Result<Vec<Value>, Error> {
    let Some(ext) = head.extensions.bitmaps.filter(|_| head.autoclear & header::autoclear::BITMAPS != 0)
    else {
        return Ok(Vec::new());
    };
    let directory = read(image, ext.directory_offset.0, ext.directory_size).await?;
    let bad = || Error::invalid("The bitmap directory is damaged");
    let (mut list, mut rest) = (Vec::new(), &directory[..]);
    for _ in 0..ext.count {
        let (fixed, after) = rest.split_at_checked(24).ok_or_else(bad)?;
        let flags = u32::from_be_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]);
        let granularity = fixed[17];
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let extra = u32::from_be_bytes([fixed[20], fixed[21], fixed[22], fixed[23]]) as usize;
        let name = extra.checked_add(name_len).and_then(|end| after.get(extra..end)).ok_or_else(bad)?;
        let words = [(1, "in-use"), (2, "auto")];
        let words: Vec<&str> = words.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, w)| *w).collect();
        let granularity = 1u64.checked_shl(u32::from(granularity)).ok_or_else(bad)?;
        list.push(json!({
            "flags": words, "name": String::from_utf8_lossy(name), "granularity": granularity,
        }));
        let entry = (24 + extra + name_len).next_multiple_of(8);
        rest = rest.get(entry..).unwrap_or_default();
    }
    Ok(list)
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn human_text(i: &Info) -> String {
    let size = ringblock_drivers::options::size::human;
    let mut text = format!("image: {}\nfile format: {}\n", i.filename, i.format);
    text += &format!("virtual size: {}\ndisk size: {}\n", human::bytes(i.size), size(i.disk_size));
    if let Some(cluster) = i.cluster_size {
        text += &format!("cluster_size: {cluster}\n");
    }
    if i.dirty {
        text += "cleanly shut down: no\n";
    }
    if let Some((name, format, full)) = &i.backing {
        let actual = if name == full { String::new() } else { format!(" (actual path: {full})") };
        text += &format!("backing file: {name}{actual}\n");
        if let Some(format) = format {
            text += &format!("backing file format: {format}\n");
        }
    }
    if !i.snapshots.is_empty() {
        let line = |s: &Snapshot| SnapshotLine {
            id: text_of(&s.id),
            name: text_of(&s.name),
            state_size: s.vm_state_size(),
            date: u64::from(s.date_sec),
            clock_ns: s.vm_clock_nsec,
            icount: s.icount(),
        };
        let lines: Vec<SnapshotLine> = i.snapshots.iter().map(line).collect();
        text += &format!("Snapshot list:\n{}", human::snapshots(&lines));
    }
    if let Some(specific) = &i.specific {
        text += &format!("Format specific information:\n{}", human::members(specific, 1));
    }
    if let Some(f) = &i.file {
        text +=
            &format!("Child node '/file':\n    filename: {}\n    protocol type: {}\n", f.filename, f.driver);
        text += &format!("    file length: {}\n    disk size: {}\n", human::bytes(f.size), size(f.disk_size));
    }
    text
}

/// `ImageInfo`, with members in the order in which the peer prints them.
fn json_value(i: &Info) -> Value {
    let mut m = Map::new();
    let mut put = |name: &str, value: Value| m.insert(name.to_owned(), value);
    let children: Vec<Value> =
        i.file.iter().map(|f| json!({"name": "file", "info": file_value(f)})).collect();
    put("children", children.into());
    if let Some((_, Some(format), _)) = &i.backing {
        put("backing-filename-format", format.as_str().into());
    }
    if !i.snapshots.is_empty() {
        put("snapshots", i.snapshots.iter().map(snapshot_value).collect());
    }
    put("virtual-size", i.size.into());
    put("filename", i.filename.as_str().into());
    if let Some(cluster) = i.cluster_size {
        put("cluster-size", cluster.into());
    }
    put("format", i.format.as_str().into());
    put("actual-size", i.disk_size.into());
    if let Some(specific) = &i.specific {
        put("format-specific", json!({"type": i.format, "data": specific}));
    } else if matches!(i.format.as_str(), "file" | "host_device") {
        put("format-specific", json!({"type": "file", "data": {}}));
    }
    if let Some((name, _, full)) = &i.backing {
        put("full-backing-filename", full.as_str().into());
        put("backing-filename", name.as_str().into());
    }
    put("dirty-flag", i.dirty.into());
    Value::Object(m)
}

fn file_value(f: &FileInfo) -> Value {
    let mut v = json!({
        "children": [], "virtual-size": f.size, "filename": f.filename, "format": f.driver,
        "actual-size": f.disk_size,
    });
    if let Some(m) = v.as_object_mut() {
        if matches!(f.driver.as_str(), "file" | "host_device") {
            m.insert("format-specific".into(), json!({"type": "file", "data": {}}));
        }
        m.insert("dirty-flag".into(), false.into());
    }
    v
}

fn snapshot_value(s: &Snapshot) -> Value {
    let mut m = Map::new();
    let mut put = |name: &str, value: Value| m.insert(name.to_owned(), value);
    if let Some(n) = s.icount() {
        put("icount", n.into());
    }
    put("vm-clock-nsec", (s.vm_clock_nsec % 1_000_000_000).into());
    put("name", text_of(&s.name).into());
    put("date-sec", s.date_sec.into());
    put("date-nsec", s.date_nsec.into());
    put("vm-clock-sec", (s.vm_clock_nsec / 1_000_000_000).into());
    put("id", text_of(&s.id).into());
    put("vm-state-size", s.vm_state_size().into());
    Value::Object(m)
}
