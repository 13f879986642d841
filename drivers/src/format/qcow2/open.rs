//! Opening an image: header, tables, children, and what has to be put right before the first write.
//!
//! Invariants: nothing is allocated by the claims of a header that was not checked; names found in the image are plain
//! paths, and are opened only through the opener that the options give; a read-only open writes nothing.
//!
//! ```text
//! file ─► header ─► corrupt? dirty? ─► L1, refcount table, snapshots ─► data-file, backing ─► driver + owner
//!                        └ writable: repair first
//! ```

use std::rc::Rc;
use std::sync::Arc;

use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{Driver, LocalFuture, OpenFn, Opened, Owner, Role};
use ringblock_engine::graph::{ChildSpec, OpenCx};
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::path::Child;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::check::{self, CheckReport, Repair};
use super::driver::Qcow2;
use super::entry::EntryFormat;
use super::geometry::Geometry;
use super::header::{Header, autoclear, incompatible, peek_cluster_bits};
use super::io::{EngineRuntime, Store};
use super::map::Shared;
use super::options::{Backing, CLEAN_INTERVAL_DEFAULT, NamedInImage, Qcow2Options};
use super::owner::{Files, Image, Parts, Qcow2Owner, Settings};
use super::rehearsal::Rehearsal;
use super::snapshot_table::{self, Parsed, Snapshot};

/// The open function of a qcow2 node.
pub fn open(options: Qcow2Options) -> OpenFn {
    Box::new(move |cx| -> LocalFuture<'static, Result<Opened, Error>> { Box::pin(open_image(cx, options)) })
}

async fn open_image(cx: OpenCx, options: Qcow2Options) -> Result<Opened, Error> {
    let Qcow2Options {
        file,
        backing,
        data_file,
        cache,
        pass_discard_request,
        opener,
        trust_data_file_name,
        check,
    } = options;
    let file = cx.open_child("file", Role::Image, file).await?;
    let read_only = cx.common.read_only || check;
    let mut header = read_header(&file).await?;
    refuse_encrypted(&header)?;
    if !check {
        refuse_unusable(&header, read_only)?;
        if !read_only && header.has(incompatible::DIRTY) && !mutant!("dirty-repaired") {
            repair_dirty(&file).await.map_err(|e| e.context("Could not repair dirty image"))?;
            header = read_header(&file).await?;
        }
    }
    let g = header.geometry()?;
    let sizes = cache.sizes(&g, header.size)?;
    if !check {
        // what is not there would read as empty tables, and be written over them
        let end = file.size()?;
        table_inside(end, header.l1_offset, u64::from(header.l1_size) * 8, "Could not read L1 table")?;
        table_inside(end, header.reftable_offset, 8, "Could not read refcount table")?;
    }
    let l1 =
        read_table(&file, header.l1_offset, u64::from(header.l1_size) * 8, "Could not read L1 table").await?;
    file.event(DebugEvent::ReftableLoad).await;
    let reftable_bytes = u64::from(header.reftable_clusters) << g.cluster_bits;
    let reftable =
        read_table(&file, header.reftable_offset, reftable_bytes, "Could not read refcount table").await?;
    if !check {
        for s in read_snapshots(&file, &header).await? {
            s.check_l1(&g)?;
        }
    }
    let names = Names { cx: &cx, file: &file, opener: opener.as_ref() };
    let data = names.data_file(&header, data_file, trust_data_file_name, check).await?;
    let below = if check { None } else { names.backing(&header, backing).await? };
    if !read_only {
        prepare_for_writing(&file, &mut header).await?;
    }
    let format = EntryFormat::of(&header, g);
    let data_child = data.as_ref().map_or(file.ix(), Child::ix);
    let shared =
        Arc::new(Shared::new(format, header.size, sizes.frames, data_child, below.as_ref().map(Child::ix)));
    let settings = Settings {
        read_only,
        refcount_cache: sizes.refcount,
        pass_discard: pass_discard_request.unwrap_or(cx.common.discard),
        clean_interval: cache.clean_interval.unwrap_or(CLEAN_INTERVAL_DEFAULT),
        data_child,
    };
    let driver = Qcow2::new(shared.clone(), &header, file, data, &cx);
    let file_size = file.size()?;
    let parts = Parts { shared, header, geometry: g, l1, reftable, file_size, settings };
    let name = cx.name.clone();
    let owner = move || -> Rc<dyn Owner> {
        let store = |c: Child| -> Rc<dyn Store> { Rc::new(c) };
        let files = Files { file: store(file), data: data.map(store), below: below.map(store) };
        Rc::new(Qcow2Owner(Image::new(parts, files, Rc::new(EngineRuntime(name)))))
    };
    Ok(Opened { driver: Arc::new(driver) as Arc<dyn Driver>, owner: Some(Box::new(owner)) })
}

/// What a crash left half done is put right before the first write. An image that stays damaged is not written to, not even
/// by the repair: its counters cannot be trusted.
async fn repair_dirty(file: &dyn Store) -> Result<(), Error> {
    sound(&check::run(&Rehearsal::of(file)?, Repair::All).await?)?;
    sound(&check::run(file, Repair::All).await?)
}

/// Refuses an image that a repair has left damaged.
fn sound(report: &CheckReport) -> Result<(), Error> {
    match report.corruptions - report.incomplete_snapshots + report.check_errors {
        0 => Ok(()),
        n => Err(Error::io(Errno::EIO, format!("{n} errors remain"))),
    }
}

/// Refuses a table that reaches past the end of the file.
fn table_inside(end: u64, at: HostOffset, bytes: u64, what: &str) -> Result<(), Error> {
    match at.0.checked_add(bytes) {
        Some(stop) if stop <= end || bytes == 0 => Ok(()),
        _ => Err(Error::io(Errno::EIO, what)),
    }
}

/// Reads and parses the header.
pub(super) async fn read_header(file: &dyn Store) -> Result<Header, Error> {
    let io = |e: Errno| Error::io(e, "Could not read qcow2 header");
    let (result, start) = file.read(0, Buf::new(512)).await;
    result.map_err(io)?;
    let bits = peek_cluster_bits(&start)?;
    let (result, cluster) = file.read(0, Buf::new(1 << bits)).await;
    result.map_err(io)?;
    Header::parse(&cluster)
}

/// Without the key even a check would look at half of it.
fn refuse_encrypted(header: &Header) -> Result<(), Error> {
    match header.crypt_method {
        0 => Ok(()),
        _ => Err(Error::new(Errno::ENOTSUP, "Encrypted qcow2 images are not supported")),
    }
}

/// What keeps an image from being opened, whatever is in its tables.
fn refuse_unusable(header: &Header, read_only: bool) -> Result<(), Error> {
    if header.has(incompatible::CORRUPT) && !read_only {
        return Err(Error::new(Errno::EACCES, "qcow2: Image is corrupt; cannot be opened read/write"));
    }
    if header.reftable_clusters == 0 {
        return Err(Error::invalid("Image does not contain a reference count table"));
    }
    let first = 1 << header.cluster_bits;
    if header.reftable_offset.0 < first && !read_only && !header.has(incompatible::DIRTY) {
        return Err(Error::invalid("The reference count table lies in the header"));
    }
    Ok(())
}

/// Reads a table of 8-byte entries.
pub(super) async fn read_table(
    file: &dyn Store,
    at: HostOffset,
    bytes: u64,
    what: &str,
) -> Result<Vec<u64>, Error> {
    let mut out = Vec::with_capacity((bytes / 8) as usize);
    let mut done = 0;
    while done < bytes {
        let n = (bytes - done).min(1 << 20);
        let (result, buf) = file.read(at.0 + done, Buf::new(n as usize)).await;
        result.map_err(|e| Error::io(e, what))?;
        out.extend(buf.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_be_bytes)));
        done += n;
    }
    Ok(out)
}

/// Reads the table of internal snapshots.
pub(super) async fn read_snapshots(file: &dyn Store, header: &Header) -> Result<Vec<Snapshot>, Error> {
    let mut len = u64::from(header.snapshot_count) * 128;
    while len > 0 {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let n = (len - bytes.len() as u64).min(1 << 20);
            let (result, buf) =
                file.read(header.snapshots_offset.0 + bytes.len() as u64, Buf::new(n as usize)).await;
            result.map_err(|e| Error::io(e, "Failed to read snapshot table"))?;
            bytes.extend_from_slice(&buf);
        }
        match snapshot_table::parse(&bytes, header.snapshot_count)? {
            Parsed::Done(list, _) => return Ok(list),
            Parsed::Need(n) => len = n.max(len * 2).min(snapshot_table::MAX_TABLE_BYTES + 4096),
        }
    }
    Ok(Vec::new())
}

/// What a writer changes before the first guest write: features it does not know lose their autoclear bits, and bitmaps
/// that it does not keep are marked as in use, so that nobody trusts them afterwards.
async fn prepare_for_writing(file: &dyn Store, header: &mut Header) -> Result<(), Error> {
    let io = |e: Errno| Error::io(e, "Could not update qcow2 header");
    if let Some(b) = header.extensions.bitmaps {
        // an image that is refused for its bitmaps stays as it is
        super::bitmaps::read(file, &b, header).await?;
    }
    if header.autoclear & !autoclear::KNOWN != 0 && !mutant!("autoclear-first") {
        header.autoclear &= autoclear::KNOWN;
        let bytes = header.serialise()?;
        let mut buf = Buf::zeroed(bytes.len().next_multiple_of(512));
        buf[..bytes.len()].copy_from_slice(&bytes);
        file.write(0, buf).await.map_err(io)?;
        file.flush().await.map_err(io)?;
    }
    match header.extensions.bitmaps {
        Some(b) => super::bitmaps::mark_in_use(file, &b, header).await,
        None => Ok(()),
    }
}

/// Whether a name is a path and nothing else: no `json:`, no protocol prefix.
pub fn is_plain_path(name: &str) -> bool {
    let prefix = name.split('/').next().unwrap_or(name);
    !name.is_empty() && !prefix.contains(':')
}

/// Resolves the names of other files.
struct Names<'a> {
    cx: &'a OpenCx,
    file: &'a Child,
    opener: Option<&'a super::options::NameOpener>,
}

impl Names<'_> {
    /// The external data file: as the options say, or as the image does where that is allowed.
    async fn data_file(
        &self,
        header: &Header,
        given: Option<ChildSpec>,
        trusted: bool,
        check: bool,
    ) -> Result<Option<Child>, Error> {
        if !header.external_data() {
            return match given {
                Some(_) => {
                    Err(Error::invalid("'data-file' can only be set for images with an external data file"))
                }
                None => Ok(None),
            };
        }
        let spec = match (given, &header.extensions.data_file) {
            (Some(spec), _) => spec,
            (None, Some(name)) if trusted => self.named(name, Some("raw"), Role::Data)?,
            (None, _) if check => return Ok(None),
            (None, _) => return Err(Error::invalid("'data-file' is required for this image")),
        };
        self.cx.open_child("data-file", Role::Data, spec).await.map(Some)
    }

    async fn backing(&self, header: &Header, backing: Backing) -> Result<Option<Child>, Error> {
        let spec = match (backing, &header.backing_file) {
            (Backing::None, _) | (Backing::FromImage, None) => return Ok(None),
            (Backing::Node(spec), _) => spec,
            (Backing::FromImage, Some(name)) => {
                self.named(name, header.extensions.backing_format.as_deref(), Role::Cow)?
            }
        };
        let child = self.cx.open_child("backing", Role::Cow, spec).await;
        child.map(Some).map_err(|e| e.context("Could not open backing file"))
    }

    fn named(&self, name: &str, format: Option<&str>, role: Role) -> Result<ChildSpec, Error> {
        if !is_plain_path(name) {
            return Err(Error::new(
                Errno::EACCES,
                format!(
                    "The image names the file '{name}': only plain paths are opened from inside an image"
                ),
            ));
        }
        let Some(opener) = self.opener else {
            return Err(Error::invalid(format!(
                "The image names the file '{name}': it has to be given as an option"
            )));
        };
        let overlay = self.file.host_name()?;
        if overlay.is_empty() && !name.starts_with('/') {
            return Err(Error::invalid(format!(
                "Cannot use relative file name '{name}' of an image without a file name"
            )));
        }
        let path = match overlay.rfind('/') {
            Some(slash) if !name.starts_with('/') => format!("{}/{name}", &overlay[..slash]),
            _ => name.to_owned(),
        };
        opener(&NamedInImage { path: &path, format, role, common: self.cx.common.for_child(role) })
    }
}

/// Geometry and header of an image on any store, for tools that do not open a node.
pub(super) async fn read_geometry(file: &dyn Store) -> Result<(Header, Geometry), Error> {
    let header = read_header(file).await?;
    let g = header.geometry()?;
    Ok((header, g))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: names that could open anything else than a file are recognised. Method: the known shapes.
    #[test]
    fn plain_paths() {
        for good in ["a", "a/b:c", "./x:y", "/etc/x", "..", "a b"] {
            assert!(is_plain_path(good), "{good}");
        }
        for bad in ["json:{}", "nbd://h/x", "file:/etc/passwd", "fat:rw:d", "", "x:y"] {
            assert!(!is_plain_path(bad), "{bad}");
        }
    }
}
