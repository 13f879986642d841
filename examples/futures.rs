//! Asynchronous I/O from any executor: `cargo run --example futures`.
//!
//! Keeps 32 reads in flight on a null node from one thread. The futures are plain: they can be awaited in any runtime.

use ringblock::engine::mem::Buf;
use ringblock::engine::sync::block_on;
use ringblock::options::{blockdev::BlockdevOptions, from_arg};
use ringblock::{Config, Error, Storage};
use std::collections::VecDeque;
use std::time::Instant;

const DEPTH: u64 = 32;
const READS: u64 = 100_000;

fn main() -> Result<(), Error> {
    let storage = Storage::start(&Config { cores: 1, ..Config::default() })?;
    let options: BlockdevOptions = from_arg("null-co,node-name=disk,size=1G,read-zeroes=on", Some("driver"))?;
    storage.add(options)?;
    let disk = storage.open("disk", false)?;
    let start = Instant::now();
    block_on(async {
        let mut flying = VecDeque::new();
        for i in 0..READS {
            // The request starts here, not when it is awaited.
            flying.push_back(disk.read(i * 4096 % disk.size(), Buf::new(4096)));
            if flying.len() as u64 == DEPTH
                && let Some(oldest) = flying.pop_front()
            {
                assert_eq!(oldest.await?.len(), 4096);
            }
        }
        for read in flying {
            read.await?;
        }
        Ok::<_, Error>(())
    })?;
    let rate = READS as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} reads of 4 KiB a second at depth {DEPTH} from another thread");
    disk.close()?;
    storage.close_all()
}
