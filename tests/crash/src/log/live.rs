//! Runs on the machine's own ring: the daemon with qcow2 over `blklogwrites` over a file, guests on several NBD
//! connections that note what they ask for and what they are told, then the end, by `quit` or by SIGKILL.
//!
//! ```text
//!   seed ─► image ─► serve ◄─ connections, each on its thread: stamped sectors, zeroes, discards, FUA, flushes
//!                      └─► log ─► Log        guests' notes ─► (time, Event) …
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_engine::host::sim::{Event, Image, Rng};
use ringblock_tests::nbd::{FLAG_FUA, Nbd};
use ringblock_tests::{Daemon, TestDir};

use super::replay::Log;
use crate::allowed::SECTOR;
use crate::record::Recording;

/// Connections of a run.
const CONNECTIONS: u64 = 4;
/// Requests of each.
const REQUESTS: u64 = 40;

/// A run that is over.
pub(super) struct Live {
    pub(super) log: Log,
    pub(super) recording: Recording,
    /// Requests that guests made.
    pub(super) requests: u64,
}

/// The wall clock as it was at the beginning of the run, moved on by a clock that does not jump: the daemon's log has the
/// same.
#[derive(Clone, Copy)]
struct Clock {
    wall: u64,
    at: Instant,
}

impl Clock {
    fn new() -> Clock {
        let read = || {
            let (before, wall, after) = (Instant::now(), SystemTime::now(), Instant::now());
            (after - before, wall, before)
        };
        // the reading that nothing came between
        let (_, wall, at) = (0..16).map(|_| read()).min_by_key(|r| r.0).expect("some readings");
        let wall = wall.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        Clock { wall, at }
    }

    fn now(&self) -> u64 {
        self.wall + self.at.elapsed().as_nanos() as u64
    }
}

/// What a seed chooses.
fn image(rng: &mut Rng) -> CreateOptions {
    let (cluster_size, size) =
        rng.pick(&[(512, 48 << 10), (1024, 64 << 10), (4096, 128 << 10), (65536, 512 << 10)]);
    let mut options = CreateOptions { size, cluster_size, ..CreateOptions::default() };
    if rng.chance(250) && cluster_size > 512 {
        options.lazy_refcounts = true;
    }
    options
}

/// One run.
///
/// # Errors
/// What went wrong with it, or what the log does not say.
pub(super) fn run(seed: u64) -> Result<Live, String> {
    let mut rng = Rng::new(seed);
    let options = image(&mut rng);
    let new = create::create(&options).map_err(|e| e.message)?;
    let mut base = Image::default();
    base.set_len(new.file_size);
    new.writes().for_each(|(at, data)| base.write(at.0, &data));
    let base = base.to_bytes();
    let dir = TestDir::new("log");
    let (file, log) = (dir.file("disk"), dir.file("log"));
    std::fs::write(&file, &base).and_then(|()| std::fs::write(&log, [])).map_err(|e| e.to_string())?;
    let killed = rng.chance(400);
    let daemon = serve(&dir, &file, &log, rng.pick(&[1, 4096]))?;
    let clock = Clock::new();
    let (notes, requests) = guests(&daemon.nbd_socket(), clock, options.size as usize / SECTOR, &mut rng)?;
    match killed {
        true => daemon.kill9(),
        false => daemon.quit(),
    }
    let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let parsed = Log::parse(&read(&log)?)?;
    if !parsed.is_timed() {
        return Err("entries without times".into());
    }
    if !killed {
        same(&parsed.image(&base), &read(&file)?)?;
    }
    let recording = parsed.recording(base, options.size as usize / SECTOR, &notes);
    Ok(Live { log: parsed, recording, requests })
}

fn serve(dir: &TestDir, file: &str, log: &str, interval: u64) -> Result<Daemon, String> {
    // the log's own durability is not what is judged here
    let node = format!(
        "driver=blklogwrites,node-name=l,discard=unmap,file.driver=file,file.filename={file},file.discard=unmap,\
         log.driver=file,log.filename={log},log.cache.no-flush=on,log-super-update-interval={interval}"
    );
    let daemon = Daemon::on(dir).blockdev(&node);
    let daemon = daemon.blockdev("driver=qcow2,node-name=q,file=l,discard=unmap");
    daemon.export("d", "q", true).cores(2).try_start()
}

/// The log ends where the file is now; the file may be longer where nothing was ever written.
fn same(replayed: &[u8], file: &[u8]) -> Result<(), String> {
    let n = replayed.len().min(file.len());
    let rest = replayed[n..].iter().chain(&file[n..]);
    match replayed.iter().zip(file).position(|(a, b)| a != b) {
        Some(at) => Err(format!("replaying the whole log gives another file, from {at:#x} on")),
        None if rest.into_iter().any(|&b| b != 0) => {
            Err("replaying the log gives a file of another length".into())
        }
        None => Ok(()),
    }
}

type Notes = Vec<(u64, Event)>;

fn guests(socket: &str, clock: Clock, sectors: usize, rng: &mut Rng) -> Result<(Notes, u64), String> {
    let stamps = AtomicU64::new(1);
    let mut seeds: Vec<Rng> = (0..CONNECTIONS).map(|_| rng.fork()).collect();
    let guest = |rng: &mut Rng| -> Result<Notes, String> {
        let nbd = Nbd::connect(socket, "d").map_err(|e| format!("connecting: {e}"))?;
        let mut guest = Guest { nbd, clock, sectors, notes: Vec::new(), stamps: &stamps };
        for _ in 0..REQUESTS {
            guest.request(rng)?;
        }
        guest.flush()?;
        Ok(guest.notes)
    };
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = seeds.iter_mut().map(|rng| scope.spawn(|| guest(rng))).collect();
        threads
            .into_iter()
            .map(|t| t.join().map_err(|_| "a guest panicked".to_owned())?)
            .collect::<Result<Vec<_>, _>>()
    })?;
    Ok((all.concat(), CONNECTIONS * (REQUESTS + 1)))
}

struct Guest<'a> {
    nbd: Nbd,
    clock: Clock,
    sectors: usize,
    notes: Notes,
    stamps: &'a AtomicU64,
}

impl Guest<'_> {
    fn note(&mut self, event: Event) {
        self.notes.push((self.clock.now(), event));
    }

    fn request(&mut self, rng: &mut Rng) -> Result<(), String> {
        let kind = rng.below(100);
        if kind >= 92 {
            return self.flush();
        }
        let first = rng.index(self.sectors);
        let count = (1 + rng.index(rng_most(kind))).min(self.sectors - first);
        let stamp = self.stamps.fetch_add(1, Ordering::Relaxed);
        let (zero, trim) = (kind >= 70, kind >= 82);
        let fua = !trim && rng.chance(80);
        let flags = if fua { FLAG_FUA } else { 0 };
        let (off, len) = ((first * SECTOR) as u64, count * SECTOR);
        self.note(Event::GuestBegan { stamp, first, count, zero });
        let done = if trim {
            self.nbd.trim(off, len as u32)
        } else if zero {
            self.nbd.zero(off, len as u32, flags)
        } else {
            let word = |s: usize| (stamp << 24 | (s as u64 & 0xff_ffff)).to_le_bytes().repeat(SECTOR / 8);
            let data: Vec<u8> = (first..first + count).flat_map(word).collect();
            self.nbd.write(off, &data, flags)
        };
        done.map_err(|e| format!("a request at sector {first}: {e}"))?;
        self.note(Event::GuestEnded { stamp, sure: !trim, durable: fua });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), String> {
        let id = self.stamps.fetch_add(1, Ordering::Relaxed);
        self.note(Event::GuestFlushBegan { id });
        self.nbd.flush().map_err(|e| format!("a flush: {e}"))?;
        self.note(Event::GuestFlushed { id });
        Ok(())
    }
}

/// Writes are small, what gives space back is larger.
fn rng_most(kind: u64) -> usize {
    if kind >= 70 { 32 } else { 12 }
}
