//! What the end-to-end tests share: they treat Ringblock as a set of programs, never as a library.
//!
//! Every program under test is a command line that QEMU's own programs understand too. The environment
//! names them, so that a test can be proved right against the peer before it judges Ringblock:
//!
//! ```text
//! RINGBLOCK_IMG=qemu-img RINGBLOCK_IO=qemu-io RINGBLOCK_SERVE=qemu-storage-daemon cargo test -p ringblock-tests
//! ```
//!
//! Without these variables they are `ringblock img`, `ringblock io` and `ringblock serve`, built in release
//! mode on first use.
//!
//! Invariants:
//! - nothing is skipped: a missing tool panics with the line that installs it;
//! - every child process has a time-out and dies with its handle, so a failing test leaves nothing behind;
//! - random choices come from a seed that the failure message shows (`RINGBLOCK_SEED` sets it).
//!
//! ```text
//!   tests/*.rs ──► tools (run a program)   daemon (serve + sockets) ──► nbd, qmp (clients)
//!        │                                                                  │
//!        └──────► images (recipes)   normal (compare texts)          model (what may be read back)
//! ```
#![forbid(unsafe_code)]

pub mod daemon;
pub mod dir;
pub mod images;
pub mod model;
pub mod nbd;
pub mod normal;
pub mod qmp;
pub mod rng;
pub mod tools;

pub use daemon::Daemon;
pub use dir::TestDir;
pub use rng::Rng;
pub use tools::{Cmd, Output};
