//! The daemon's command line: the peer's options with the peer's refusals, and the simple form of its own.

use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{Daemon, TestDir, Twins, normal};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::Duration;

/// Goal: contradictions, unknown options and bad values are refused with the peer's words and exit code.
/// Method: each line is run with both; none of them may start.
#[test]
fn refusals() {
    let mut twins = Twins::new("refuse");
    twins.qemu_img("create -q -f qcow2 disk.qcow2 1M");
    for line in [
        "--nosuch",
        "--blockdev driver=nosuch,node-name=n",
        "--blockdev driver=null-co",
        "--blockdev driver=null-co,node-name=n,nosuch=1",
        "--blockdev driver=qcow2,node-name=n,file.driver=file,file.filename=nosuch.qcow2",
        "--blockdev driver=qcow2,node-name=n,file=nosuch",
        "--blockdev driver=qcow2,node-name=n",
        "--blockdev node-name=n",
        "--blockdev driver=null-co,node-name=n --blockdev driver=null-co,node-name=n",
        "--blockdev '{\"driver\": \"null-co\"'",
        "--blockdev '{\"driver\": \"null-co\", \"node-name\": \"n\", \"size\": \"x\"}'",
        "--blockdev",
        "--export type=nbd,id=e,node-name=nosuch,name=d",
        "--blockdev driver=null-co,node-name=n --export type=nbd,id=e,node-name=n,name=d",
        "--nbd-server addr.type=unix",
        "--nbd-server addr.type=pigeon,addr.path=x",
        "--nbd-server addr.type=unix,addr.path=nosuchdir/x",
        "--monitor chardev=nosuch",
        "--monitor chardev=nosuch,mode=x",
        "--chardev nosuch,id=m",
        "--object nosuch,id=o",
        "--blockdev driver=raw,node-name=n,file.driver=file,file.filename=disk.qcow2,file.aio=nosuch",
        "--blockdev driver=raw,node-name=n,file.driver=file,file.filename=disk.qcow2,read-only=maybe",
    ] {
        let run = |cmd: Cmd| {
            let mut cmd = cmd;
            for (n, part) in line.split('\'').enumerate() {
                cmd = if n % 2 == 1 { cmd.arg(part) } else { cmd.line(part) };
            }
            cmd.timeout(Duration::from_secs(20))
        };
        twins.same(line, run(tools::serve()), run(tools::qsd()));
    }
    twins.finish();
}

/// Goal: JSON and dotted options, several exports of several nodes, a filter and references all work at once.
#[test]
fn a_full_command_line() {
    let dir = TestDir::new("full");
    let image = dir.file("disk,with comma.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "8M"]).ok();
    let json =
        r#"{"driver": "qcow2", "node-name": "q", "discard": "unmap", "l2-cache-size": 65536, "file": "f"}"#;
    let file = format!(
        "driver=file,node-name=f,aio=io_uring,cache.direct=off,filename={}",
        image.replace(',', ",,")
    );
    let daemon = Daemon::on(&dir)
        .blockdev(&file)
        .blockdev(json)
        .blockdev("driver=null-co,node-name=zero,size=1073741824,read-zeroes=on")
        .blockdev("driver=raw,node-name=window,offset=1048576,size=65536,file=zero")
        .export("d", "q", true)
        .export("z", "zero", false)
        .export("w", "window", false)
        .start();
    for (name, size) in [("d", "8388608"), ("z", "1073741824"), ("w", "65536")] {
        assert_eq!(Cmd::new("nbdinfo --size").arg(daemon.uri(name)).ok().stdout.trim(), size, "{name}");
    }
    tools::qemu_io().line("-f raw -c").args(["write -P 3 0 64k", &daemon.uri("d")]).ok();
    daemon.terminate();
    tools::qemu_io().line("-r -f qcow2 -c").args(["read -P 3 0 64k", &image]).ok();
}

/// Goal: `--daemonize` returns when the daemon serves, and the pid file names it. Method: as a script would.
#[test]
fn daemonize() {
    let dir = TestDir::new("daemonize");
    tools::qemu_img().line("create -q -f qcow2").args([&dir.file("disk.qcow2"), "8M"]).ok();
    let (pidfile, socket) = (dir.file("pid"), dir.file("nbd"));
    let start = tools::serve()
        .dir(dir.path())
        .line("--daemonize --blockdev driver=qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2")
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={socket}"))
        .line("--export type=nbd,id=e,node-name=q,name=d,writable=on --pidfile")
        .arg(&pidfile);
    start.timeout(Duration::from_secs(20)).ok();
    let pid = std::fs::read_to_string(&pidfile).expect("the pid file is there at once").trim().to_string();
    let uri = format!("nbd+unix:///d?socket={socket}");
    let size = Cmd::new("nbdinfo --size").arg(&uri).run();
    Cmd::new("kill -TERM").arg(&pid).ok();
    assert_eq!(size.stdout.trim(), "8388608", "{}", size.describe());
    let gone = || !std::path::Path::new(&format!("/proc/{pid}")).exists();
    for _ in 0..500 {
        if gone() && !std::path::Path::new(&pidfile).exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("still there 10 s after SIGTERM: process {}, pid file {}", !gone(), pidfile);
}

/// A `serve` in its simple form, its first lines of output read.
struct Simple {
    child: Child,
    said: String,
}

impl Simple {
    /// Starts it in `dir`, which is also its home; waits until it has printed the NBD URI and three lines.
    fn start(dir: &TestDir, args: &[&str]) -> Self {
        let cmd = tools::serve().args(args).dir(dir.path()).env("HOME", &dir.file(""));
        let mut command = cmd.env("XDG_DATA_HOME", &dir.file("data")).command();
        command.env_remove("XDG_RUNTIME_DIR");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("spawn");
        let mut reader = BufReader::new(child.stdout.take().expect("piped"));
        let mut said = String::new();
        let mut after_uri = None;
        while after_uri.is_none_or(|n| n < 3) {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                break;
            }
            if let Some(n) = &mut after_uri {
                *n += usize::from(!line.trim().is_empty());
            } else if line.contains("nbd+unix://") {
                after_uri = Some(0);
            }
            said += &line;
        }
        // The rest is read too, so that the program never blocks on a full pipe.
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        Self { child, said }
    }

    fn uri(&self) -> String {
        let word = self.said.split_whitespace().find(|w| w.starts_with("nbd+unix://"));
        word.unwrap_or_else(|| panic!("no NBD URI in {:?}", self.said)).trim_matches(['"', '\'']).to_string()
    }

    fn stop(mut self, signal: &str) {
        Cmd::new("kill").arg(signal).arg(self.child.id().to_string()).ok();
        let status = tools::wait(&mut self.child, Duration::from_secs(20)).expect("it ends");
        assert!(status.success(), "{signal}: {status}");
    }
}

impl Drop for Simple {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The socket that an NBD URI names.
fn socket_of(uri: &str) -> String {
    uri.split_once("socket=").expect("a socket").1.to_string()
}

/// Goal: `serve` alone makes a 10 GiB disk in a private folder and serves it; a second run finds it again;
/// another server on it is refused; Ctrl-C flushes and ends cleanly.
#[test]
fn serve_alone() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("alone");
    for round in 0..2 {
        let server = Simple::start(&dir, &[]);
        let uri = server.uri();
        assert_eq!(Cmd::new("nbdinfo --size").arg(&uri).ok().stdout.trim(), (10u64 << 30).to_string());
        let socket = socket_of(&uri);
        let mode = |path: &std::path::Path| path.metadata().expect("it exists").permissions().mode() & 0o777;
        assert_eq!(mode(socket.as_ref()), 0o600, "{socket}");
        let folder = std::path::Path::new(&socket).parent().expect("a folder");
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
        let io = |command: &str| tools::qemu_io().line("-f raw -c").args([command, &uri]).ok();
        if round == 1 {
            io("read -P 21 5G 1M");
        }
        io("write -P 21 5G 1M");
        let second =
            tools::serve().dir(dir.path()).env("HOME", &dir.file("")).env("XDG_DATA_HOME", &dir.file("data"));
        let second = second.timeout(Duration::from_secs(20)).run();
        assert_ne!(second.code, 0, "a second server: {}", second.describe());
        assert!(!second.stderr.is_empty(), "a refusal says why: {}", second.describe());
        io("read -P 21 5G 1M");
        server.stop("-INT");
    }
}

/// Goal: `serve IMAGE` does the same for an image that exists, raw and qcow2, and refuses one that does not.
#[test]
fn serve_an_image() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("image");
    tools::qemu_img().line("create -q -f qcow2").args([&dir.file("disk.qcow2"), "32M"]).ok();
    let server = Simple::start(&dir, &["disk.qcow2"]);
    let uri = server.uri();
    assert_eq!(Cmd::new("nbdinfo --size").arg(&uri).ok().stdout.trim(), (32u64 << 20).to_string());
    tools::qemu_io().line("-f raw -c").args(["write -P 22 0 1M", &uri]).ok();
    server.stop("-TERM");
    ringblock_tests::images::check_clean(&dir.file("disk.qcow2"));
    tools::qemu_io().line("-r -f qcow2 -c").args(["read -P 22 0 1M", &dir.file("disk.qcow2")]).ok();
    let missing = tools::serve().dir(dir.path()).arg("nosuch.qcow2").timeout(Duration::from_secs(20)).run();
    assert_ne!(missing.code, 0, "{}", missing.describe());
    assert!(missing.stderr.contains("nosuch.qcow2"), "{}", missing.describe());
}

/// Goal: called by the peer's name, the program takes the peer's options only, and speaks as the tool named.
/// Method: symbolic links of the peers' names to the program.
#[test]
fn called_by_another_name() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("argv0");
    let link = |name: &str| {
        std::os::unix::fs::symlink(tools::ringblock(), dir.file(name)).expect("a link");
        Cmd::exact(&dir.file(name)).dir(dir.path())
    };
    link("qemu-img").line("create -q -f qcow2 disk.qcow2 4M").ok();
    link("qemu-io").line("-f qcow2 -c length disk.qcow2").ok();
    let refused = link("qemu-storage-daemon").arg("disk.qcow2").timeout(Duration::from_secs(20)).run();
    let peer = tools::qsd().dir(dir.path()).arg("disk.qcow2").run();
    assert_eq!(normal::output(&refused), normal::output(&peer));
    let cores = Cmd::exact(&dir.file("qemu-storage-daemon")).args(["--cores", "2"]).run();
    assert_ne!(cores.code, 0, "--cores is none of the peer's options");
    let nothing = link("ringblock").run();
    assert_ne!(nothing.code, 0, "no command is an error: {}", nothing.describe());
    assert!(nothing.stderr.contains("serve") || nothing.stdout.contains("serve"), "{}", nothing.describe());
}

/// Goal: QMP on standard input and output, as the peer's `--chardev stdio`. Method: a dialogue on the pipes.
#[test]
fn qmp_on_stdio() {
    let dir = TestDir::new("stdio");
    let mut command =
        tools::serve().dir(dir.path()).line("--chardev stdio,id=m --monitor chardev=m").command();
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut stdin = child.stdin.take().expect("piped");
    let dialogue = b"{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"query-block\", \"id\": 9}\n{\"execute\": \"quit\"}\n";
    std::io::Write::write_all(&mut stdin, dialogue).expect("write");
    let status = tools::wait(&mut child, Duration::from_secs(20));
    let mut said = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
    assert!(status.is_some_and(|s| s.success()), "{status:?}: {said}");
    let lines: Vec<serde_json::Value> =
        said.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert!(lines[0]["QMP"].is_object(), "{said}");
    assert!(lines.iter().any(|l| l["id"] == 9 && l["return"] == serde_json::json!([])), "{said}");
}
