//! Events of the control pipe, and how those of the engine become them.
//!
//! The engine tells on the core where something happens and must not wait; a thread takes it from there. What does
//! not fit in the queue between them is dropped: these are errors that repeat, and their rate is limited anyway.

use super::Daemon;
use crate::qmp::dispatch::Registry;
use crate::qmp::events::Events;
use crate::{Errno, Error, Storage};
use ringblock_engine::event::Event;
use ringblock_engine::path::{OpClass, RootId};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

/// Events of the engine that wait to be told.
const QUEUE: usize = 256;
/// How long it is remembered which node a root is on; the rate limit of the event makes more useless.
const REMEMBER: Duration = Duration::from_secs(1);

ringblock_drivers::qapi! {
    /// An export is gone; its id is free again.
    struct BlockExportDeleted {
        /// Its id.
        id: String = "id",
    }

    /// A metadata structure of an image is broken.
    struct BlockImageCorrupted {
        /// Always empty here.
        device: String = "device",
        /// The node.
        node_name: Option<String> = "node-name",
        /// What was found.
        msg: String = "msg",
        /// Where in the file, in bytes.
        offset: Option<i64> = "offset",
        /// Over how many bytes.
        size: Option<i64> = "size",
        /// Whether the node refuses everything from now on.
        fatal: bool = "fatal",
    }

    /// Kinds of requests.
    enum IoOperationType {
        /// A read.
        Read = "read",
        /// A write, a flush, a discard.
        Write = "write",
    }

    /// What was done about an error.
    enum BlockErrorAction {
        /// Nothing.
        Ignore = "ignore",
        /// The client was told.
        Report = "report",
        /// The client waits.
        Stop = "stop",
    }

    /// A request failed.
    struct BlockIoError {
        /// Always empty here.
        qom_path: String = "qom-path",
        /// Always empty here.
        device: String = "device",
        /// The node.
        node_name: Option<String> = "node-name",
        /// What the request was.
        operation: IoOperationType = "operation",
        /// What was done about it.
        action: BlockErrorAction = "action",
        /// Whether space ran out.
        nospace: Option<bool> = "nospace",
        /// The error in words.
        reason: String = "reason",
    }
}

/// Declares the events.
pub(super) fn register(registry: &mut Registry<Daemon>) {
    registry.event::<BlockExportDeleted>("BLOCK_EXPORT_DELETED");
    registry.event::<BlockImageCorrupted>("BLOCK_IMAGE_CORRUPTED");
    registry.event::<BlockIoError>("BLOCK_IO_ERROR");
}

/// Tells the engine's events to the control pipe from now on.
pub(super) fn forward(storage: &Storage, events: &Events) -> Result<(), Error> {
    let (tx, rx) = sync_channel(QUEUE);
    storage.engine().on_event(move |event| {
        let _ = tx.try_send(event);
    });
    let (storage, events) = (storage.clone(), events.clone());
    let thread =
        std::thread::Builder::new().name("rb-events".into()).spawn(move || tell(&rx, &storage, &events));
    thread.map(drop).map_err(|e| Error::io(Errno::of(&e), "Could not start a thread"))
}

/// Ends the thread that [`forward`] started.
pub(super) fn stop_forwarding(storage: &Storage) {
    storage.engine().on_event(|_| {});
}

fn tell(from: &Receiver<Event>, storage: &Storage, events: &Events) {
    let mut names: HashMap<RootId, (Instant, Option<String>)> = HashMap::new();
    while let Ok(event) = from.recv() {
        match event {
            Event::ImageCorrupted { node, message, offset, size, fatal } => {
                let signed = |n: Option<u64>| n.and_then(|n| i64::try_from(n).ok());
                let data = BlockImageCorrupted {
                    device: String::new(),
                    node_name: Some(node),
                    msg: message,
                    offset: signed(offset),
                    size: signed(size),
                    fatal,
                };
                events.emit("BLOCK_IMAGE_CORRUPTED", &data);
            }
            Event::Mismatch { text, .. } => eprintln!("{text}"),
            Event::IoError { root, class, errno } => {
                names.retain(|_, (at, _)| at.elapsed() < REMEMBER);
                let (_, node) = names.entry(root).or_insert_with(|| (Instant::now(), node_of(storage, root)));
                let data = io_error(node.clone(), class, errno);
                events.emit_limited("BLOCK_IO_ERROR", node.as_deref().unwrap_or(""), &data);
            }
        }
    }
}

fn node_of(storage: &Storage, root: RootId) -> Option<String> {
    let roots = storage.info().roots;
    roots.into_iter().find(|r| r.root.id() == root).map(|r| r.node)
}

fn io_error(node_name: Option<String>, class: OpClass, errno: Errno) -> BlockIoError {
    BlockIoError {
        qom_path: String::new(),
        device: String::new(),
        node_name,
        operation: if class == OpClass::Read { IoOperationType::Read } else { IoOperationType::Write },
        action: BlockErrorAction::Report,
        nospace: Some(errno == Errno::ENOSPC),
        reason: errno.text(),
    }
}
