//! Ringblock beside QEMU's tools on the same files in one run: `compare DIR [ROUNDS]`.
//!
//! Rounds alternate between the two, and the table shows medians: IOPS, and CPU seconds per million I/Os.
//!
//! ```text
//!   image benches:  qemu-img bench   |  ringblock img bench     raw, allocated qcow2 × read, write, 4 KiB, depth 64, strided
//!   servers:        qemu-storage-daemon | ringblock serve       the same images × fio --ioengine=nbd, 4 KiB random, depth 32
//! ```

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ringblock_engine::host::linux::cpu::children_cpu_time;

const SIZE: u64 = 1 << 30;
/// Requests of one `bench` run.
const COUNT: u64 = 300_000;
/// Distance of requests: each goes to another cluster and another L2 slice, and all of the image is visited.
const STEP: u64 = (4 << 20) + 4096;
const FIO_SECONDS: u32 = 5;

#[derive(Clone, Copy)]
struct Sample {
    iops: f64,
    user: f64,
    system: f64,
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().unwrap_or_else(|| ".".into()));
    let rounds = args.next().and_then(|a| a.parse().ok()).unwrap_or(5);
    let own = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join("ringblock")));
    let own = own.filter(|p| p.exists()).expect("build the program first: cargo build --release");
    prepare(&dir);
    println!(
        "| work | peer IOPS | ringblock IOPS | ratio | peer CPU s/M (user + sys) | ringblock CPU s/M | ratio |"
    );
    println!("|---|---|---|---|---|---|---|");
    for cache in ["writeback", "none"] {
        for format in ["raw", "qcow2"] {
            for write in [false, true] {
                let image = dir.join(format!("compare.{format}"));
                let (mut peer, mut ours) = (Vec::new(), Vec::new());
                for _ in 0..rounds {
                    peer.push(img_bench(Command::new("qemu-img"), format, cache, write, &image));
                    let mut c = Command::new(&own);
                    c.arg("img");
                    ours.push(img_bench(c, format, cache, write, &image));
                }
                row(&format!("bench {format} {} cache={cache}", direction(write)), &peer, &ours);
            }
        }
    }
    for format in ["null", "raw", "qcow2"] {
        for (jobs, write) in [(1, false), (1, true), (4, false)] {
            let image = dir.join(format!("compare.{format}"));
            let (mut peer, mut ours) = (Vec::new(), Vec::new());
            for _ in 0..rounds.min(3) {
                peer.push(nbd(&dir, Command::new("qemu-storage-daemon"), format, &image, jobs, write));
                let mut c = Command::new(&own);
                c.arg("serve");
                ours.push(nbd(&dir, c, format, &image, jobs, write));
            }
            row(&format!("NBD {format} {}, {jobs} connection(s)", direction(write)), &peer, &ours);
        }
    }
    for format in ["raw", "qcow2"] {
        let _ = std::fs::remove_file(dir.join(format!("compare.{format}")));
    }
}

fn direction(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

/// A raw image of incompressible data, and the same as qcow2, both in the page cache.
fn prepare(dir: &Path) {
    let raw = dir.join("compare.raw");
    let mut data = vec![0u8; 1 << 20];
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = std::fs::File::create(&raw).expect("create the raw image");
    for _ in 0..SIZE >> 20 {
        for word in data.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_le_bytes());
        }
        std::io::Write::write_all(&mut out, &data).expect("fill the raw image");
    }
    let qcow2 = dir.join("compare.qcow2");
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status()
        .expect("qemu-img is needed");
    assert!(status.success());
}

fn img_bench(mut tool: Command, format: &str, cache: &str, write: bool, image: &Path) -> Sample {
    tool.args(["bench", "-f", format, "-t", cache, "-i", "io_uring", "-d", "64", "-s", "4096"]);
    tool.args(["-c", &COUNT.to_string(), "-S", &STEP.to_string()]);
    if write {
        tool.arg("-w");
    }
    let before = children_cpu_time();
    let out = tool.arg(image).output().expect("the tool runs");
    let after = children_cpu_time();
    let text = String::from_utf8_lossy(&out.stdout);
    let seconds =
        text.split("Run completed in ").nth(1).and_then(|t| t.split(' ').next()).and_then(|t| t.parse().ok());
    let seconds: f64 = seconds.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&out.stderr)));
    let millions = COUNT as f64 / 1e6;
    Sample {
        iops: COUNT as f64 / seconds,
        user: (after.0 - before.0).as_secs_f64() / millions,
        system: (after.1 - before.1).as_secs_f64() / millions,
    }
}

/// A server that is killed and waited for, whatever happens.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

fn nbd(dir: &Path, mut tool: Command, format: &str, image: &Path, jobs: u32, write: bool) -> Sample {
    let socket = dir.join("compare.sock");
    let _ = std::fs::remove_file(&socket);
    let blockdev = match format {
        "null" => format!("driver=null-co,node-name=n,size={SIZE}"),
        f => format!(
            "driver={f},node-name=n,file.driver=file,file.aio=io_uring,file.filename={}",
            image.display()
        ),
    };
    tool.args(["--blockdev", &blockdev, "--nbd-server"]);
    tool.arg(format!("addr.type=unix,addr.path={},max-connections=16", socket.display()));
    tool.args(["--export", "type=nbd,id=e,node-name=n,name=d,writable=on"]);
    let server = Server(tool.stdout(Stdio::null()).spawn().expect("the server starts"));
    let start = Instant::now();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "the server listens within 10 s");
        std::thread::sleep(Duration::from_millis(20));
    }
    let before = server_cpu(server.0.id());
    let out = Command::new("fio")
        .args([
            "--name=j",
            "--ioengine=nbd",
            "--bs=4k",
            "--iodepth=32",
            "--time_based",
            "--output-format=json",
        ])
        .arg(format!("--uri=nbd+unix:///d?socket={}", socket.display()))
        .arg(format!("--rw=rand{}", direction(write)))
        .args([format!("--numjobs={jobs}"), format!("--runtime={FIO_SECONDS}"), "--group_reporting".into()])
        .arg(format!("--size={}", SIZE / 2))
        .output()
        .expect("fio runs");
    let after = server_cpu(server.0.id());
    let text = String::from_utf8_lossy(&out.stdout);
    let section = format!("\"{}\" : {{", direction(write));
    let field = |name: &str| -> f64 {
        let part = text.split(&section).nth(1).unwrap_or_default();
        let value = part.split(&format!("\"{name}\" : ")).nth(1).and_then(|t| t.split([',', '\n']).next());
        value.and_then(|v| v.trim().parse().ok()).unwrap_or_else(|| panic!("fio said: {text}"))
    };
    let millions = field("total_ios") / 1e6;
    Sample {
        iops: field("iops"),
        user: (after.0 - before.0) / millions,
        system: (after.1 - before.1) / millions,
    }
}

/// User and system seconds of a process (proc(5), 100 ticks a second).
fn server_cpu(pid: u32) -> (f64, f64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0) / 100.0;
    (ticks(11), ticks(12))
}

fn median(samples: &[Sample], f: impl Fn(&Sample) -> f64) -> f64 {
    let mut v: Vec<f64> = samples.iter().map(f).collect();
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn row(what: &str, peer: &[Sample], ours: &[Sample]) {
    let both = |f: &dyn Fn(&Sample) -> f64| (median(peer, f), median(ours, f));
    let (pi, oi) = both(&|s| s.iops);
    let (pu, ou) = both(&|s| s.user);
    let (ps, os) = both(&|s| s.system);
    println!(
        "| {what} | {pi:.0} | {oi:.0} | {:.2} | {pu:.2} + {ps:.2} | {ou:.2} + {os:.2} | {:.2} |",
        oi / pi,
        (ou + os) / (pu + ps)
    );
}
