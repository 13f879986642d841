//! What the engine tells the program without being asked.
//!
//! Events are rare and leave the core at once: the listener only queues them (for the control pipe).

/// Something a user of the control pipe is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A format found impossible metadata (QMP `BLOCK_IMAGE_CORRUPTED`).
    ImageCorrupted {
        /// Name of the node.
        node: String,
        /// What was found.
        message: String,
        /// Where in the file, in bytes.
        offset: Option<u64>,
        /// Over how many bytes.
        size: Option<u64>,
        /// The node refuses everything from now on.
        fatal: bool,
    },
    /// A request of a root failed (QMP `BLOCK_IO_ERROR`). Refusals (read-only, not supported) are no errors.
    IoError {
        /// Where the request came in.
        root: crate::path::RootId,
        /// What kind it was.
        class: crate::path::OpClass,
        /// Why.
        errno: crate::error::Errno,
    },
    /// Two nodes that must be the same are not. The request that showed it fails by itself.
    Mismatch {
        /// Name of the node that compares.
        node: String,
        /// What differs, in words.
        text: String,
    },
}

/// Who is told.
pub(crate) type Listener = Box<dyn Fn(Event) + Send>;
