//! Limits as clients get them: `limits [SECONDS]` prints, for many limits, what fio was limited to and what it got.
//!
//! ```text
//!   fio --ioengine=nbd, 1 and 4 connections ─► ringblock serve: throttle node(s) of one group ─► null-co
//! ```
//!
//! A group may be a tenth of a second of its rate ahead, or its burst: that is part of what is expected.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One line of the table.
struct Case {
    what: &'static str,
    limits: String,
    /// Weights of the members.
    members: &'static [u32],
    connections: u32,
    block: u64,
    /// Operations per second that the limits allow.
    rate: f64,
    /// Operations that may come at once.
    burst: f64,
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for connections in [1, 4] {
        for iops in [100u64, 1_000, 10_000, 50_000, 100_000, 200_000] {
            let limits = format!("limits.iops-total={iops}");
            let (rate, burst) = (iops as f64, iops as f64 / 10.0);
            all.push(Case { what: "iops", limits, members: &[100], connections, block: 4096, rate, burst });
        }
        for (mib, block) in [(1u64, 4096u64), (64, 65_536), (512, 1 << 20), (2048, 1 << 20)] {
            let limits = format!("limits.bps-total={}", mib << 20);
            let rate = (mib << 20) as f64 / block as f64;
            let burst = rate / 10.0;
            all.push(Case { what: "bytes", limits, members: &[100], connections, block, rate, burst });
        }
    }
    let limits = "limits.iops-total=1000,limits.iops-total-max=5000".to_owned();
    all.push(Case {
        what: "burst",
        limits,
        members: &[100],
        connections: 1,
        block: 4096,
        rate: 1000.0,
        burst: 5000.0,
    });
    let limits = "limits.iops-total=4000,limits.iops-size=4096".to_owned();
    all.push(Case {
        what: "iops-size",
        limits,
        members: &[100],
        connections: 1,
        block: 65_536,
        rate: 250.0,
        burst: 25.0,
    });
    for (what, members) in [("equal", &[100, 100, 100, 100][..]), ("weights", &[100, 200, 400][..])] {
        let limits = "limits.iops-total=20000".to_owned();
        all.push(Case { what, limits, members, connections: 1, block: 4096, rate: 20_000.0, burst: 2000.0 });
    }
    all
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(10);
    let own = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join("ringblock")));
    let own = own.filter(|p| p.exists()).expect("build the program first: cargo build --release");
    let dir = std::env::temp_dir().join(format!("ringblock-limits-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    println!(
        "| limit | connections | members | expected operations | got | error | worst share of a member |"
    );
    println!("|---|---|---|---|---|---|---|");
    for case in cases() {
        let got = run(&own, &dir, &case, seconds);
        let total: f64 = got.iter().map(|g| g.0).sum();
        let time = got.iter().map(|g| g.1).fold(0.0, f64::max);
        let want = case.rate * time + case.burst;
        let weights: u32 = case.members.iter().sum();
        let shares = got.iter().zip(case.members).map(|(g, w)| {
            let fair = total * f64::from(*w) / f64::from(weights);
            100.0 * (g.0 - fair) / fair
        });
        let worst = shares.fold(0.0, |a: f64, s| if s.abs() > a.abs() { s } else { a });
        println!(
            "| {}: {} | {} | {:?} | {want:.0} | {total:.0} | {:+.2} % | {worst:+.2} % |",
            case.what,
            case.limits,
            case.connections,
            case.members,
            100.0 * (total - want) / want
        );
    }
    let _ = std::fs::remove_dir_all(&dir);
}

/// A server that is killed and waited for, whatever happens.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Operations and seconds of each member's fio.
fn run(own: &Path, dir: &Path, case: &Case, seconds: u32) -> Vec<(f64, f64)> {
    let socket = dir.join("nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let mut serve = Command::new(own);
    serve.arg("serve").arg("--object").arg(format!("throttle-group,id=g,{}", case.limits));
    serve
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=32", socket.display())]);
    for (i, weight) in case.members.iter().enumerate() {
        serve.args(["--blockdev", &format!("null-co,node-name=n{i},size=1G")]);
        serve.args([
            "--blockdev",
            &format!("throttle,node-name=t{i},throttle-group=g,file=n{i},weight={weight}"),
        ]);
        serve.args(["--export", &format!("nbd,id=e{i},node-name=t{i},name=d{i},writable=on")]);
    }
    let _server = Server(serve.stdout(Stdio::null()).spawn().expect("the server starts"));
    let start = Instant::now();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "the server listens within 10 s");
        std::thread::sleep(Duration::from_millis(20));
    }
    let clients: Vec<(Child, PathBuf)> = (0..case.members.len())
        .map(|i| {
            let out = dir.join(format!("fio{i}.json"));
            let child = Command::new("fio")
                .args(["--name=j", "--ioengine=nbd", "--rw=randrw", "--iodepth=32", "--time_based"])
                .args(["--output-format=json", "--group_reporting", "--size=512m"])
                .arg(format!("--uri=nbd+unix:///d{i}?socket={}", socket.display()))
                .arg(format!("--bs={}", case.block))
                .args([format!("--numjobs={}", case.connections), format!("--runtime={seconds}")])
                .arg(format!("--output={}", out.display()))
                .stdout(Stdio::null())
                .spawn()
                .expect("fio runs");
            (child, out)
        })
        .collect();
    clients.into_iter().map(|(child, out)| finish(child, &out)).collect()
}

fn finish(mut child: Child, out: &Path) -> (f64, f64) {
    child.wait().expect("fio ends");
    let text = std::fs::read_to_string(out).expect("fio's output");
    let field = |side: &str, name: &str| -> f64 {
        let part = text.split(&format!("\"{side}\" : {{")).nth(1).unwrap_or_default();
        let value = part.split(&format!("\"{name}\" : ")).nth(1).and_then(|t| t.split([',', '\n']).next());
        value.and_then(|v| v.trim().parse().ok()).unwrap_or_else(|| panic!("fio said: {text}"))
    };
    let both = |name: &str| (field("read", name), field("write", name));
    let (count, time) = (both("total_ios"), both("runtime"));
    (count.0 + count.1, time.0.max(time.1) / 1000.0)
}
