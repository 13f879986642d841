//! A daemon under test: started on unix sockets in a test's directory, ended with its handle.
//!
//! Invariants: a started daemon answers on both sockets before [`Start::start`] returns; a dropped handle
//! leaves no process.

use crate::dir::TestDir;
use crate::qmp::Qmp;
use crate::tools::{self, Cmd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a daemon may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(30);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// What to start: options are given to the daemon in the order in which they were added here.
#[derive(Debug)]
pub struct Start {
    cmd: Cmd,
    base: PathBuf,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    base: PathBuf,
}

impl Daemon {
    /// The daemon under test, with a control socket and an NBD server in `dir`.
    pub fn on(dir: &TestDir) -> Start {
        Start::with(dir, tools::serve())
    }

    /// The peer's daemon, likewise.
    pub fn peer(dir: &TestDir) -> Start {
        Start::with(dir, tools::qsd())
    }

    /// The daemon under test with one writable export `d` of the image `file` of format `driver`.
    pub fn serving(dir: &TestDir, driver: &str, file: &str) -> Start {
        Self::on(dir).image(driver, file).export("d", "q", true)
    }

    /// The NBD URI of the export `name`.
    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.nbd_socket())
    }

    /// The path of the NBD server's socket.
    pub fn nbd_socket(&self) -> String {
        socket(&self.base, "nbd")
    }

    /// The path of the control socket.
    pub fn qmp_socket(&self) -> String {
        socket(&self.base, "qmp")
    }

    /// A new control connection, greeting and negotiation done.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.qmp_socket())
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// True while the process runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.base.with_extension("log")).unwrap_or_default()
    }

    /// Ends it with the `quit` command; it must end with code 0.
    pub fn quit(mut self) {
        self.qmp().quit();
        self.expect_end("quit");
    }

    /// Ends it with SIGTERM; it must end with code 0.
    pub fn terminate(mut self) {
        Cmd::new("kill -TERM").arg(self.pid().to_string()).ok();
        self.expect_end("SIGTERM");
    }

    /// Ends it with SIGKILL.
    pub fn kill9(mut self) {
        self.child.kill().expect("a running daemon can be killed");
        self.child.wait().expect("a killed daemon can be waited for");
    }

    fn expect_end(&mut self, how: &str) {
        match tools::wait(&mut self.child, PATIENCE) {
            Some(status) if status.success() => {}
            Some(status) => panic!("the daemon ended with {status} after {how}:\n{}", self.log()),
            None => panic!("the daemon did not end within {PATIENCE:?} after {how}:\n{}", self.log()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("daemon's output:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Start {
    fn with(dir: &TestDir, cmd: Cmd) -> Self {
        let base = dir.path().join(format!("d{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let cmd = cmd
            .arg("--chardev")
            .arg(format!("socket,id=mon,path={},server=on,wait=off", socket(&base, "qmp")))
            .args(["--monitor", "chardev=mon"])
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={},max-connections=64", socket(&base, "nbd")));
        Self { cmd, base }
    }

    /// Adds one option and its value.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.cmd = self.cmd.arg(name).arg(value);
        self
    }

    /// Adds a node.
    pub fn blockdev(self, options: &str) -> Self {
        self.option("--blockdev", options)
    }

    /// Adds the node `q`: the image `file` of format `driver`, opened with `discard=unmap`.
    pub fn image(self, driver: &str, file: &str) -> Self {
        let file = file.replace(',', ",,");
        let options = format!(
            "driver={driver},node-name=q,discard=unmap,file.driver=file,file.discard=unmap,file.filename={file}"
        );
        self.blockdev(&options)
    }

    /// Exports `node` over NBD under `name`, with the export id `e-NAME`.
    pub fn export(self, name: &str, node: &str, writable: bool) -> Self {
        let writable = if writable { "on" } else { "off" };
        let options = format!("type=nbd,id=e-{name},node-name={node},name={name},writable={writable}");
        self.option("--export", &options)
    }

    /// Runs on `n` cores, if the daemon has such an option (the peer has not).
    pub fn cores(self, n: u32) -> Self {
        if tools::is_product("RINGBLOCK_SERVE") { self.option("--cores", &n.to_string()) } else { self }
    }

    /// Starts it and waits until it serves.
    ///
    /// # Panics
    /// If it does not serve within 30 s.
    pub fn start(self) -> Daemon {
        match self.try_start() {
            Ok(daemon) => daemon,
            Err(log) => panic!("the daemon did not start:\n{log}"),
        }
    }

    /// Starts it and does not wait: it may serve later, or end.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn launch(self) -> Daemon {
        let pidfile = self.base.with_extension("pid");
        let log = std::fs::File::create(self.base.with_extension("log")).expect("a log file");
        let cmd = self.cmd.arg("--pidfile").arg(pidfile.to_string_lossy());
        let mut command = cmd.command();
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {cmd:?}: {e}"));
        Daemon { child, base: self.base }
    }

    /// Starts it; an early end gives what it printed and its exit code.
    pub fn try_start(self) -> Result<Daemon, String> {
        let pidfile = self.base.with_extension("pid");
        let mut daemon = self.launch();
        let start = Instant::now();
        while !(pidfile.exists() && accepts(&daemon.nbd_socket()) && accepts(&daemon.qmp_socket())) {
            if let Ok(Some(status)) = daemon.child.try_wait() {
                return Err(format!("{}({status})", daemon.log()));
            }
            assert!(start.elapsed() < PATIENCE, "no sockets after {PATIENCE:?}:\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(3));
        }
        Ok(daemon)
    }
}

/// Waits until no process, and no dying ring, holds a lock on the file: the kernel takes rings apart after
/// their process has ended, and their files with them.
///
/// # Panics
/// If a lock stays for 10 s.
pub fn wait_unlocked(path: &str) {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{} ", std::fs::metadata(path).expect("the file is there").ino());
    let start = Instant::now();
    while std::fs::read_to_string("/proc/locks").is_ok_and(|locks| locks.contains(&inode)) {
        assert!(start.elapsed() < Duration::from_secs(10), "{path} is still locked");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// True if something listens; the probing connection is dropped at once, which a server must survive.
fn accepts(path: &str) -> bool {
    UnixStream::connect(path).is_ok()
}

fn socket(base: &Path, kind: &str) -> String {
    base.with_extension(kind).to_string_lossy().into_owned()
}
