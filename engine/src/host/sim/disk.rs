//! Simulated disks: named files in memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::error::{Errno, Error};
use crate::host::linux::extent::{Extent, ExtentKind};
use crate::host::linux::probe::HostLimits;

/// One simulated file.
#[derive(Debug)]
pub struct Disk {
    id: i32,
    data: Mutex<Vec<u8>>,
}

impl Disk {
    /// The number that stands for a descriptor.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.data.lock().unwrap_or_else(|e| e.into_inner()).len() as u64
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignments: none needed.
    pub fn limits(&self) -> HostLimits {
        HostLimits { request_align: 1, memory_align: 1, physical_block: 4096, discard_granularity: Some(1) }
    }

    /// All of it is data.
    pub fn extent_at(&self, from: u64, to: u64) -> Extent {
        Extent { kind: ExtentKind::Data, len: to - from }
    }
}

/// The files of one simulated world.
#[derive(Debug, Default)]
pub struct Disks {
    files: Mutex<BTreeMap<PathBuf, Arc<Disk>>>,
}

impl Disks {
    /// Opens an existing file.
    pub fn open(&self, path: &Path) -> Result<Arc<Disk>, Error> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let found = files.get(path).cloned();
        found.ok_or_else(|| Error::io(Errno::ENOENT, format!("Could not open '{}'", path.display())))
    }

    /// Creates or empties a file.
    pub fn create(&self, path: &Path) -> Arc<Disk> {
        let mut files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let id = files.len() as i32;
        let disk = Arc::new(Disk { id, data: Mutex::default() });
        files.insert(path.to_owned(), disk.clone());
        disk
    }
}
