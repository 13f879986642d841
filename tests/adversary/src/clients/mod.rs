//! `adversary clients`: ten thousand hostile clients of a server, while a good one measures how long its requests take.
//!
//! ```text
//! server (unix, then TCP) ◄── good client: 8 × 4 KiB, all the time        quiet │ attack │ quiet │ … │ quiet
//!                         ◄── attackers: each kind in turn, some stay     p99 of every 200 ms, the middle of each
//! control socket          ◄── attackers of their own
//! afterwards: descriptors, memory, a new client, `img check`
//! ```
//!
//! The good client's p99 is taken over windows of 200 ms; of the windows with attackers and of those without, which take turns
//! in the same run, the middle ones are compared: a machine that is busy with other things disturbs both alike. Attackers come
//! at a fixed pace. `--kind N` runs only that attack.

mod attacks;
mod control;
mod good;
mod wire;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringblock_tests::{Daemon, Rng, TestDir, tools};

use crate::args::Args;
use attacks::ATTACKS;
use good::{ATTACK, BETWEEN, Latencies, QUIET, STOP};
use wire::{Address, Stream};

/// Attackers in a second.
const PACE: u64 = 250;
/// Threads of attackers, and the connections that each holds.
const THREADS: u64 = 4;
const HELD: usize = 10;
/// Rounds of quiet and attack.
const ROUNDS: u64 = 8;
/// How long each quiet part is.
const PAUSE: Duration = Duration::from_millis(1000);
/// The good client's p99 under attack, as a multiple of its quiet one.
const RATIO: f64 = 2.0;
/// Memory that a server may keep, whatever it was asked: caches of its allocator.
const SLACK: u64 = 16 << 20;

/// What a server holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    memory: u64,
}

/// What was seen on one kind of socket.
struct Seen {
    clients: u64,
    latencies: Latencies,
    before: Held,
    after: Held,
    faults: Vec<String>,
}

/// Runs the command. False if anything was not as it should be.
pub fn run(args: &[String]) -> bool {
    let args = match Args::parse(args, 10_000, &["--kind"]) {
        Ok(args) => args,
        Err(e) => {
            eprintln!("adversary clients: {e}");
            return false;
        }
    };
    let only = args.own("--kind").and_then(|n| n.parse().ok());
    // most come through the unix socket, the rest over TCP
    let mut all = Vec::new();
    for (tcp, count) in [(false, args.count - args.count / 5), (true, args.count / 5)] {
        match session(tcp, count, args.seed, only) {
            Ok(seen) => all.push(seen),
            Err(e) => {
                println!("FOUND: {e}");
                println!("replay: cargo xtask adversary clients --count {} --seed {}", args.count, args.seed);
                return false;
            }
        }
    }
    report(&all, &args)
}

fn report(all: &[Seen], args: &Args) -> bool {
    let (mut clients, mut faults) = (0, 0);
    let mut texts = Vec::new();
    for (seen, name) in all.iter().zip(["unix", "TCP"]) {
        let (quiet, attack) = (good::median(&seen.latencies.quiet), good::median(&seen.latencies.attack));
        let ratio = f64::from(attack) / f64::from(quiet.max(1));
        println!(
            "{name}: {} requests of the good client, {} quiet windows, {} under attack",
            seen.latencies.requests,
            seen.latencies.quiet.len(),
            seen.latencies.attack.len()
        );
        let mut found = seen.faults.clone();
        if seen.latencies.quiet.is_empty() || seen.latencies.attack.is_empty() {
            found.push("too short a run to compare anything".into());
        }
        if ratio > RATIO {
            found.push(format!("p99 {attack} us under attack, {quiet} us before"));
        }
        found.iter().for_each(|f| println!("FOUND: {name}: {f}"));
        clients += seen.clients;
        faults += found.len();
        texts.push(format!(
            "{name}: p99 quiet {quiet} us, under attack {attack} us (ratio {ratio:.2}), descriptors {} / {}, memory {} / {} MiB",
            seen.before.descriptors,
            seen.after.descriptors,
            seen.before.memory >> 20,
            seen.after.memory >> 20
        ));
    }
    if faults > 0 {
        println!("replay: cargo xtask adversary clients --count {} --seed {}", args.count, args.seed);
    }
    println!(
        "proof: hostile clients: {clients}; {}; crashes 0, faults {faults}; {:.1} s",
        texts.join("; "),
        args.elapsed()
    );
    faults == 0
}

/// A server on one kind of socket, from its start to its end.
fn session(tcp: bool, count: u64, seed: u64, only: Option<usize>) -> Result<Seen, String> {
    let dir = TestDir::new("clients");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, &attacks::SIZE.to_string()]).ok();
    let mut daemon = Daemon::serving(&dir, "qcow2", &image).cores(2).start();
    let address = if tcp { listen_again(&daemon)? } else { Address::Unix(daemon.nbd_socket()) };
    let phase = AtomicU8::new(BETWEEN);
    let (latencies, before, clients, mut faults) = std::thread::scope(|scope| {
        let good = scope.spawn(|| good::run(&address, &phase));
        // each attack once: what the server takes for them the first time it may keep
        attack(&address, 2 * ATTACKS.len() as u64, seed ^ 0xaaaa, only);
        settle(&daemon, None);
        let before = held(&daemon);
        let mut faults = Vec::new();
        for round in 0..ROUNDS {
            phase.store(QUIET, Ordering::Release);
            std::thread::sleep(PAUSE);
            phase.store(ATTACK, Ordering::Release);
            attack(&address, count / ROUNDS, seed ^ round, only);
            phase.store(BETWEEN, Ordering::Release);
            let answers = control(&daemon, count / ROUNDS / 20, seed ^ round);
            faults.extend(answers.err());
        }
        phase.store(QUIET, Ordering::Release);
        std::thread::sleep(PAUSE);
        phase.store(STOP, Ordering::Release);
        let latencies = good.join().unwrap_or_else(|_| Err("the good client panicked".into()));
        (latencies, before, count / ROUNDS * ROUNDS, faults)
    });
    if !daemon.alive() {
        return Err(format!("the server died:\n{}", daemon.log()));
    }
    let latencies = latencies?;
    settle(&daemon, Some(before));
    let after = held(&daemon);
    // the good client has left
    if after.descriptors > before.descriptors {
        faults.push(format!("{} descriptors, {} before", after.descriptors, before.descriptors));
    }
    if after.memory > before.memory + SLACK {
        faults.push(format!("{} MiB of memory, {} before", after.memory >> 20, before.memory >> 20));
    }
    finish(&address, daemon, &image)?;
    Ok(Seen { clients, latencies, before, after, faults })
}

/// Moves the server to a TCP socket, with the commands that are there for it.
fn listen_again(daemon: &Daemon) -> Result<Address, String> {
    // the port: one that was free just now
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))
        .and_then(|l| l.local_addr())
        .map_err(|e| e.to_string())?
        .port();
    let mut qmp = daemon.qmp();
    qmp.run("nbd-server-stop", serde_json::json!({}));
    let addr = serde_json::json!({"type": "inet", "data": {"host": "127.0.0.1", "port": port.to_string()}});
    qmp.run("nbd-server-start", serde_json::json!({"addr": addr, "max-connections": 64}));
    let export =
        serde_json::json!({"type": "nbd", "id": "again", "node-name": "q", "name": "d", "writable": true});
    qmp.run("block-export-add", export);
    Ok(Address::Tcp(port))
}

/// Hostile clients at their pace, on some threads; back when all have been.
fn attack(to: &Address, count: u64, seed: u64, only: Option<usize>) {
    let (next, began) = (AtomicU64::new(0), Instant::now());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let next = &next;
            scope.spawn(move || {
                let (mut rng, mut held) = (Rng::new(seed << 8 | thread), VecDeque::new());
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    let due = Duration::from_micros(n * 1_000_000 / PACE);
                    std::thread::sleep(due.saturating_sub(began.elapsed()));
                    let (_, attack) = ATTACKS[only.unwrap_or(n as usize) % ATTACKS.len()];
                    // what the server does to it is its affair; that it does not harm others is ours
                    held.extend(attack(to, &mut rng).unwrap_or_default());
                    dribble(&mut held);
                    while held.len() > HELD {
                        held.pop_front();
                    }
                }
            });
        }
    });
}

/// One more byte from somebody who is held.
fn dribble(held: &mut VecDeque<Stream>) {
    if let Some(mut stream) = held.pop_front() {
        let _ = stream.patience(Duration::from_millis(1));
        let _ = stream.write(&[0]);
        held.push_back(stream);
    }
}

/// Hostile clients of the control socket, then a good one.
fn control(daemon: &Daemon, count: u64, seed: u64) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    for n in 0..count {
        let _ = control::attack(&daemon.qmp_socket(), seed + n, &mut rng);
    }
    let socket = daemon.qmp_socket();
    let good = std::thread::spawn(move || {
        ringblock_tests::qmp::Qmp::connect(&socket).run("query-version", serde_json::json!({}))
    });
    good.join().map(drop).map_err(|_| "the control socket does not answer a good client any more".into())
}

fn held(daemon: &Daemon) -> Held {
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).map_or(0, Iterator::count);
    let text = std::fs::read_to_string(format!("/proc/{}/statm", daemon.pid())).unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    Held { descriptors, memory: pages * 4096 }
}

/// Waits until the server has let go of those who left: it holds no more than told, or (`None`) no fewer descriptors than a while
/// ago. Who is in the option phase may stay there for 10 s.
fn settle(daemon: &Daemon, target: Option<Held>) {
    let (mut last, mut since) = (usize::MAX, Instant::now());
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(30) {
        let now = held(daemon);
        if now.descriptors < last {
            (last, since) = (now.descriptors, Instant::now());
        }
        let over = match target {
            Some(t) => now.descriptors <= t.descriptors && now.memory <= t.memory + SLACK,
            None => since.elapsed() > Duration::from_secs(11),
        };
        if over {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The server still serves, ends as it should, and leaves a sound image.
fn finish(address: &Address, daemon: Daemon, image: &str) -> Result<(), String> {
    let told = |e: std::io::Error| format!("a new client afterwards: {e}");
    let mut nbd = ringblock_tests::nbd::Nbd::over(address.connect().map_err(told)?, "d").map_err(told)?;
    nbd.write(0, &[1; 4096], 0).and_then(|()| nbd.flush()).map_err(told)?;
    nbd.close();
    daemon.quit();
    ringblock_tests::daemon::wait_unlocked(image);
    for tool in [tools::img(), tools::qemu_img()] {
        let check = tool.line("check -f qcow2").arg(image).run();
        if check.code != 0 {
            return Err(check.describe());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every attack is survived and nothing is left of it. Method: each some times, on both kinds of socket; how long the
    /// good client waits is not judged in so short a time.
    #[test]
    fn slice() {
        for tcp in [false, true] {
            let seen = session(tcp, 2 * ATTACKS.len() as u64, 3, None).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(seen.faults, Vec::<String>::new());
            assert!(seen.latencies.requests > 100);
        }
    }
}
