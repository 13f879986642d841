//! The qcow2 driver as the engine sees it: a map for all cores, and an owner on one of them.

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock};

use crate::protocol::file::FileDriver;
use ringblock_engine::driver::{Driver, Kind, Limits, LocalFuture};
use ringblock_engine::graph::OpenCx;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Child;
use ringblock_engine::{Errno, Error};

use super::check::{self, CheckReport, Repair};
use super::compressed;
use super::header::{CompressionType, Header};
use super::map::Shared;
use super::open::read_snapshots;
use super::snapshot_table::Snapshot;

/// An open qcow2 image.
pub struct Qcow2 {
    shared: Arc<Shared>,
    compression: CompressionType,
    /// The header as it was when the image was opened.
    header: Mutex<Header>,
    file: Child,
    data: Option<Child>,
    name: String,
    /// Whether much of the file is holes.
    sparse: OnceLock<bool>,
}

impl Qcow2 {
    pub(super) fn new(
        shared: Arc<Shared>,
        header: &Header,
        file: Child,
        data: Option<Child>,
        cx: &OpenCx,
    ) -> Qcow2 {
        Qcow2 {
            shared,
            compression: header.compression,
            header: Mutex::new(header.clone()),
            file,
            data,
            name: cx.name.clone(),
            sparse: OnceLock::new(),
        }
    }

    /// The header as it was when the image was opened: for `info`.
    pub fn header(&self) -> Header {
        self.header.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The internal snapshots.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        read_snapshots(&self.file, &self.header()).await
    }

    /// Checks the image, and repairs it where asked. Nobody else may use it meanwhile; after a repair the node must be
    /// closed and opened again.
    pub async fn check(&self, repair: Repair) -> Result<CheckReport, Error> {
        check::run(&self.file, repair).await
    }

    /// Whether so much of the file is holes that clusters must have been allocated without being written.
    fn looks_preallocated(&self) -> Option<bool> {
        let file = self.file.driver().ok()?;
        let file: &FileDriver = file.as_any().downcast_ref()?;
        let (len, used) = (file.size(), file.allocated_size()?);
        let holes = len.saturating_sub(used);
        Some(holes > len / 10 && holes > 8 * self.shared.geometry().cluster_size())
    }

    /// The external data file.
    pub fn data_file(&self) -> Option<Child> {
        self.data
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.shared.size()
    }

    fn limits(&self) -> Limits {
        let g = self.shared.geometry();
        Limits {
            punch_alignment: g.subcluster_size() as u32,
            cluster_size: g.cluster_size() as u32,
            ..Limits::default()
        }
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Map(&*self.shared)
    }

    fn status_recurses(&self) -> bool {
        self.data.is_none() && *self.sparse.get_or_init(|| self.looks_preallocated().unwrap_or(false))
    }

    fn read_encoded(&self, cookie: u64, guest: u64, buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        let format = self.shared.format();
        Box::pin(compressed::read(&self.file, format, self.compression, cookie, guest, buf))
    }

    fn filename(&self) -> String {
        self.file.filename().unwrap_or_default()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("name", &self.name).finish_non_exhaustive()
    }
}
