//! Other people's NBD clients, and what they say about our server compared with the peer's.
//!
//! Method common to all: the same image is served by both daemons, one after the other or side by side for
//! reading; what nbdinfo, libnbd, qemu-img, nbdcopy and nbdkit report of the two must be the same.

use ringblock_tests::images::{Base, Content, Recipe, check_clean, run_io};
use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{Daemon, Rng, TestDir, workspace_file};
use serde_json::{Value, json};

/// A disk with data, zeroes and holes in three layers; returns its path.
fn layered(dir: &TestDir, content: &mut Content) -> String {
    let recipe = Recipe { name: "top", options: "cluster_size=65536", base: Base::Chain(2) };
    let image = recipe.make(dir, tools::qemu_img, content);
    run_io(tools::qemu_io, dir, &image, &content.steps(&mut Rng::new(11), 12));
    image
}

fn reader(start: ringblock_tests::daemon::Start, image: &str) -> Daemon {
    start
        .blockdev(&format!("driver=qcow2,node-name=q,read-only=on,file.driver=file,file.filename={image}"))
        .option(
            "--export",
            "type=nbd,id=e0,node-name=q,name=d,allocation-depth=on,description=a disk of tests",
        )
        .option("--export", "type=nbd,id=e1,node-name=q,name=")
        .start()
}

/// nbdinfo's report without what names the socket.
fn report(uri: &str) -> Value {
    let mut report = Cmd::new("nbdinfo --json").arg(uri).ok().json();
    for export in report["exports"].as_array_mut().expect("exports") {
        export.as_object_mut().expect("an object").remove("uri");
    }
    report
}

/// nbdinfo's map, adjacent equal entries merged: a server may split its answers where it likes.
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let mut merged: Vec<(u64, u64, u64)> = Vec::new();
    let map = Cmd::new("nbdinfo --json").arg(format!("--map={context}")).arg(uri).ok().json();
    for entry in map.as_array().expect("a list") {
        let field = |name: &str| entry[name].as_u64().expect("a number");
        let (offset, length, kind) = (field("offset"), field("length"), field("type"));
        match merged.last_mut() {
            Some(last) if last.2 == kind && last.0 + last.1 == offset => last.1 += length,
            _ => merged.push((offset, length, kind)),
        }
    }
    merged
}

/// Goal: size, flags, contexts, block sizes, descriptions and block status are the peer's.
/// Method: both serve the same layered image for reading at once; nbdinfo looks at each.
#[test]
fn nbdinfo_sees_the_same() {
    let dir = TestDir::new("nbdinfo");
    let image = layered(&dir, &mut Content::new(8 << 20));
    let (ours, theirs) = (reader(Daemon::on(&dir), &image), reader(Daemon::peer(&dir), &image));
    for name in ["d", ""] {
        assert_eq!(report(&ours.uri(name)), report(&theirs.uri(name)), "export {name:?}");
        let base = "base:allocation";
        assert_eq!(map(&ours.uri(name), base), map(&theirs.uri(name), base), "export {name:?}");
    }
    let depth = "qemu:allocation-depth";
    assert_eq!(map(&ours.uri("d"), depth), map(&theirs.uri("d"), depth));
    let list = |d: &Daemon| {
        let out = Cmd::new("nbdinfo --list --json").arg(d.uri("")).ok().json();
        let mut names: Vec<String> = out["exports"]
            .as_array()
            .expect("exports")
            .iter()
            .map(|e| e["export-name"].to_string())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(&ours), list(&theirs));
    let unknown = Cmd::new("nbdinfo").arg(ours.uri("nosuch")).run();
    assert_ne!(unknown.code, 0, "an unknown export is refused: {}", unknown.describe());
    ours.quit();
    theirs.quit();
}

/// Goal: a writable export behaves like the peer's to libnbd: flags, status after each change, errors at the
/// edges, structured reads, many requests in flight. Method: one script against each, outputs compared.
#[test]
fn libnbd_meets_the_same_behaviour() {
    let script = workspace_file("tests/py/nbd_behaviour.py");
    for (driver, options) in [("qcow2", "cluster_size=65536"), ("raw", "size=8388608")] {
        let mut said = Vec::new();
        for start in [Daemon::on as fn(&TestDir) -> _, Daemon::peer] {
            let dir = TestDir::new("libnbd");
            let image = dir.file("disk");
            tools::qemu_img().line("create -q -f").args([driver, "-o", options, &image, "8M"]).run();
            if driver == "raw" {
                tools::qemu_img().line("create -q -f raw").args([&image, "8M"]).ok();
            }
            let daemon = start(&dir).image(driver, &image).export("d", "q", true).start();
            let out = Cmd::new("/usr/bin/python3").args([&script, &daemon.uri("d")]).ok();
            said.push(out.stdout);
            daemon.quit();
            if driver == "qcow2" {
                check_clean(&image);
            }
        }
        assert_eq!(said[0], said[1], "ours above, the peer's below ({driver})");
    }
}

/// Goal: a read-only export refuses changes and says so in its flags.
#[test]
fn a_read_only_export_refuses_writes() {
    let dir = TestDir::new("readonly");
    let image = layered(&dir, &mut Content::new(8 << 20));
    let daemon = reader(Daemon::on(&dir), &image);
    let mut client = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    assert_ne!(client.flags & nbd::HAS_READ_ONLY, 0, "flags {:#x}", client.flags);
    let refused = |result: std::io::Result<()>| {
        let error = result.expect_err("a read-only export must not be changed");
        // NBD_EPERM by the protocol; the peer says NBD_EINVAL.
        assert!(matches!(error.raw_os_error(), Some(1 | 22)), "{error}");
    };
    refused(client.write(0, &[1; 512], 0));
    refused(client.zero(0, 512, 0));
    refused(client.trim(0, 512));
    client.read(0, &mut [0; 512]).expect("the connection lives on");
    daemon.quit();
}

/// Goal: qemu's tools read through our server what they read from the image. Method: map, compare, convert
/// and info over NBD; its client asks for extended headers, so this is also their test.
#[test]
fn qemu_tools_as_clients() {
    let dir = TestDir::new("qemuclient");
    let mut content = Content::new(8 << 20);
    let image = layered(&dir, &mut content);
    let (ours, theirs) = (reader(Daemon::on(&dir), &image), reader(Daemon::peer(&dir), &image));
    let map = |d: &Daemon| tools::qemu_img().line("map --output=json -f raw").arg(d.uri("d")).ok().json();
    assert_eq!(map(&ours), map(&theirs));
    let size = |d: &Daemon| {
        let info = tools::qemu_img().line("info --output=json -f raw").arg(d.uri("d")).ok().json();
        info["virtual-size"].clone()
    };
    assert_eq!(size(&ours), json!(8 << 20));
    content.save(&dir.file("content.raw"));
    tools::qemu_img().line("compare -f raw -F raw").args([&ours.uri("d"), &dir.file("content.raw")]).ok();
    tools::qemu_img().line("convert -f raw -O raw").args([&ours.uri("d"), &dir.file("copy.raw")]).ok();
    content.expect_raw(&dir.file("copy.raw"), "qemu-img convert from our server");
    ours.quit();
    theirs.quit();
}

/// Goal: requests of more than 4 GiB work (extended headers, 64-bit lengths). Method: qemu-io zeroes and
/// unmaps most of a 9 GiB disk over NBD with one command each.
#[test]
fn requests_beyond_four_gibibytes() {
    let dir = TestDir::new("huge");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "9G"]).ok();
    tools::qemu_io().line("-f qcow2 -c").args(["write -P 5 6G 1M", &image]).ok();
    let daemon = Daemon::serving(&dir, "qcow2", &image).start();
    let uri = daemon.uri("d");
    let io = |command: &str| tools::qemu_io().line("-f raw -d unmap -c").args([command, &uri]).ok();
    io("read -P 5 6G 1M");
    io("write -z -n 1G 7G");
    io("read -P 0 6G 1M");
    io("write -P 6 8G 1M");
    io("write -z -n -u 2G 7G");
    io("read -P 0 8G 1M");
    let map = tools::qemu_img().line("map --output=json -f raw").arg(&uri).ok().json();
    assert!(map.as_array().expect("a list").iter().all(|e| e["zero"] == true), "{map}");
    daemon.quit();
    check_clean(&image);
}

/// Goal: nbdcopy with several connections, and nbdkit as a proxy, carry a disk in and out unharmed.
#[test]
fn nbdcopy_and_nbdkit() {
    let dir = TestDir::new("nbdcopy");
    let mut content = Content::new(16 << 20);
    content.steps(&mut Rng::new(1), 60);
    content.save(&dir.file("in.raw"));
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "16M"]).ok();
    let daemon = Daemon::serving(&dir, "qcow2", &image).cores(2).start();
    let uri = daemon.uri("d");
    Cmd::new("nbdcopy --connections=4 --flush").args([&dir.file("in.raw"), &uri]).ok();
    Cmd::new("nbdcopy --connections=4").args([&uri, &dir.file("out.raw")]).ok();
    content.expect_raw(&dir.file("out.raw"), "there and back with nbdcopy");
    let run = format!("nbdcopy \"$uri\" {}", dir.file("proxy.raw"));
    Cmd::new("nbdkit -U - nbd").arg(format!("uri={uri}")).args(["--run", &run]).ok();
    content.expect_raw(&dir.file("proxy.raw"), "through nbdkit");
    daemon.quit();
    check_clean(&image);
}

/// Goal: TCP serves like a unix socket. Method: the control pipe moves the server to a free port.
#[test]
fn over_tcp() {
    let dir = TestDir::new("tcp");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "4M"]).ok();
    let daemon = Daemon::on(&dir).image("qcow2", &image).start();
    let port = ringblock_tests::free_port();
    let mut qmp = daemon.qmp();
    qmp.run("nbd-server-stop", json!({}));
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": port.to_string()}});
    qmp.run("nbd-server-start", json!({ "addr": addr }));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "q", "name": "d", "writable": true}),
    );
    let uri = format!("nbd://127.0.0.1:{port}/d");
    assert_eq!(Cmd::new("nbdinfo --size").arg(&uri).ok().stdout.trim(), "4194304");
    tools::qemu_io().line("-f raw -c").args(["write -P 9 0 1M", "-c", "read -P 9 0 1M", &uri]).ok();
    drop(qmp);
    daemon.quit();
    check_clean(&image);
}

/// Goal: `max-connections` holds, and a connection that ends makes room.
#[test]
fn the_number_of_connections_is_bounded() {
    let dir = TestDir::new("maxconn");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "4M"]).ok();
    let daemon = Daemon::on(&dir).image("qcow2", &image).start();
    let mut qmp = daemon.qmp();
    qmp.run("nbd-server-stop", json!({}));
    let addr = json!({"type": "unix", "data": {"path": dir.file("two.sock")}});
    qmp.run("nbd-server-start", json!({ "addr": addr, "max-connections": 2 }));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "q", "name": "d", "writable": true}),
    );
    let connect = || Nbd::connect(&dir.file("two.sock"), "d");
    let first = connect().expect("the first connection");
    let _second = connect().expect("the second connection");
    // A third waits in the socket's queue, or is turned away; it must not be served.
    let (path, started) = (dir.file("two.sock"), std::time::Instant::now());
    let third = std::thread::spawn(move || (Nbd::connect(&path, "d").is_ok(), std::time::Instant::now()));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let freed = std::time::Instant::now();
    first.close();
    let (served, when) = third.join().expect("no panic");
    assert!(!served || when > freed, "a third was served after {:?}", when - started);
    std::thread::sleep(std::time::Duration::from_millis(100));
    connect().expect("room again");
    drop(qmp);
    daemon.quit();
}
