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
//!        └──────► images (recipes)   normal (compare texts)   kill9 ──► model (what may be read back)
//! ```
#![forbid(unsafe_code)]

pub mod daemon;
pub mod dir;
pub mod images;
pub mod kill9;
pub mod model;
pub mod nbd;
pub mod normal;
pub mod qmp;
pub mod rng;
pub mod tools;
pub mod twins;

pub use daemon::Daemon;
pub use dir::TestDir;
pub use rng::Rng;
pub use tools::{Cmd, Output};
pub use twins::Twins;

/// The path of a file of this repository, as a string for command lines.
pub fn workspace_file(name: &str) -> String {
    tools::workspace().join(name).to_string_lossy().into_owned()
}

/// A TCP port on the loopback interface that was free a moment ago.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    socket.local_addr().expect("it is bound").port()
}

/// Runs `test` for every case, to the last even if some fail.
///
/// # Panics
/// At the end, with the cases that failed (their own messages were printed as they failed).
pub fn for_all<T: std::fmt::Debug>(cases: &[T], test: impl Fn(&T)) {
    let fails = |case: &&T| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(case))).is_err();
    let failed: Vec<&T> = cases.iter().filter(fails).collect();
    assert!(failed.is_empty(), "{} of {} cases failed: {failed:?}", failed.len(), cases.len());
}
