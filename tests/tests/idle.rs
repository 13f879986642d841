//! What a server costs that nobody uses, and what a huge image costs one that is used.

use ringblock_tests::nbd::Nbd;
use ringblock_tests::{Daemon, Rng, TestDir, tools};
use std::time::Duration;

const TIB: u64 = 1 << 40;

/// User and system time of a process and all its threads, in clock ticks: fields 14 and 15 of the stat file.
fn ticks(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    let (_, rest) = text.rsplit_once(')').expect("a name in parentheses");
    let field = |n: usize| rest.split_whitespace().nth(n - 3).and_then(|f| f.parse::<u64>().ok());
    field(14).expect("user time") + field(15).expect("system time")
}

/// Nanoseconds on a CPU, summed over the threads: far finer than ticks.
fn cpu_ns(pid: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    let ns = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    threads.flatten().filter_map(|t| ns(t.path())).sum()
}

/// A size from /proc/PID/status, in KiB.
fn status_kib(pid: u32, key: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = text.lines().find_map(|l| l.strip_prefix(key)).expect("the line is there");
    line.trim_matches([':', ' ', '\t']).split_whitespace().next().and_then(|n| n.parse().ok()).expect("KiB")
}

/// Goal: an idle server uses 0.0 % of a CPU, also after having worked and with clients connected.
/// Method: work, wait for it to settle, then read its CPU times two seconds apart.
#[test]
fn an_idle_server_uses_no_cpu() {
    let dir = TestDir::new("idle");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "1G"]).ok();
    let daemon = Daemon::serving(&dir, "qcow2", &image).cores(2).start();
    let mut clients: Vec<Nbd> =
        (0..3).map(|_| Nbd::connect(&daemon.nbd_socket(), "d").expect("connect")).collect();
    let _qmp = daemon.qmp();
    for (i, client) in (0u64..).zip(&mut clients) {
        client.write(i * 65536, &[7; 65536], 0).expect("write");
        client.flush().expect("flush");
    }
    std::thread::sleep(Duration::from_millis(1500));
    let (ticks_before, ns_before) = (ticks(daemon.pid()), cpu_ns(daemon.pid()));
    std::thread::sleep(Duration::from_secs(2));
    let (used, ns) = (ticks(daemon.pid()) - ticks_before, cpu_ns(daemon.pid()) - ns_before);
    println!("idle for 2 s: {used} ticks, {ns} ns");
    assert_eq!(used, 0, "ticks used in 2 s of idleness ({ns} ns)");
    // 0.05 % of 2 s: what `top` would round up to 0.1 %.
    assert!(ns < 1_000_000, "{ns} ns used in 2 s of idleness");
}

/// Goal: a 1 TiB image is served within 64 MiB of resident memory at default cache sizes.
/// Method: requests scattered over the whole disk touch far more tables than fit; the high-water mark counts.
#[test]
fn a_huge_image_fits_in_little_memory() {
    let dir = TestDir::new("huge");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "1T"]).ok();
    let daemon = Daemon::serving(&dir, "qcow2", &image).cores(2).start();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let socket = daemon.nbd_socket();
            scope.spawn(move || {
                let mut client = Nbd::connect(&socket, "d").expect("connect");
                let mut rng = Rng::new(thread);
                let (mut data, mut back) = (vec![0; 4096], vec![0; 4096]);
                for _ in 0..700 {
                    let offset = (rng.below(TIB / 8192) * 2 + thread) * 4096;
                    rng.fill(&mut data);
                    client.write(offset, &data, 0).expect("write");
                    client.read(offset, &mut back).expect("read");
                    assert!(data == back, "other data at {offset}");
                    client.read(rng.below(TIB / 4096) * 4096, &mut back).expect("read");
                }
                client.flush().expect("flush");
            });
        }
    });
    let (peak, now) = (status_kib(daemon.pid(), "VmHWM"), status_kib(daemon.pid(), "VmRSS"));
    println!("1 TiB image: {now} KiB resident, {peak} KiB at most");
    assert!(peak <= 64 * 1024, "{peak} KiB resident at the peak, {now} KiB at the end");
    daemon.quit();
}
