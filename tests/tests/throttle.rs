//! Limits as users meet them: objects and nodes on the control pipe, clients that are held back.

use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::qmp::Qmp;
use ringblock_tests::{Cmd, Daemon, TestDir};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// A null disk `n` of 64 MiB below the throttle node `t` of the group `tg`, exported as `d`.
fn limited(dir: &TestDir, limits: &str) -> Daemon {
    Daemon::on(dir)
        .cores(2)
        .option("--object", &format!("throttle-group,id=tg,{limits}"))
        .blockdev("null-co,node-name=n,size=64M,read-zeroes=on")
        .blockdev("throttle,node-name=t,throttle-group=tg,file=n")
        .export("d", "t", true)
        .start()
}

fn limits(qmp: &mut Qmp, value: Value) {
    qmp.run("qom-set", json!({"path": "tg", "property": "limits", "value": value}));
}

/// The statistics of the throttle node `name`.
fn waiting(qmp: &mut Qmp, name: &str) -> Value {
    let all = qmp.run("query-blockstats", json!({"query-nodes": true}));
    let node =
        all.as_array().expect("a list").iter().find(|n| n["node-name"] == name).expect("the node").clone();
    node["throttle"].clone()
}

/// Goal: objects, properties and texts are the peer's. Method: the same commands to both, answers compared; what only one
/// of them has (weights) is left out.
#[test]
fn objects_are_the_peers() {
    let dir = TestDir::new("throttle-qmp");
    let (ours, peers) = (Daemon::on(&dir).start(), Daemon::peer(&dir).start());
    let (mut a, mut b) = (ours.qmp(), peers.qmp());
    let get = |property: &str| ("qom-get", json!({"path": "tg0", "property": property}));
    let set = |property: &str, value: Value| {
        ("qom-set", json!({"path": "tg0", "property": property, "value": value}))
    };
    let group = |id: &str, more: Value| {
        let mut all = json!({"qom-type": "throttle-group", "id": id});
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        ("object-add", all)
    };
    let script = [
        group(
            "tg0",
            json!({"limits": {"iops-total": 100, "iops-total-max": 300, "iops-total-max-length": 2}}),
        ),
        group("tg0", json!({})),
        group("tg1", json!({"x-bps-read": 1048576, "x-iops-write": 20, "x-iops-size": 4096})),
        group("tg2", json!({"limits": {"iops-total": 5, "iops-read": 3}})),
        group("tg2", json!({"limits": {"bps-total-max": 5}})),
        group("tg2", json!({"limits": {"bps-total": 5, "bps-total-max": 3}})),
        group("tg2", json!({"limits": {"bps-total": 5, "bps-total-max-length": 3}})),
        group("tg2", json!({"limits": {"bps-total": 5, "bps-total-max": 9, "bps-total-max-length": 0}})),
        group("tg2", json!({"limits": {"bps-total": 1000000000000001u64}})),
        group("tg2", json!({"limits": {"iops-size": 512}})),
        group("tg2", json!({"x-iops-total": -1})),
        get("limits"),
        get("x-iops-total"),
        get("nosuch"),
        set("x-iops-total", json!(3)),
        set("limits", json!({"iops-total": 50, "bps-read": 7})),
        get("limits"),
        set("limits", json!({"iops-read": 50})),
        set("limits", json!({"iops-nosuch": 50})),
        set("limits", json!(5)),
        set("nosuch", json!(5)),
        set("type", json!("x")),
        get("limits"),
        ("qom-set", json!({"path": "tg9", "property": "limits", "value": {}})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 1048576})),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "t", "throttle-group": "tg9", "file": "n"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "t", "throttle-group": "tg0", "file": "n"}),
        ),
        ("object-del", json!({"id": "tg0"})),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "throttle", "node-name": "t", "throttle-group": "tg9", "file": "n"}]}),
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "throttle", "node-name": "t", "throttle-group": "tg1", "file": "n"}]}),
        ),
        ("object-del", json!({"id": "tg1"})),
        ("object-del", json!({"id": "tg0"})),
        ("blockdev-del", json!({"node-name": "n"})),
        ("blockdev-del", json!({"node-name": "t"})),
        ("object-del", json!({"id": "tg1"})),
    ];
    for (command, arguments) in script {
        let answer = |q: &mut Qmp| q.execute(command, arguments.clone());
        assert_eq!(answer(&mut a), answer(&mut b), "{command} {arguments}");
    }
    let weight =
        json!({"driver": "throttle", "node-name": "t", "throttle-group": "x", "file": "n", "weight": 0});
    let refused = a.refuse("blockdev-add", weight);
    assert_eq!(refused.desc, "Parameter 'weight' is 0, but must be within [1, 10000]");
    // the peer takes one client at a time
    drop((a, b));
    ours.quit();
    peers.quit();
}

/// Goal: clients get the rate they are limited to, over one connection and four, in operations and bytes. Method: fio for
/// two seconds (`cargo xtask bench limits` takes ten, and many more limits); its count against the formula.
#[test]
fn rates_through_nbd() {
    let dir = TestDir::new("throttle-rate");
    let daemon = limited(&dir, "limits.iops-total=1000");
    let mut qmp = daemon.qmp();
    for (what, jobs, bs) in [("iops", 1, 4096), ("iops", 4, 4096), ("bps", 1, 65_536), ("bps", 4, 65_536)] {
        match what {
            "iops" => limits(&mut qmp, json!({"bps-total": 0, "iops-total": 400})),
            _ => limits(&mut qmp, json!({"iops-total": 0, "bps-total": 16 * MIB})),
        }
        let fio = Cmd::new("fio --name=l --ioengine=nbd --rw=randrw --iodepth=16 --time_based --runtime=2 --output-format=json --group_reporting --size=60m")
            .arg(format!("--uri={}", daemon.uri("d")))
            .arg(format!("--bs={bs}"))
            .arg(format!("--numjobs={jobs}"))
            .arg(format!("--output={}", dir.file("fio.json")));
        fio.ok();
        let text = std::fs::read_to_string(dir.file("fio.json")).expect("fio's output");
        let fio: Value = serde_json::from_str(&text).expect("JSON");
        let job = &fio["jobs"][0];
        let count = |side: &str| job[side]["total_ios"].as_f64().expect("a count");
        let time =
            ["read", "write"].iter().map(|s| job[s]["runtime"].as_f64().expect("ms")).fold(0.0, f64::max);
        let done = count("read") + count("write");
        let rate = if what == "iops" { 400.0 } else { 16.0 * MIB as f64 / f64::from(bs) };
        // a tenth of a second may be ahead
        let want = rate * (time / 1000.0 + 0.1);
        println!("{what}, {jobs} jobs: {done} of {want}");
        assert!(done <= want * 1.01 + 2.0, "{what}, {jobs} jobs: {done} of {want}");
        // what is missing is for the machine to answer for, so there is more room
        assert!(done >= want * 0.9, "{what}, {jobs} jobs: {done} of {want}");
    }
    let stats = waiting(&mut qmp, "t");
    let bins: i64 =
        stats["waits"]["bins"].as_array().expect("bins").iter().map(|b| b.as_i64().expect("a count")).sum();
    assert!(stats["group"] == "tg" && stats["weight"] == 100 && bins > 500, "{stats}");
    daemon.quit();
}

/// Goal: a client that pushes as fast as it can costs no memory, and hurts nobody. Method: megabytes of writes into a limit
/// of a few bytes a second; resident memory and another client on another node, timed.
#[test]
fn a_pushing_client_is_not_read() {
    let dir = TestDir::new("throttle-push");
    let daemon = Daemon::on(&dir)
        .cores(2)
        .option("--object", "throttle-group,id=tg,limits.bps-write=1000")
        .blockdev("null-co,node-name=n,size=1G,read-zeroes=on")
        .blockdev("throttle,node-name=t,throttle-group=tg,file=n")
        .blockdev("null-co,node-name=free,size=1M,read-zeroes=on")
        .export("d", "t", true)
        .export("free", "free", true)
        .start();
    let resident = || {
        let text = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it lives");
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a line").trim().to_owned();
        line.trim_end_matches(" kB").trim().parse::<u64>().expect("KiB")
    };
    let mut other = Nbd::connect(&daemon.nbd_socket(), "free").expect("connect");
    other.read(0, &mut [0; 4096]).expect("a read");
    let before = resident();
    let pushers: Vec<_> = (0..8)
        .map(|_| {
            let socket = daemon.nbd_socket();
            std::thread::spawn(move || {
                let mut client = Nbd::connect(&socket, "d").expect("connect");
                client.patience(Duration::from_secs(2)).expect("a limit");
                let data = vec![1; MIB as usize];
                let mut sent = 0;
                while sent < 32 && client.submit(nbd::WRITE, 0, sent * MIB, MIB as u32, &data).is_ok() {
                    sent += 1;
                }
                sent
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    for _ in 0..100 {
        other.read(0, &mut [0; 4096]).expect("a read");
    }
    assert!(start.elapsed() < Duration::from_secs(1), "the other client waited {:?}", start.elapsed());
    let sent: Vec<u64> = pushers.into_iter().map(|p| p.join().expect("no panic")).collect();
    let grown = resident().saturating_sub(before);
    println!("{sent:?} MiB taken, {grown} KiB grown");
    // one write of each may be on its way, and what sockets hold is the kernel's
    assert!(sent.iter().all(|s| *s <= 4) && grown < 16 * 1024, "{sent:?} MiB taken, {grown} KiB grown");
    daemon.quit();
}

/// Goal: what waits for a limit keeps nobody from stopping: neither the export, nor the server, nor the node. Method: writes
/// and reads held back for hours; a reopen, removal and the end, timed.
#[test]
fn nothing_waits_for_a_limit() {
    let dir = TestDir::new("throttle-stop");
    let daemon = limited(&dir, "limits.iops-total=1");
    let mut qmp = daemon.qmp();
    let mut clients: Vec<Nbd> =
        (0..3).map(|_| Nbd::connect(&daemon.nbd_socket(), "d").expect("connect")).collect();
    for client in &mut clients {
        for at in 0..20 {
            client.submit(nbd::READ, 0, at * 4096, 4096, &[]).expect("a request");
        }
        client.submit(nbd::WRITE, 0, 0, 4096, &[1; 4096]).expect("a request");
    }
    std::thread::sleep(Duration::from_millis(300));
    let stats = waiting(&mut qmp, "t");
    let reads = stats["rd-queue-length"].as_i64().expect("a length");
    assert!((55..=60).contains(&reads) && stats["wr-queue-length"].as_i64() >= Some(1), "{stats}");
    let start = Instant::now();
    // all roots are drained for it
    let same =
        json!({"driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": "n", "weight": 7});
    qmp.run("blockdev-reopen", json!({"options": [same]}));
    // one client leaves by itself: its requests leave the queue
    drop(clients.pop());
    std::thread::sleep(Duration::from_millis(100));
    let fewer = waiting(&mut qmp, "t")["rd-queue-length"].as_i64().expect("a length");
    assert!(fewer <= reads - 18, "{fewer} of {reads} still wait");
    qmp.run("block-export-del", json!({"id": "e-d", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.run("blockdev-del", json!({"node-name": "t"}));
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
    daemon.quit();
}

/// Goal: limits below a format hold too, and do not keep it from being drained. Method: a qcow2 image on a throttle node,
/// written over NBD; rate, a drain of everything under load, and the image afterwards.
#[test]
fn below_a_format() {
    let dir = TestDir::new("throttle-below");
    let image = dir.file("disk.qcow2");
    ringblock_tests::tools::qemu_img().line("create -q -f qcow2").args([&image, "64M"]).ok();
    let daemon = Daemon::on(&dir)
        .option("--object", "throttle-group,id=tg,limits.bps-write=4194304")
        .blockdev(&format!(
            "qcow2,node-name=q,file.driver=throttle,file.throttle-group=tg,file.file.driver=file,file.file.filename={image}"
        ))
        .export("d", "q", true)
        .start();
    let mut client = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    let start = Instant::now();
    for at in 0..8 {
        client.write(at * MIB, &[9; MIB as usize], 0).expect("a write");
    }
    let took = start.elapsed();
    assert!(took > Duration::from_millis(1500), "8 MiB at 4 MiB/s took {took:?}");
    let mut qmp = daemon.qmp();
    qmp.run("qom-set", json!({"path": "tg", "property": "limits", "value": {"bps-write": 1000}}));
    client.submit(nbd::WRITE, 0, 9 * MIB, MIB as u32, &[8; MIB as usize]).expect("a request");
    client.submit(nbd::WRITE, 0, 10 * MIB, MIB as u32, &[8; MIB as usize]).expect("a request");
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    qmp.run("blockdev-add", json!({"driver": "null-co", "node-name": "other"}));
    qmp.run(
        "blockdev-reopen",
        json!({"options": [{"driver": "null-co", "node-name": "other", "read-only": true}]}),
    );
    assert!(start.elapsed() < Duration::from_secs(2), "a drain waited {:?}", start.elapsed());
    daemon.quit();
    ringblock_tests::tools::qemu_img().line("check -q").arg(&image).ok();
}
