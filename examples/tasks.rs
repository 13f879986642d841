//! I/O from tasks on the engine's own cores, without a hop: `cargo run --example tasks`.
//!
//! Runs one task on every core; each keeps reading through the same disk and counts.

use ringblock::engine::core::Core;
use ringblock::engine::mem::Buf;
use ringblock::engine::sync::block_on;
use ringblock::options::{blockdev::BlockdevOptions, from_arg};
use ringblock::{Config, Errno, Error, Storage};

const READS: u64 = 200_000;

fn main() -> Result<(), Error> {
    let storage = Storage::start(&Config::default())?;
    let options: BlockdevOptions = from_arg("null-co,node-name=disk,size=1G", Some("driver"))?;
    storage.add(options)?;
    let disk = storage.open("disk", false)?;
    let (root, size) = (disk.root(), disk.size());
    let tasks: Vec<_> = (0..storage.cores())
        .map(|core| {
            storage.engine().spawn_on(core, move || {
                Box::pin(async move {
                    let started = Core::current().now_exact();
                    let mut buf = Buf::new(4096);
                    for i in 0..READS {
                        let result;
                        (result, buf) = root.read(i * 4096 % size, buf).await;
                        result?;
                    }
                    Ok::<u64, Errno>(Core::current().now_exact() - started)
                })
            })
        })
        .collect();
    for (core, task) in tasks.into_iter().enumerate() {
        let ns = block_on(task).ok_or(Errno::ESHUTDOWN)??;
        println!("core {core}: {} ns a read", ns / READS);
    }
    disk.close()?;
    storage.close_all()
}
