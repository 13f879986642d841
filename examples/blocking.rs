//! Blocking I/O from ordinary threads: `cargo run --example blocking -- disk.raw`.
//!
//! Makes a 64 MiB raw image if there is none, writes a pattern from four threads and reads it back.

use ringblock::options::{blockdev::BlockdevOptions, from_json};
use ringblock::{Config, Errno, Error, Storage};
use serde_json::json;

const SIZE: u64 = 64 << 20;
const BLOCK: usize = 64 << 10;

fn main() -> Result<(), Error> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "example-blocking.raw".into());
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    file.and_then(|f| f.set_len(SIZE)).map_err(|e| Error::io(Errno::of(&e), &path))?;

    let storage = Storage::start(&Config { cores: 2, ..Config::default() })?;
    let options: BlockdevOptions = from_json(&json!({
        "driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": path},
    }))?;
    storage.add(options)?;
    let disk = storage.open("disk", true)?;
    std::thread::scope(|scope| {
        let work = |thread: u8| {
            let disk = &disk;
            move || -> Result<(), Error> {
                let data = vec![thread + 1; BLOCK];
                let mut back = vec![0; BLOCK];
                for i in (u64::from(thread)..SIZE / BLOCK as u64).step_by(4) {
                    disk.write_at(&data, i * BLOCK as u64)?;
                    disk.read_at(&mut back, i * BLOCK as u64)?;
                    assert_eq!(back, data);
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..4).map(|t| scope.spawn(work(t))).collect();
        threads.into_iter().try_for_each(|t| t.join().expect("the thread does not panic"))
    })?;
    disk.flush_now()?;
    println!("wrote and verified {} MiB of {path}", disk.size() >> 20);
    disk.close()?;
    storage.close_all()
}
