//! `host_device` on a real block device: a loop device over a file. Needs root (as `cargo xtask test` has it).

use ringblock_drivers::open;
use ringblock_drivers::options::{blockdev::BlockdevOptions, from_json};
use ringblock_engine::driver::{Flags, Preallocation, perm};
use ringblock_engine::error::Errno;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::{Config, Engine};
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: usize = 4 << 20;

/// A loop device with its file; both go at the end.
struct Loop {
    device: String,
    file: PathBuf,
}

impl Loop {
    fn new() -> Loop {
        let file = std::env::temp_dir().join(format!("rbloop-{}", std::process::id()));
        std::fs::write(&file, vec![0xaa; SIZE]).unwrap();
        let out = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().expect("losetup");
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "a loop device needs root: {text}");
        Loop { device: String::from_utf8(out.stdout).unwrap().trim().to_owned(), file }
    }

    fn blocks(file: &Path) -> u64 {
        std::fs::metadata(file).unwrap().blocks() * 512
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Goal: a block device is read, written, zeroed, discarded and measured right, with and without the page cache, and
/// cannot grow. Method: a loop device, whose file shows what became of the space.
#[test]
fn a_block_device() {
    for direct in [false, true] {
        let dev = Loop::new();
        let (device, file) = (dev.device.clone(), dev.file.clone());
        let engine = Engine::start(&Config { cores: 1, pin: false, ..Config::default() }).unwrap();
        let work = move || async move {
            let graph = Graph::current();
            let node = json!({"driver": "raw", "node-name": "r", "discard": "unmap", "cache": {"direct": direct},
                "file": {"driver": "host_device", "filename": device}});
            let options: BlockdevOptions = from_json(&node).unwrap();
            graph.add(open::node(options).unwrap()).await.unwrap();
            let user = "the test".to_owned();
            let perm = perm::CONSISTENT_READ | perm::WRITE;
            let spec = RootSpec { node: "r".into(), perm, shared: perm::ALL, user, throttle: None };
            let root = graph.attach(spec).await.unwrap();
            assert_eq!(root.size(), Ok(SIZE as u64));
            root.write(4097, Buf::from_slice(&[0x55; 5000]), Flags::NONE).await.0.unwrap();
            root.flush().await.unwrap();
            let full = Loop::blocks(&file);
            root.write_zeroes(1 << 20, 1 << 20, Flags::NONE).await.unwrap();
            root.write_zeroes((2 << 20) + 3, 1000, Flags::NONE).await.unwrap();
            root.write_zeroes(3 << 20, 65536, Flags { may_unmap: true, ..Flags::NONE }).await.unwrap();
            root.discard((3 << 20) + 65536, 65536).await.unwrap();
            root.flush().await.unwrap();
            // The file system may need a block or two more for its own tables.
            assert!(Loop::blocks(&file) <= full - 131072 + 16384);
            let (done, all) = root.read(0, Buf::new(SIZE)).await;
            done.unwrap();
            let count =
                |range: std::ops::Range<usize>, byte| all[range].iter().filter(|b| **b == byte).count();
            assert_eq!(count(0..1 << 20, 0x55), 5000);
            assert_eq!(count(1 << 20..2 << 20, 0), 1 << 20);
            assert_eq!(count(2 << 20..3 << 20, 0), 1000);
            assert_eq!(count(3 << 20..SIZE, 0), 131072);
            assert_eq!(count(0..SIZE, 0xaa), SIZE - 5000 - (1 << 20) - 1000 - 131072);
            let e = graph.resize("r", 8 << 20, Preallocation::Off).await.unwrap_err();
            assert_eq!((e.errno, e.message.as_str()), (Errno::EINVAL, "Cannot grow device files"));
            graph.shutdown().await.unwrap();
        };
        engine.run(0, || Box::pin(work()));
    }
}
