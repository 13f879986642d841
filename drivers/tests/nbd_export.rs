//! The NBD export on a running engine, with real sockets: data, bounds, removal, and clients that mean harm.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringblock_drivers::export::nbd::wire::{self, NbdError, cmd, cmd_flag};
use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_drivers::export::{Exports, IoThread, RemoveMode, listen};
use ringblock_drivers::open;
use ringblock_drivers::options::{from_arg, from_json};
use ringblock_engine::graph::Graph;
use ringblock_engine::sync::block_on;
use ringblock_engine::{Config, Engine, Error};
use serde_json::{Value, json};

/// A server with its engine, socket and folder.
struct Rig {
    engine: Engine,
    server: Arc<NbdServer>,
    exports: Arc<Exports>,
    gone: Arc<Mutex<Vec<String>>>,
    dir: PathBuf,
}

impl Rig {
    fn new(config: ServerConfig, node: Value) -> Rig {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("rbnbd-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::File::create(dir.join("disk")).unwrap().set_len(64 << 20).unwrap();
        let engine = Engine::start(&Config { cores: 2, pin: false, ..Config::default() }).unwrap();
        let at = format!("type=unix,path={}", dir.join("s").display());
        let listener = listen(&from_arg(&at, None).unwrap()).unwrap();
        let server = Arc::new(NbdServer::start(&engine, config, vec![listener]).unwrap());
        let gone: Arc<Mutex<Vec<String>>> = Arc::default();
        let news = gone.clone();
        let exports = Exports::new(move |id| news.lock().unwrap().push(id.into()));
        let mut node = node;
        if node["driver"] == "file" {
            node["filename"] = json!(dir.join("disk"));
        }
        engine.run(0, move || {
            Box::pin(async move {
                let node = open::node(from_json(&node).unwrap()).unwrap();
                Graph::current().add(node).await.unwrap();
            })
        });
        let rig = Rig { engine, server, exports, gone, dir };
        rig.add("e", "n", "d", true).unwrap();
        rig
    }

    fn file() -> Rig {
        Rig::new(ServerConfig::default(), json!({"driver": "file", "node-name": "n", "discard": "unmap"}))
    }

    fn null(config: ServerConfig) -> Rig {
        Rig::new(config, json!({"driver": "null-co", "node-name": "n", "size": 1u64 << 40}))
    }

    fn add(&self, id: &str, node: &str, name: &str, writable: bool) -> Result<(), Error> {
        self.add_with(NbdExportOptions {
            id: id.into(),
            node_name: node.into(),
            name: Some(name.into()),
            writable,
            ..NbdExportOptions::default()
        })
    }

    fn add_with(&self, options: NbdExportOptions) -> Result<(), Error> {
        let (server, exports) = (self.server.clone(), self.exports.clone());
        self.engine.run(0, move || Box::pin(async move { server.add(&exports, options).await }))
    }

    fn connect(&self) -> UnixStream {
        let s = UnixStream::connect(self.dir.join("s")).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        s
    }

    /// A client in the transmission phase: simple replies, the old way in.
    fn client(&self, name: &str) -> UnixStream {
        let mut s = self.connect();
        let mut greeting = [0; 18];
        s.read_exact(&mut greeting).unwrap();
        let mut ask = vec![0, 0, 0, 3];
        ask.extend(b"IHAVEOPT\0\0\0\x01");
        ask.extend((name.len() as u32).to_be_bytes());
        ask.extend(name.as_bytes());
        s.write_all(&ask).unwrap();
        let mut reply = [0; 10];
        s.read_exact(&mut reply).unwrap();
        s
    }

    fn eventually(&self, what: &str, test: impl Fn() -> bool) {
        let start = Instant::now();
        while !test() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what} did not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        block_on(self.exports.remove_all("nbd"));
        block_on(self.server.stop());
        assert_eq!(self.server.connections(), 0);
        self.engine.run(0, || Box::pin(async { Graph::current().shutdown().await })).unwrap();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn request(ty: u16, flags: u16, cookie: u64, off: u64, len: u32) -> Vec<u8> {
    let mut v = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    v.extend(flags.to_be_bytes());
    v.extend(ty.to_be_bytes());
    v.extend(cookie.to_be_bytes());
    v.extend(off.to_be_bytes());
    v.extend(len.to_be_bytes());
    v
}

/// The next simple reply: error number and cookie.
fn reply(s: &mut UnixStream) -> (u32, u64) {
    let mut h = [0; 16];
    s.read_exact(&mut h).unwrap();
    assert_eq!(wire::be32(&h, 0), Some(wire::SIMPLE_REPLY_MAGIC));
    (wire::be32(&h, 4).unwrap(), wire::be64(&h, 8).unwrap())
}

fn ask(s: &mut UnixStream, ty: u16, off: u64, len: u32) -> u32 {
    s.write_all(&request(ty, 0, 7, off, len)).unwrap();
    reply(s).0
}

/// Whether the server has hung up.
fn is_over(s: &mut UnixStream) -> bool {
    matches!(s.read(&mut [0; 64]), Ok(0) | Err(_))
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

/// Goal: what was written is read, whatever the sizes and however requests are packed into segments of the
/// stream. Method: rounds of pipelined writes, zeroes and trims of disjoint ranges on two connections against a
/// model, sent in random pieces; then everything is read back in random pieces.
#[test]
fn data_survives_any_packing() {
    let rig = Rig::file();
    let mut clients = [rig.client("d"), rig.client("d")];
    let mut model = vec![0u8; 8 << 20];
    let mut seed = 42;
    for round in 0..40usize {
        let s = &mut clients[round % 2];
        let (mut out, mut at, mut count) = (Vec::new(), random(&mut seed) as usize % 9000, 0);
        while count < 20 && at < model.len() {
            let len = match random(&mut seed) % 8 {
                0 => 0,
                1 => 1 + random(&mut seed) as usize % 300_000,
                2 => 65536,
                _ => 1 + random(&mut seed) as usize % 9000,
            };
            let len = len.min(model.len() - at);
            let flags = if count % 5 == 0 { cmd_flag::FUA } else { 0 };
            if count % 7 == 6 {
                out.extend(request(cmd::WRITE_ZEROES, flags, count, at as u64, len as u32));
                model[at..at + len].fill(0);
            } else {
                out.extend(request(cmd::WRITE, flags, count, at as u64, len as u32));
                let from = out.len();
                out.extend((0..len).map(|_| random(&mut seed) as u8));
                model[at..at + len].copy_from_slice(&out[from..]);
            }
            count += 1;
            at += len + random(&mut seed) as usize % 100_000;
        }
        out.extend(request(cmd::FLUSH, 0, count, 0, 0));
        let mut rest = &out[..];
        while !rest.is_empty() {
            let n = (1 + random(&mut seed) as usize % 200_000).min(rest.len());
            s.write_all(&rest[..n]).unwrap();
            rest = &rest[n..];
        }
        let mut seen: Vec<u64> =
            (0..=count).map(|_| reply(s)).map(|(e, c)| (assert_eq!(e, 0), c).1).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=count).collect::<Vec<_>>());
    }
    for s in &mut clients {
        let mut at = 0;
        while at < model.len() {
            let len = (random(&mut seed) as usize % 700_000).min(model.len() - at);
            assert_eq!(ask(s, cmd::READ, at as u64, len as u32), 0);
            let mut got = vec![0; len];
            s.read_exact(&mut got).unwrap();
            assert!(got == model[at..at + len], "difference in {at}..{}", at + len);
            at += len;
        }
    }
}

/// Goal: refused requests leave the connection in step, up to the payload that is drained; beyond it, and after
/// nonsense, the connection ends. Method: each between two good reads.
#[test]
fn refusals_keep_in_step() {
    let rig = Rig::null(ServerConfig::default());
    rig.add("e2", "n", "ro", false).unwrap();
    let mut s = rig.client("d");
    let mut ro = rig.client("ro");
    let good = |s: &mut UnixStream| {
        assert_eq!(ask(s, cmd::READ, 0, 16), 0);
        s.read_exact(&mut [0; 16]).unwrap();
    };
    let m = wire::MAX_PAYLOAD;
    let write = |s: &mut UnixStream, off: u64, len: u32| {
        s.write_all(&request(cmd::WRITE, 0, 1, off, len)).unwrap();
        s.write_all(&vec![1; len as usize]).unwrap();
        reply(s).0
    };
    assert_eq!(write(&mut s, 5, m), 0);
    good(&mut s);
    assert_eq!(write(&mut s, 0, m + 1), NbdError::Inval as u32);
    good(&mut s);
    assert_eq!(write(&mut s, 1 << 40, 100_000), NbdError::NoSpc as u32);
    good(&mut s);
    assert_eq!(write(&mut ro, 0, 100_000), NbdError::Perm as u32);
    good(&mut ro);
    assert_eq!(ask(&mut s, cmd::READ, 0, m), 0);
    s.read_exact(&mut vec![0; m as usize]).unwrap();
    assert_eq!(ask(&mut s, cmd::READ, 0, m + 1), NbdError::Inval as u32);
    assert_eq!(ask(&mut s, 77, 0, 1), NbdError::Inval as u32);
    good(&mut s);
    assert_eq!(ask(&mut s, cmd::WRITE, 0, u32::MAX), NbdError::Inval as u32);
    assert!(is_over(&mut s));
    ro.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").unwrap();
    assert!(is_over(&mut ro));
}

/// Goal: a client that sends requests and reads no replies costs bounded memory and hurts nobody. Method: one
/// sends reads of 1 MiB until the server stops taking them, while another does small reads and is timed.
#[test]
fn a_client_that_does_not_read() {
    let rig = Rig::null(ServerConfig::default());
    let mut slow = rig.client("d");
    slow.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let flood = request(cmd::READ, 0, 1, 0, 1 << 20).repeat(100);
    let mut sent = 0;
    while sent < 100_000 && slow.write_all(&flood).is_ok() {
        sent += 100;
    }
    assert!(sent < 100_000, "the server takes requests without end");
    let mut quick = [rig.client("d"), rig.client("d")];
    let start = Instant::now();
    for _ in 0..500 {
        for s in &mut quick {
            assert_eq!(ask(s, cmd::READ, 0, 4096), 0);
            s.read_exact(&mut [0; 4096]).unwrap();
        }
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(slow);
    rig.eventually("the end of the slow client", || rig.server.connections() == 2);
}

/// Goal: clients that leave or break off anywhere leave nothing behind. Method: cut a session at every one of
/// many places, and mutate its bytes, then count connections and use the server.
#[test]
fn hostile_clients_leave_nothing() {
    let rig = Rig::null(ServerConfig { max_connections: 0, ..ServerConfig::default() });
    let mut session = vec![0, 0, 0, 3];
    session.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    session.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation");
    session.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01d\0\0");
    session.extend(request(cmd::READ, 0, 1, 0, 4096));
    session.extend(request(cmd::BLOCK_STATUS, 0, 2, 0, 1 << 20));
    session.extend(request(cmd::WRITE, 0, 3, 0, 70_000));
    session.extend([9; 70_000]);
    session.extend(request(cmd::TRIM, 0, 4, 0, 70_000));
    session.extend(request(cmd::READ, 0, 5, 0, 32 << 20));
    session.extend(request(cmd::DISC, 0, 6, 0, 0));
    let mut seed = 7;
    for i in 0..400usize {
        let mut bytes = session.clone();
        if i % 2 == 0 {
            for _ in 0..1 + random(&mut seed) % 3 {
                let at = random(&mut seed) as usize % 250;
                bytes[at] = [0, 0xff, 0x7f, random(&mut seed) as u8][random(&mut seed) as usize % 4];
            }
        }
        let end = if i % 3 == 0 { bytes.len() } else { random(&mut seed) as usize % 300 };
        let mut s = rig.connect();
        s.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = s.write_all(&bytes[..end]);
        if i % 4 == 0 {
            s.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
            let _ = s.read(&mut [0; 5000]);
        }
    }
    rig.eventually("the end of all clients", || rig.server.connections() == 0);
    let mut s = rig.client("d");
    assert_eq!(ask(&mut s, cmd::FLUSH, 0, 0), 0);
}

/// Goal: the option phase ends in time, and a client in it occupies a place but no more. Method: one second
/// allowed, two places; idle and dripping clients are cut, the third comes in when one has gone.
#[test]
fn handshake_time_and_places() {
    let rig = Rig::null(ServerConfig { max_connections: 2, handshake_seconds: 1, ..ServerConfig::default() });
    let start = Instant::now();
    let (mut idle, mut drip) = (rig.connect(), rig.connect());
    let dripping = std::thread::spawn(move || {
        let _ = drip.read_exact(&mut [0; 18]);
        while drip.write_all(&[0]).is_ok() && start.elapsed() < Duration::from_secs(8) {
            std::thread::sleep(Duration::from_millis(450));
        }
        start.elapsed()
    });
    idle.read_exact(&mut [0; 18]).unwrap();
    let mut third = rig.client("d");
    assert!(start.elapsed() > Duration::from_millis(800), "came in before its turn");
    assert!(is_over(&mut idle));
    assert!(dripping.join().unwrap() < Duration::from_secs(4));
    assert_eq!(ask(&mut third, cmd::FLUSH, 0, 0), 0);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(ask(&mut third, cmd::FLUSH, 0, 0), 0, "the limit is for the option phase only");
}

/// Goal: exports come and go by the rules, and a failure leaves no trace. Method: every refusal, then the same
/// id and name again; safe and hard removal with a client; the node is free afterwards.
#[test]
fn exports_come_and_go() {
    let rig = Rig::null(ServerConfig::default());
    let text = |r: Result<(), Error>| r.unwrap_err().message;
    assert_eq!(text(rig.add("e", "n", "x", true)), "Block export id 'e' is already in use");
    assert_eq!(text(rig.add("e2", "n", "d", true)), "NBD server already has export named 'd'");
    assert_eq!(text(rig.add("e2", "zz", "x", true)), "Cannot find device='' nor node-name='zz'");
    assert!(text(rig.add("e2", "n", &"x".repeat(4097), true)).starts_with("export name 'xxx"));
    rig.add("e2", "n", "x", true).unwrap();
    assert_eq!(rig.exports.query().len(), 2);
    let (mut of_d, mut of_x) = (rig.client("d"), rig.client("x"));
    assert_eq!(rig.exports.remove("e2", RemoveMode::Safe).unwrap_err().message, "export 'e2' still in use");
    rig.exports.remove("e2", RemoveMode::Hard).unwrap();
    assert!(is_over(&mut of_x));
    rig.eventually("the event", || *rig.gone.lock().unwrap() == ["e2"]);
    assert_eq!(ask(&mut of_d, cmd::FLUSH, 0, 0), 0);
    rig.add("e2", "n", "x", false).unwrap();
    drop(rig.client("x"));
    drop(of_d);
    rig.eventually("no clients", || rig.server.connections() == 0);
    for id in ["e", "e2"] {
        rig.exports.remove(id, RemoveMode::Safe).unwrap();
    }
    rig.eventually("all events", || rig.gone.lock().unwrap().len() == 3);
    rig.engine.run(0, || Box::pin(async { Graph::current().del("n").await })).unwrap();
}

/// Goal: removal of an export with requests under way waits for them and loses none that were answered.
/// Method: a node with latency, a queue of writes, hard removal in the middle; the event comes after.
#[test]
fn removal_under_load() {
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 30, "latency-ns": 50_000_000});
    let rig = Rig::new(ServerConfig::default(), node);
    let mut s = rig.client("d");
    for i in 0..64 {
        let mut b = request(cmd::WRITE, 0, i, i * 4096, 4096);
        b.extend([1; 4096]);
        s.write_all(&b).unwrap();
    }
    std::thread::sleep(Duration::from_millis(10));
    rig.exports.remove("e", RemoveMode::Hard).unwrap();
    assert!(rig.exports.query()[0].shutting_down);
    rig.eventually("the event", || *rig.gone.lock().unwrap() == ["e"]);
    assert!(rig.exports.query().is_empty());
    assert_eq!(rig.server.connections(), 0);
}

/// Goal: clients of an export with an iothread go on where they were when they change cores. Method: the server
/// negotiates on core 0 alone, the export is tied to core 1; requests are sent in one piece with the option that
/// enters, so that they are received before the move. The export is then removed, and its iothread is free.
#[test]
fn clients_move_to_their_iothread() {
    let config = ServerConfig { cores: vec![0], ..ServerConfig::default() };
    let rig = Rig::new(config, json!({"driver": "file", "node-name": "n"}));
    let iothread = Arc::new(IoThread { id: "io1".into(), core: 1 });
    let tied = |id: &str, iothread| NbdExportOptions {
        id: id.into(),
        node_name: "n".into(),
        name: Some(id.into()),
        writable: true,
        iothread: Some(iothread),
        ..NbdExportOptions::default()
    };
    rig.add_with(tied("t", iothread.clone())).unwrap();
    let far = Arc::new(IoThread { id: "far".into(), core: 2 });
    assert_eq!(rig.add_with(tied("far", far)).unwrap_err().message, "Core 2 does not exist");
    for round in 0..20u8 {
        let mut s = rig.connect();
        s.read_exact(&mut [0; 18]).unwrap();
        let mut ask = vec![0, 0, 0, 3];
        ask.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x01t");
        ask.extend(request(cmd::WRITE, 0, 1, 4096, 5000));
        ask.extend([round; 5000]);
        s.write_all(&ask).unwrap();
        s.read_exact(&mut [0; 10]).unwrap();
        assert_eq!(reply(&mut s), (0, 1));
        s.write_all(&request(cmd::READ, 0, 2, 4096, 5000)).unwrap();
        assert_eq!(reply(&mut s), (0, 2));
        let mut data = [0; 5000];
        s.read_exact(&mut data).unwrap();
        assert_eq!(data, [round; 5000]);
    }
    assert!(Arc::strong_count(&iothread) > 1);
    let gone = || rig.gone.lock().unwrap().contains(&"t".to_owned());
    rig.exports.remove("t", RemoveMode::Hard).unwrap();
    rig.eventually("the removal", gone);
    assert_eq!(Arc::strong_count(&iothread), 1);
}
