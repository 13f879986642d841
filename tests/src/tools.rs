//! Running programs: the ones under test, the peers and the clients, each with a time-out.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a program may run unless the caller says otherwise.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A command line to run to its end.
#[derive(Debug)]
pub struct Cmd {
    words: Vec<String>,
    dir: Option<PathBuf>,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
    timeout: Duration,
}

/// What a finished program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128 + n if signal n ended it.
    pub code: i32,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    /// The command line, for messages.
    pub line: String,
}

impl Cmd {
    /// A command from a line of words separated by blanks (no quoting).
    pub fn new(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a command line has a program");
        Self::exact(program).args(words)
    }

    /// A command whose program is `program`, blanks and all.
    pub fn exact(program: &str) -> Self {
        let words = vec![program.to_string()];
        Self { words, dir: None, env: Vec::new(), stdin: Vec::new(), timeout: TIMEOUT }
    }

    /// Adds one argument as it is.
    pub fn arg(mut self, arg: impl AsRef<str>) -> Self {
        self.words.push(arg.as_ref().to_string());
        self
    }

    /// Adds arguments as they are.
    pub fn args<S: AsRef<str>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(args.into_iter().map(|a| a.as_ref().to_string()));
        self
    }

    /// Adds the words of `line`, split at blanks.
    pub fn line(mut self, line: &str) -> Self {
        self.words.extend(line.split_whitespace().map(String::from));
        self
    }

    /// Runs in `dir`.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_path_buf());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_string(), value.to_string()));
        self
    }

    /// Feeds `bytes` to standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Ends the program, and fails, after `timeout`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The standard-library command for these words, for callers that keep the child.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        // qemu-img and friends write English; scripts print what the C locale prints.
        command.env("LC_ALL", "C.UTF-8").env("PATH", tool_path());
        for (key, value) in &self.env {
            command.env(key, value);
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// Starts the program and waits for its end.
    ///
    /// # Panics
    /// If it cannot be started or outlives its time-out.
    pub fn run(self) -> Output {
        let line = self.words.join(" ");
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| {
            panic!("cannot run `{line}`: {e}; `cargo xtask test` installs what the tests need")
        });
        let mut stdin = child.stdin.take().expect("piped");
        let bytes = self.stdin;
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&bytes)));
        let stdout = collect(child.stdout.take().expect("piped"));
        let stderr = collect(child.stderr.take().expect("piped"));
        let status = wait(&mut child, self.timeout);
        let text = |t: std::thread::JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&t.join().unwrap_or_default()).into_owned()
        };
        let _ = feeder.join();
        let (stdout, stderr) = (text(stdout), text(stderr));
        let Some(status) = status else {
            panic!("`{line}` did not end within {:?}\n{stdout}\n{stderr}", self.timeout)
        };
        Output { code: exit_code(status), stdout, stderr, line }
    }

    /// [`Cmd::run`], and the program must succeed.
    pub fn ok(self) -> Output {
        let out = self.run();
        assert_eq!(out.code, 0, "{}", out.describe());
        out
    }

    /// [`Cmd::run`], and the program must fail with `code`.
    pub fn fails(self, code: i32) -> Output {
        let out = self.run();
        assert_eq!(out.code, code, "expected exit code {code}\n{}", out.describe());
        out
    }
}

impl Output {
    /// Everything, for a failure message.
    pub fn describe(&self) -> String {
        format!(
            "`{}` ended with {}\n--- stdout\n{}--- stderr\n{}",
            self.line, self.code, self.stdout, self.stderr
        )
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// If it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {}", self.describe()))
    }
}

fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    })
}

/// Waits for `child`; kills it and returns `None` when `timeout` has passed.
pub fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if start.elapsed() < timeout => std::thread::sleep(pause),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// `PATH` with Debian's own directories first: nbdsh needs Debian's python, mkfs.ext4 lives in sbin.
pub fn tool_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("/usr/bin:/usr/sbin:/bin:/sbin:{path}")
}

/// The image tool under test (`qemu-img`'s command line).
pub fn img() -> Cmd {
    product("RINGBLOCK_IMG", "img")
}

/// The I/O tool under test (`qemu-io`'s command line).
pub fn io() -> Cmd {
    product("RINGBLOCK_IO", "io")
}

/// The daemon under test (`qemu-storage-daemon`'s command line).
pub fn serve() -> Cmd {
    product("RINGBLOCK_SERVE", "serve")
}

/// The peer's image tool.
pub fn qemu_img() -> Cmd {
    Cmd::new("qemu-img")
}

/// The peer's I/O tool.
pub fn qemu_io() -> Cmd {
    Cmd::new("qemu-io")
}

/// The peer's daemon.
pub fn qsd() -> Cmd {
    Cmd::new("qemu-storage-daemon")
}

/// A python that has `qemu.qmp`: `RINGBLOCK_PYTHON`, else the one `cargo xtask test` makes under `target/`.
///
/// # Panics
/// If there is none.
pub fn qmp_python() -> Cmd {
    if let Ok(python) = std::env::var("RINGBLOCK_PYTHON") {
        return Cmd::exact(&python);
    }
    let python = target_dir().join("qmp-venv/bin/python");
    assert!(python.exists(), "{} is missing: run `cargo xtask test`, which makes it", python.display());
    Cmd::exact(&python.to_string_lossy())
}

/// The folder of that python, for a `PATH`.
pub fn qmp_python_folder() -> String {
    let python = qmp_python().words.swap_remove(0);
    Path::new(&python).parent().unwrap_or(Path::new("")).to_string_lossy().into_owned()
}

/// True if the variable that replaces this program by a stand-in is unset.
pub fn is_product(variable: &str) -> bool {
    std::env::var_os(variable).is_none()
}

fn product(variable: &str, subcommand: &str) -> Cmd {
    match std::env::var(variable) {
        Ok(line) => Cmd::new(&line),
        Err(_) => Cmd::exact(&ringblock().to_string_lossy()).arg(subcommand),
    }
}

/// The `ringblock` program: `RINGBLOCK_BIN`, else a release build made here.
pub fn ringblock() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(bin) = std::env::var_os("RINGBLOCK_BIN") {
            return PathBuf::from(bin);
        }
        build_release();
        target_dir().join("release/ringblock")
    })
}

fn build_release() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsStr::new("cargo").to_os_string());
    let done = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--package", "ringblock", "--bin", "ringblock"])
        .arg("--target-dir")
        .arg(target_dir())
        .current_dir(workspace())
        .output()
        .expect("cargo can be run");
    assert!(done.status.success(), "cargo build failed:\n{}", String::from_utf8_lossy(&done.stderr));
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is inside the workspace")
}

/// Cargo's target directory, found from the running test (`TARGET/debug/deps/NAME`).
pub fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its own path");
    exe.ancestors().nth(3).expect("a test runs from TARGET/PROFILE/deps").to_path_buf()
}
