//! A client's stream, from its first byte to its last, against the NBD server on a qcow2 image in the simulator. The
//! client may be in its senses, or not, or stop reading.
//!
//! The server answers every request of a client in its senses exactly once, ends with the stream, forgets the client, serves
//! the next one, and leaves a clean image.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use super::Target;
use super::nbd_stream::{Mode, handshake, request};
use crate::choices::Choices;
use crate::{Outcome, sim};
use ringblock_checker::{Checker, Files};
use ringblock_crash::cases::{attach, cases};
use ringblock_drivers::export::Exports;
use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_engine::Engine;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Faults, World};
use ringblock_engine::timer::Sleep;

pub(super) const TARGET: Target = Target {
    name: "nbd_transmission",
    run,
    seeds,
    words: &[
        b"\x25\x60\x95\x13",
        b"\x21\xe4\x1c\x71",
        b"\0\0\0\x07\0\0\0\0",
        b"IHAVEOPT\0\0\0",
        b"\x7f\xff\xff\xff",
        b"\0\0\x02\0",
    ],
    longest: 4096,
    share: 22_000,
};

/// The disk's size.
const SIZE: u64 = 40 << 10;

/// What the client does.
struct Client {
    stream: Vec<u8>,
    /// Bytes at a time.
    piece: usize,
    /// Whether it takes the replies.
    reads: bool,
    /// Requests it sent, if it was in its senses all the time: each has one reply.
    expects: Option<(Mode, u64)>,
}

fn client(data: &[u8]) -> Client {
    let mut c = Choices::new(data);
    let how = c.byte();
    let piece = [1 << 20, 28, 100, 1, 3000][how as usize % 5].max(data.len() / 64);
    let reads = how & 0x40 == 0;
    let mode = [Mode::Simple, Mode::Structured, Mode::Extended][c.byte() as usize % 3];
    if how & 0x80 != 0 {
        // as it comes, with or without an option phase in front
        let mut stream = if how & 0x20 != 0 { handshake(mode) } else { Vec::new() };
        stream.extend_from_slice(c.rest());
        return Client { stream, piece, reads, expects: None };
    }
    let mut stream = handshake(mode);
    let (mut sane, mut count) = (true, 0);
    while !c.is_over() && count < 60 {
        let op = c.byte();
        if op >= 0xf0 {
            stream.extend_from_slice(c.bytes(1 + op as usize % 16));
            sane = false;
            continue;
        }
        count += 1;
        sane &= one(mode, op, count, &mut c, &mut stream);
    }
    Client { stream, piece, reads, expects: sane.then_some((mode, count)) }
}

/// One request; whether the server goes on after it.
fn one(mode: Mode, op: u8, cookie: u64, c: &mut Choices<'_>, stream: &mut Vec<u8>) -> bool {
    let ty = u16::from(op % 9);
    let mut flags = c.pick(&[0, 0, 0, 1, 1 << 3, 1 << 1, 1 << 4, 1 << 2, 1 << 5, 0x8000]);
    let off = match c.below(8) {
        0 => SIZE - 512,
        1 => c.number(8),
        _ => c.number(2) % SIZE,
    };
    let mut len = match c.below(12) {
        0 => 0,
        1 => 1 << (c.byte() % 40),
        _ => 1 + c.number(2) % 9000,
    };
    // the one that leaves is at the end of the stream anyway
    let ty = if ty == 2 { 3 } else { ty };
    if ty == 1 {
        len %= 20_000;
        if mode == Mode::Extended {
            flags |= 1 << 5;
        }
    } else {
        flags &= !(1 << 5);
    }
    let len = if mode == Mode::Extended { len } else { len & 0xffff_ffff };
    stream.extend(request(mode, flags, ty, cookie, off, len));
    if ty == 1 {
        stream.resize(stream.len() + len as usize, op);
    }
    true
}

fn run(data: &[u8]) -> Outcome {
    let client = client(data);
    let case = cases().remove(0);
    let (mut setup, roles, _) = case.start(u64::from(data.first().copied().unwrap_or(0)), 1);
    setup.faults = Faults { latency_ns: (1_000, 2_000), stalled: 0, short: 50, ..Faults::default() };
    let mut world = World::new(setup);
    let engine = world.engine();
    let node = case.node(false);
    let out = world.run(move || {
        Box::pin(async move {
            let mut out = Outcome::default();
            let root = attach(node, false).await.expect("a new image opens");
            let rig = Rig::new(&engine).await;
            let replies = rig.talk(&client).await;
            out.size("replies", replies.len() as u64);
            tell(&replies, &mut out);
            if let Some((mode, count)) = client.expects.filter(|_| client.reads) {
                let got = answers(mode, &replies, &mut out);
                assert_eq!(got, count, "replies of {mode:?}");
            }
            rig.next_one().await;
            rig.end().await;
            Graph::current().detach(root).await.expect("detach");
            sim::close(&mut out).await;
            out
        })
    });
    let image = world.live(&roles.image).expect("the image").to_bytes();
    let report = Checker::default().check(&Files::new(&image)).clone();
    assert!(report.exit_code() == 0, "after a clean end: {}", report.explain());
    out
}

/// A server with an export "d".
struct Rig {
    server: Rc<NbdServer>,
    exports: std::sync::Arc<Exports>,
}

impl Rig {
    async fn new(engine: &Engine) -> Rig {
        let server = NbdServer::start(engine, ServerConfig::default(), Vec::new()).expect("a server");
        let exports = Exports::new(|_| {});
        let options = NbdExportOptions {
            id: "e".into(),
            node_name: "n".into(),
            name: Some("d".into()),
            writable: true,
            allocation_depth: true,
            ..NbdExportOptions::default()
        };
        server.add(&exports, options).await.expect("an export");
        Rig { server: Rc::new(server), exports }
    }

    /// Says all of the stream and gives what came back.
    async fn talk(&self, client: &Client) -> Vec<u8> {
        let (mut mine, theirs) = UnixStream::pair().expect("a pair of sockets");
        mine.set_nonblocking(true).expect("a socket of ours");
        self.server.serve(OwnedFd::from(theirs));
        let (mut said, mut heard, mut idle) = (0, Vec::new(), 0);
        let mut buf = vec![0; 64 << 10];
        loop {
            let mut moved = false;
            if said < client.stream.len() {
                let end = (said + client.piece).min(client.stream.len());
                match mine.write(&client.stream[said..end]) {
                    Ok(n) => (said, moved) = (said + n, true),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => said = client.stream.len(),
                }
                if said == client.stream.len() {
                    let _ = mine.shutdown(std::net::Shutdown::Write);
                }
            }
            if client.reads {
                match mine.read(&mut buf) {
                    Ok(0) => break,
                    Ok(n) => {
                        heard.extend_from_slice(&buf[..n]);
                        moved = true;
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
            // one that does not read gives up some time
            idle = if moved { 0 } else { idle + 1 };
            let patience = if client.reads { 5000 } else { 20 };
            if idle > patience {
                assert!(!client.reads, "the server neither answers nor hangs up");
                break;
            }
            Sleep::ns(20_000 << idle.min(8)).await;
        }
        drop(mine);
        self.alone().await;
        heard
    }

    /// Waits until the server has forgotten all clients.
    async fn alone(&self) {
        for i in 0..2000 {
            if self.server.connections() == 0 {
                return;
            }
            Sleep::ns(20_000 << (i / 50).min(10)).await;
        }
        panic!("a client that has left is still there");
    }

    /// A good client is served.
    async fn next_one(&self) {
        let mut stream = handshake(Mode::Simple);
        stream.extend(request(Mode::Simple, 0, 0, 7, 0, 512));
        let good = Client { stream, piece: 1 << 20, reads: true, expects: None };
        let replies = self.talk(&good).await;
        // greeting, size and flags with padding, one reply with its data
        assert_eq!(replies.len(), 18 + 10 + 16 + 512);
        assert_eq!(replies[28..36], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    }

    async fn end(&self) {
        self.exports.remove_all("nbd").await;
        self.server.stop().await;
    }
}

/// Which replies came, whatever is between them.
fn tell(replies: &[u8], out: &mut Outcome) {
    for w in replies.windows(8) {
        let word = |at: usize| u32::from_be_bytes([w[at], w[at + 1], w[at + 2], w[at + 3]]);
        match word(0) {
            0x6744_6698 => out.kind("simple", word(4).into()),
            0x668e_33ef | 0x6e8a_278c => out.kind("chunk", word(4).into()),
            _ => {}
        }
    }
}

/// Counts the requests that have their last reply; panics if the stream of replies is out of step. The handshake's replies
/// are found by their magic.
fn answers(mode: Mode, replies: &[u8], out: &mut Outcome) -> u64 {
    let mut at = 18;
    if mode == Mode::Simple {
        at += 10;
    } else {
        while replies.get(at..at + 8) == Some(&[0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9]) {
            at += 20 + be(replies, at + 16, 4) as usize;
        }
    }
    let mut count = 0;
    while at < replies.len() {
        match mode {
            Mode::Simple => {
                assert_eq!(be(replies, at, 4), 0x6744_6698);
                count += 1;
                // only a read of a simple client has data, and its length is not in the reply: look for the next magic
                let next = replies[at + 16..].windows(4).position(|w| w == [0x67, 0x44, 0x66, 0x98]);
                at = next.map_or(replies.len(), |n| at + 16 + n);
            }
            Mode::Structured | Mode::Extended => {
                let (magic, head) = match mode {
                    Mode::Extended => (0x6e8a_278c, 32),
                    _ => (0x668e_33ef, 20),
                };
                // what has no data to give may be answered simply
                if mode == Mode::Structured && be(replies, at, 4) == 0x6744_6698 {
                    (count, at) = (count + 1, at + 16);
                    continue;
                }
                assert_eq!(be(replies, at, 4), magic, "at {at} of the replies");
                out.kind("chunk type", be(replies, at + 6, 2));
                count += be(replies, at + 4, 2) & 1;
                let len = if head == 32 { be(replies, at + 24, 8) } else { be(replies, at + 16, 4) };
                at += head + len as usize;
            }
        }
    }
    assert_eq!(at, replies.len(), "the replies end with a whole one");
    count
}

fn be(bytes: &[u8], at: usize, n: usize) -> u64 {
    bytes[at..at + n].iter().fold(0, |v, b| v << 8 | u64::from(*b))
}

/// Clients in and out of their senses, in each mode.
fn seeds() -> Vec<Vec<u8>> {
    let mut rng = ringblock_engine::host::sim::Rng::new(7);
    let mut list: Vec<Vec<u8>> = Vec::new();
    for mode in 0..3u8 {
        for how in [0u8, 1, 2, 4, 0x40] {
            let ops = (0..60).map(|_| rng.below(0xef) as u8);
            list.push([how, mode].into_iter().chain(ops).collect());
        }
        let kind = [Mode::Simple, Mode::Structured, Mode::Extended][usize::from(mode)];
        let mut raw = vec![0xa0, mode];
        raw.extend(request(kind, 0, 0, 1, 0, 4096));
        raw.extend(request(kind, 0, 7, 2, 0, 4096));
        raw.extend(request(kind, 0, 2, 3, 0, 0));
        list.push(raw);
        list.push([vec![0x80, mode], handshake(kind)].concat());
    }
    list
}
