//! A worker's place to work: runs one program on the files of a case, and looks at what it took, opened and changed.
//!
//! Invariant: between laying the files and looking at them nothing but the program opens or changes them, so every open that
//! is noticed is the program's.
//!
//! ```text
//! lay ─► digest ─► [program ≤ 1 s, ≤ 256 MiB] ─► opens ─► digest again
//!                     └ some once more under strace, which also sees /dev and /proc
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use ringblock_engine::host::linux::extent::{ExtentKind, extent_at};
use ringblock_engine::host::linux::watch::{Ended, Opens, reap};
use ringblock_tests::tools::Cmd;

use super::case::{Case, Ground};

/// What a program may take.
pub(super) const TIME: Duration = Duration::from_secs(1);
/// See [`TIME`].
pub(super) const MEMORY: u64 = 256 << 20;
/// When a program is killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The state of the files of a case: by path, what they are.
pub(super) type Digest = BTreeMap<PathBuf, (u64, u64)>;

/// What a program did.
pub(super) struct Done {
    pub(super) ended: Ended,
    pub(super) wall: Duration,
    /// Of this, time in which some process of the machine waited for a CPU.
    pub(super) stall: Duration,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) opened: BTreeSet<PathBuf>,
}

impl Done {
    /// It did what it was asked.
    pub(super) fn ok(&self) -> bool {
        self.ended.status.success()
    }

    /// How long it took where it did not have to wait for others: a machine that is busy with other things proves nothing.
    pub(super) fn took(&self) -> Duration {
        if self.ended.late { self.wall } else { self.wall.saturating_sub(self.stall).max(self.ended.cpu) }
    }

    /// It would not open the image.
    pub(super) fn refused(&self) -> bool {
        let told = ["Could not open", "can't open", "could not open"];
        !self.ok() && told.iter().any(|t| self.stderr.contains(t) || self.stdout.contains(t))
    }

    /// How it died, where it did not end by itself, or was stopped by its own assertions.
    pub(super) fn death(&self) -> Option<String> {
        match self.ended.status.signal() {
            Some(_) if self.ended.late => None,
            Some(s) => Some(format!("signal {s}: {}", self.stderr.trim())),
            None if self.ended.status.code() == Some(101) || self.stderr.contains("panicked at") => {
                Some(self.stderr.trim().to_owned())
            }
            None => None,
        }
    }
}

/// The place.
pub(super) struct Bench {
    root: PathBuf,
    pub(super) ground: Ground,
    opens: Opens,
}

impl Bench {
    /// Makes it.
    pub(super) fn new(root: &Path) -> Result<Bench, String> {
        let ground = Ground { dir: root.join("case"), outside: root.join("outside") };
        for dir in [&ground.dir, &ground.outside, &root.join("out")] {
            std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        let secret = ground.outside.join("secret.raw");
        std::fs::write(&secret, vec![0x53; 65536]).map_err(|e| e.to_string())?;
        let mut opens = Opens::new().map_err(|e| format!("inotify: {e}"))?;
        for dir in [&ground.dir, &ground.outside] {
            opens.add(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        Ok(Bench { root: root.to_owned(), ground, opens })
    }

    /// A file for what programs make.
    pub(super) fn out(&self, name: &str) -> PathBuf {
        self.root.join("out").join(name)
    }

    /// Puts the files of a case there and nothing else.
    pub(super) fn lay(&mut self, case: &Case) -> Result<Digest, String> {
        let told = |e: std::io::Error| format!("{}: {e}", case.name);
        for entry in std::fs::read_dir(&self.ground.dir).map_err(told)?.flatten() {
            let path = entry.path();
            let folder = entry.file_type().is_ok_and(|t| t.is_dir());
            let gone = if folder { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            gone.map_err(told)?;
        }
        case.lay(&self.ground.dir).map_err(told)?;
        Ok(self.digest())
    }

    /// What the files are now.
    pub(super) fn digest(&self) -> Digest {
        let mut out = Digest::new();
        for dir in [&self.ground.dir, &self.ground.outside] {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let state = state(&path);
                out.insert(path, state);
            }
        }
        out
    }

    /// Starts a program here; its output goes to files.
    pub(super) fn start(&mut self, cmd: &Cmd) -> Result<Started, String> {
        let told = |e: std::io::Error| format!("{cmd:?}: {e}");
        let mut command = cmd.command();
        command.current_dir(&self.ground.dir).stdin(Stdio::null());
        command.stdout(File::create(self.out("stdout")).map_err(told)?);
        command.stderr(File::create(self.out("stderr")).map_err(told)?);
        self.opens.take().map_err(|e| format!("inotify: {e}"))?;
        let (began, stalled) = (Instant::now(), stalled());
        let child = command.spawn().map_err(told)?;
        Ok(Started { child, began, stalled, patience: PATIENCE })
    }

    /// Waits for its end.
    pub(super) fn end(&mut self, started: Started) -> Result<Done, String> {
        let ended = reap(started.child, started.patience).map_err(|e| format!("wait: {e}"))?;
        let (wall, stall) = (started.began.elapsed(), stalled().saturating_sub(started.stalled));
        let opened = self.opens.take().map_err(|e| format!("inotify: {e}"))?;
        let text = |name: &str| {
            std::fs::read(self.out(name))
                .map(|b| String::from_utf8_lossy(&b[..b.len().min(1 << 20)]).into_owned())
        };
        let (stdout, stderr) = (text("stdout").unwrap_or_default(), text("stderr").unwrap_or_default());
        Ok(Done { ended, wall, stall, stdout, stderr, opened })
    }

    /// Runs a program to its end.
    pub(super) fn run(&mut self, cmd: &Cmd) -> Result<Done, String> {
        let started = self.start(cmd)?;
        self.end(started)
    }

    /// Every path that a program opens, by strace.
    pub(super) fn trace(&mut self, cmd: &Cmd) -> Result<BTreeSet<PathBuf>, String> {
        let log = self.out("trace");
        let words = "strace -f -qq --seccomp-bpf -s 4096 -e trace=open,openat,openat2,creat -o";
        let command = cmd.command();
        let line = std::iter::once(command.get_program()).chain(command.get_args());
        let line: Vec<String> = line.map(|w| w.to_string_lossy().into_owned()).collect();
        let mut started = self.start(&Cmd::new(words).arg(log.to_string_lossy()).args(line))?;
        // a traced program is slow, and nobody measures it
        started.patience = 12 * PATIENCE;
        let done = self.end(started)?;
        if done.ended.late || done.stderr.contains("strace: ") {
            return Err(format!("strace: {}", done.stderr));
        }
        let text = std::fs::read(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        Ok(String::from_utf8_lossy(&text).lines().filter_map(opened).collect())
    }
}

/// A program that runs.
pub(super) struct Started {
    child: Child,
    began: Instant,
    stalled: Duration,
    patience: Duration,
}

/// How long some process of the machine has waited for a CPU so far (pressure stall information); none where it is not told.
pub(super) fn stalled() -> Duration {
    let text = std::fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let total =
        text.lines().next().and_then(|l| l.rsplit_once("total=")).and_then(|(_, n)| n.trim().parse().ok());
    Duration::from_micros(total.unwrap_or(0))
}

impl Started {
    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// The path that a line of strace says was opened, for use and with success.
fn opened(line: &str) -> Option<PathBuf> {
    let (call, result) = line.rsplit_once(" = ")?;
    if result.starts_with('-') || call.contains("O_PATH") || !call.contains("open") {
        return None;
    }
    call.split('"').nth(1).map(PathBuf::from)
}

/// A file's kind and size, and the hash of what is in it (of its data only, where it has holes).
fn state(path: &Path) -> (u64, u64) {
    let Ok(meta) = path.symlink_metadata() else { return (0, 0) };
    let mut hash = DefaultHasher::new();
    hash.write_u32(meta.mode());
    let kind = meta.file_type();
    if kind.is_symlink() {
        hash.write(std::fs::read_link(path).unwrap_or_default().as_os_str().as_encoded_bytes());
    } else if kind.is_file() {
        let _ = hash_data(path, meta.len(), &mut hash);
    }
    (if kind.is_fifo() { 1 } else { meta.len() }, hash.finish())
}

fn hash_data(path: &Path, len: u64, hash: &mut DefaultHasher) -> std::io::Result<()> {
    let file = File::open(path)?;
    let mut buf = vec![0; 1 << 16];
    let mut at = 0;
    while at < len {
        let Ok(extent) = extent_at(file.as_fd(), at, len) else { break };
        if extent.kind == ExtentKind::Data {
            hash.write_u64(at);
            let end = at + extent.len;
            while at < end {
                let part = (end - at).min(buf.len() as u64) as usize;
                let n = file.read_at(&mut buf[..part], at)?;
                hash.write(&buf[..n]);
                at += n.max(1) as u64;
            }
        } else {
            at += extent.len;
        }
    }
    Ok(())
}
