//! Making the file that an image is to be written to.

use super::state::prealloc_mode;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Preallocation, perm};
use ringblock_engine::error::Error;
use ringblock_engine::host::File;
use ringblock_engine::host::linux::lock::{ImageLock, LockPerms, Locking};
use ringblock_engine::host::linux::open::FileKind;
use ringblock_engine::host::linux::resize::Prealloc;
use std::path::Path;

/// Creates a regular file of `size` bytes, or checks that a device is large enough.
///
/// An existing file is emptied, after the locks have told that nobody uses it.
pub async fn create(path: &Path, size: u64, prealloc: Preallocation) -> Result<(), Error> {
    let prealloc = prealloc_mode(prealloc)?;
    let file = File::create(path).await?;
    let Some(host) = file.host() else {
        return file.set_size(size, true, prealloc).await;
    };
    let fd = host.try_clone_fd()?;
    let regular = host.kind() == FileKind::Regular;
    let lock = move || {
        let mut lock = ImageLock::new(fd, Locking::Auto)?;
        let used = LockPerms::from_bits(perm::WRITE | perm::RESIZE);
        lock.prepare(used, LockPerms::from_bits(perm::ALL & !perm::RESIZE))?;
        lock.commit();
        Ok::<_, Error>(lock)
    };
    let held = Core::current().blocking(lock).await?;
    let mut done = Ok(());
    if regular {
        done = file.set_size(0, true, Prealloc::Off).await;
    }
    if done.is_ok() {
        done = file.set_size(size, false, prealloc).await;
    }
    drop(held);
    done
}
