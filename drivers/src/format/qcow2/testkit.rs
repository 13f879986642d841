//! Test helpers: scratch folders that clean up after themselves, and runs of the peer's tools.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder that is removed with everything in it when dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ringblock-qcow2-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs qemu-img in `dir`: exit code, stdout, stderr.
pub(super) fn qemu_img(dir: &Scratch, args: &[&str]) -> (i32, String, String) {
    run(&dir.0, "qemu-img", args)
}

/// Runs qemu-io in `dir`.
pub(super) fn qemu_io(dir: &Scratch, args: &[&str]) -> (i32, String, String) {
    run(&dir.0, "qemu-io", args)
}

fn run(dir: &Path, program: &str, args: &[&str]) -> (i32, String, String) {
    let out = Command::new(program).args(args).current_dir(dir).output().expect("qemu-utils is installed");
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}
