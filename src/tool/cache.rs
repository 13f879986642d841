//! Cache modes: the words that stand for how the page cache is used and when data is made durable.
//!
//! ```text
//!                 O_DIRECT   durable after each write   flushes ignored
//! writeback          -                -                       -
//! none, off          x                -                       -
//! writethrough       -                x                       -
//! directsync         x                x                       -
//! unsafe             -                -                       x
//! ```

/// What a cache mode means.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cache {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// Every write is made durable at once.
    pub writethrough: bool,
}

impl Cache {
    /// The page cache, and flushes when they are asked for.
    pub const WRITEBACK: Cache = Cache { direct: false, no_flush: false, writethrough: false };
    /// Flushes are ignored.
    pub const UNSAFE: Cache = Cache { direct: false, no_flush: true, writethrough: false };
    /// Every write is made durable at once.
    pub const WRITETHROUGH: Cache = Cache { direct: false, no_flush: false, writethrough: true };
    /// Past the page cache.
    pub const NONE: Cache = Cache { direct: true, no_flush: false, writethrough: false };

    /// The mode with this name.
    pub fn parse(text: &str) -> Option<Cache> {
        Some(match text {
            "off" | "none" => Cache::NONE,
            "writeback" => Cache::WRITEBACK,
            "unsafe" => Cache::UNSAFE,
            "writethrough" => Cache::WRITETHROUGH,
            "directsync" => Cache { direct: true, no_flush: false, writethrough: true },
            _ => return None,
        })
    }
}
