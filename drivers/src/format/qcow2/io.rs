//! What the owner of an image needs from the world: its files, and a few services of the core.
//!
//! Behind the two traits are the engine's child edges and core in use, and plain memory in tests.
//!
//! ```text
//! owner ──► Store: read, write, zero, discard, flush   (file, or external data file)
//!       └─► Runtime: tick, spawn                       (epoch barrier, background tasks)
//! ```

use ringblock_engine::Errno;
use ringblock_engine::core::Core;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation};
use ringblock_engine::event::Event;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Child;

use crate::protocol::file::FileDriver;

use super::compress::pack;
use super::header::CompressionType;

/// A file below the image. Any offset and length; reads past the end give zeroes; writes extend it.
pub(super) trait Store {
    /// Fills the buffer from `off`.
    fn read(&self, off: u64, buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)>;
    /// Writes the buffer at `off`.
    fn write(&self, off: u64, buf: Buf) -> LocalFuture<'_, Result<(), Errno>>;
    /// Makes a range read as zeroes; `unmap` allows giving the space back.
    fn zero(&self, off: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), Errno>>;
    /// Advice that a range is not needed.
    fn discard(&self, off: u64, len: u64) -> LocalFuture<'_, Result<(), Errno>>;
    /// Completed writes become durable.
    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>>;
    /// Tells a listener below that this point of the work is reached; `None` if nobody listens.
    fn event(&self, _event: DebugEvent) -> Option<LocalFuture<'_, ()>> {
        None
    }
    /// Current length in bytes.
    fn size(&self) -> Result<u64, Errno>;
    /// Bytes of storage that it really takes; its length where that is not known.
    fn used(&self) -> Result<u64, Errno> {
        self.size()
    }
    /// Changes the length.
    fn truncate(&self, size: u64) -> LocalFuture<'_, Result<(), Errno>>;
}

impl Store for Child {
    fn read(&self, off: u64, buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(Child::read(self, off, buf))
    }

    fn write(&self, off: u64, buf: Buf) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { Child::write(self, off, buf, Flags::NONE).await.0 })
    }

    fn zero(&self, off: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), Errno>> {
        let flags = Flags { may_unmap: unmap, ..Flags::NONE };
        Box::pin(self.write_zeroes(off, len, flags))
    }

    fn discard(&self, off: u64, len: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(Child::discard(self, off, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(Child::flush(self))
    }

    fn event(&self, event: DebugEvent) -> Option<LocalFuture<'_, ()>> {
        if self.is_heard() { Some(Box::pin(Child::event(self, event))) } else { None }
    }

    fn size(&self) -> Result<u64, Errno> {
        Child::size(self)
    }

    fn used(&self) -> Result<u64, Errno> {
        let driver = self.driver()?;
        let file = driver.as_any().downcast_ref::<FileDriver>();
        file.and_then(FileDriver::allocated_size).map_or_else(|| Child::size(self), Ok)
    }

    fn truncate(&self, size: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { Child::truncate(self, size, Preallocation::Off).await.map_err(|e| e.errno) })
    }
}

/// Raises an event below the image file.
pub(super) async fn raise(file: &dyn Store, event: DebugEvent) {
    if let Some(heard) = file.event(event) {
        heard.await;
    }
}

/// A cluster packed; `None` where that would not make it smaller.
pub(super) type Packed = Result<Option<Vec<u8>>, Errno>;

/// Services of the core the owner lives on.
pub(super) trait Runtime {
    /// Waits until every data transfer that any core started before has completed (the epoch barrier).
    fn tick(&self) -> LocalFuture<'_, ()>;
    /// Runs a task in the background.
    fn spawn(&self, task: LocalFuture<'static, ()>);

    /// Packs a cluster, where that does not hold others up.
    fn pack(&self, kind: CompressionType, cluster: Buf) -> LocalFuture<'_, (Packed, Buf)> {
        Box::pin(async move { (pack(kind, &cluster), cluster) })
    }

    /// Tells the world that the image is corrupt; `fatal` if it can no longer be changed.
    fn corrupt(&self, _message: &str, _fatal: bool) {}
}

/// The engine's core, for the node of this name.
pub(super) struct EngineRuntime(pub(super) String);

impl Runtime for EngineRuntime {
    fn tick(&self) -> LocalFuture<'_, ()> {
        Box::pin(ringblock_engine::epoch::tick())
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        Core::current().spawn(task);
    }

    fn pack(&self, kind: CompressionType, cluster: Buf) -> LocalFuture<'_, (Packed, Buf)> {
        Box::pin(async move { Core::current().blocking(move || (pack(kind, &cluster), cluster)).await })
    }

    fn corrupt(&self, message: &str, fatal: bool) {
        let (node, message) = (self.0.clone(), message.to_owned());
        Core::current().emit(Event::ImageCorrupted { node, message, offset: None, size: None, fatal });
    }
}
