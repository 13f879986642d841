//! Slow, broken and hostile NBD clients: none may hurt another, or the server.
//!
//! Method common to all: a good client works on one connection while bad ones do their worst on others; the
//! good one must be answered promptly throughout, and the server must end cleanly.

use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::{Daemon, Rng, TestDir, tools};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const OPT_MAGIC: &[u8; 8] = b"IHAVEOPT";

fn disk(dir: &TestDir, format: &str) -> Daemon {
    let image = dir.file("disk");
    tools::qemu_img().line("create -q -f").args([format, &image, "64M"]).ok();
    Daemon::serving(dir, format, &image).cores(2).start()
}

/// Fails unless the server still answers a new client quickly.
fn expect_alive(daemon: &mut Daemon, after: &str) {
    assert!(daemon.alive(), "the server died after {after}:\n{}", daemon.log());
    let start = Instant::now();
    let mut good = Nbd::connect(&daemon.nbd_socket(), "d").unwrap_or_else(|e| panic!("after {after}: {e}"));
    let mut buf = [0; 512];
    good.write(0, &[0x5a; 512], 0).unwrap_or_else(|e| panic!("after {after}: {e}"));
    good.read(0, &mut buf).unwrap_or_else(|e| panic!("after {after}: {e}"));
    assert_eq!(buf, [0x5a; 512]);
    good.close();
    assert!(start.elapsed() < Duration::from_secs(5), "{after} slowed others: {:?}", start.elapsed());
}

/// A connection on which the greeting was read and the client's flags were sent.
fn greeted(daemon: &Daemon) -> UnixStream {
    let mut stream = UnixStream::connect(daemon.nbd_socket()).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out can be set");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    stream.write_all(&3u32.to_be_bytes()).expect("client flags");
    stream
}

fn option(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPT_MAGIC.to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Goal: nonsense during the handshake ends that connection or is answered with an error, nothing else.
/// Method: a list of malformed beginnings, each followed by a good client.
#[test]
fn broken_handshakes() {
    let dir = TestDir::new("handshake");
    let mut daemon = disk(&dir, "raw");
    let long_name = vec![b'x'; 5000];
    let go = |name_len: u32, rest: &[u8]| [&name_len.to_be_bytes()[..], rest].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("zeroes", vec![0; 4096]),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("an option of 4 GiB", option(7, u32::MAX, &[])),
        ("an option of 1 MiB", option(7, 1 << 20, &vec![1; 1 << 20])),
        ("an unknown option", option(999, 3, b"abc")),
        ("an empty GO", option(7, 0, &[])),
        ("a GO whose name is longer than itself", option(7, 6, &go(100, &[0, 0]))),
        ("a GO with 65535 requests and no room", option(7, 6, &go(0, &[0xff, 0xff]))),
        ("a name over 4096 bytes", option(7, 5006, &go(5000, &[&long_name[..], &[0, 0]].concat()))),
        ("EXPORT_NAME that does not exist", option(1, 3, b"abc")),
        ("a LIST with data", option(3, 4, b"data")),
        ("a list of contexts before structured replies", option(9, 8, &[0; 8])),
        (
            "contexts that lie about their length",
            option(10, 12, &[0, 0, 0, 1, b'd', 0xff, 0xff, 0xff, 0xff, 1, 2, 3]),
        ),
        ("ABORT", option(2, 0, &[])),
    ];
    for (what, bytes) in cases {
        let mut stream = greeted(&daemon);
        // The server may close while we still send.
        let _ = stream.write_all(&bytes);
        expect_alive(&mut daemon, what);
    }
    daemon.quit();
}

/// Goal: more options than any client needs end the connection. Method: LIST, ten thousand times.
#[test]
fn endless_options() {
    let dir = TestDir::new("options");
    let mut daemon = disk(&dir, "raw");
    let mut stream = greeted(&daemon);
    let mut reader = stream.try_clone().expect("a second handle");
    let drain = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    for _ in 0..10_000 {
        if stream.write_all(&option(3, 0, &[])).is_err() {
            break;
        }
    }
    expect_alive(&mut daemon, "endless options");
    drop(stream);
    daemon.quit();
    let _ = drain.join();
}

/// Goal: nonsense after the handshake: the errors the protocol has, or an end of that connection.
#[test]
fn broken_requests() {
    let dir = TestDir::new("requests");
    let mut daemon = disk(&dir, "raw");
    let size = 64u64 << 20;
    let errors = [
        ("read beyond the end", nbd::READ, size, 512),
        ("read at the top of the number range", nbd::READ, u64::MAX - 511, 512),
        ("an unknown command", 99, 0, 0),
        ("a read of 4 GiB", nbd::READ, 0, u32::MAX),
        ("a trim beyond the end", nbd::TRIM, size - 512, 1024),
        ("a zero-write beyond the end", nbd::WRITE_ZEROES, size, u32::MAX),
    ];
    for (what, command, offset, len) in errors {
        let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
        conn.submit(command, 0, offset, len, &[]).expect("submit");
        if let Ok((_, error)) = conn.reply() {
            assert_ne!(error, 0, "{what} must fail");
            // The connection is still in step.
            conn.read(0, &mut [0; 512]).unwrap_or_else(|e| panic!("after {what}: {e}"));
        }
        expect_alive(&mut daemon, what);
    }
    let mut random = Rng::new(4);
    for _ in 0..20 {
        let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
        let (command, flags, len) =
            (random.next_u64() as u16, random.next_u64() as u16, random.next_u64() as u32);
        let _ = conn.submit(command & 0xf, flags, random.next_u64(), len, &[7; 100]);
        drop(conn);
    }
    expect_alive(&mut daemon, "random requests");
    daemon.quit();
}

/// Goal: a client that goes away in the middle of anything leaves nothing behind. Method: connections are
/// dropped with requests in flight, half a payload sent, or replies unread, a few hundred times.
#[test]
fn clients_that_vanish() {
    let dir = TestDir::new("vanish");
    let mut daemon = disk(&dir, "raw");
    let fds = |daemon: &Daemon| std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("fds").count();
    expect_alive(&mut daemon, "the start");
    let before = fds(&daemon);
    for n in 0..300u64 {
        let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
        match n % 3 {
            0 => {
                for i in 0..16 {
                    conn.submit(nbd::READ, 0, i << 16, 1 << 16, &[]).expect("submit");
                }
            }
            1 => drop(conn.submit(nbd::WRITE, 0, 0, 1 << 20, &[1; 1000])),
            _ => drop(conn.submit(nbd::WRITE, 0, n << 12, 4096, &[1; 4096])),
        }
    }
    expect_alive(&mut daemon, "vanishing clients");
    let start = Instant::now();
    while fds(&daemon) > before + 2 {
        assert!(start.elapsed() < Duration::from_secs(15), "{} descriptors, {before} before", fds(&daemon));
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.quit();
}

/// Goal: a client that asks and never reads holds a bounded part of the server's memory and delays nobody.
/// Method: it asks for 4 GiB in large reads while another works.
#[test]
fn a_client_that_never_reads() {
    let dir = TestDir::new("slow");
    let mut daemon = disk(&dir, "raw");
    let rss = |daemon: &Daemon| {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", daemon.pid())).expect("statm");
        text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("pages") * 4096
    };
    let socket = daemon.nbd_socket();
    let slow = std::thread::spawn(move || {
        let mut conn = Nbd::connect(&socket, "d").expect("connect");
        conn.patience(Duration::from_secs(2)).expect("a time-out can be set");
        for n in 0..1024u64 {
            // At some point the server stops reading and this blocks until the time-out; that is its right.
            if conn.submit(nbd::READ, 0, (n % 16) << 22, 4 << 20, &[]).is_err() {
                break;
            }
        }
        std::thread::sleep(Duration::from_secs(2));
    });
    let start = Instant::now();
    let mut peak = 0;
    while start.elapsed() < Duration::from_secs(2) {
        expect_alive(&mut daemon, "a client that does not read");
        peak = peak.max(rss(&daemon));
    }
    assert!(peak < 512 << 20, "{} MiB resident for one slow client", peak >> 20);
    slow.join().expect("no panic");
    daemon.quit();
}

/// Goal: who does not finish the handshake within 10 s is put out. Method: connect, say nothing, wait for the
/// end of the connection; and one that dribbles a byte at a time.
#[test]
fn the_handshake_has_a_time_limit() {
    let dir = TestDir::new("timeout");
    let daemon = disk(&dir, "raw");
    std::thread::scope(|scope| {
        for dribble in [false, true] {
            let daemon = &daemon;
            scope.spawn(move || {
                let start = Instant::now();
                let mut stream = greeted(daemon);
                stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a time-out can be set");
                let mut bytes = option(7, 4096, &[0; 4096]).into_iter();
                let closed = loop {
                    let mut byte = [0; 1];
                    match stream.read(&mut byte) {
                        Ok(0) => break true,
                        Err(e)
                            if matches!(
                                e.kind(),
                                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                            ) => {}
                        Err(_) => break true,
                        Ok(_) => {}
                    }
                    if dribble && stream.write_all(&[bytes.next().expect("enough")]).is_err() {
                        break true;
                    }
                    if start.elapsed() > Duration::from_secs(20) {
                        break false;
                    }
                };
                assert!(closed, "still connected after 20 s (dribbling: {dribble})");
                let took = start.elapsed();
                assert!(took > Duration::from_secs(8), "put out after {took:?} already");
            });
        }
    });
    daemon.quit();
}
