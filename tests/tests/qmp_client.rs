//! The control pipe under other people's client and beside the peer's answers.

use ringblock_tests::qmp::Qmp;
use ringblock_tests::tools;
use ringblock_tests::{Daemon, TestDir, workspace_file};
use serde_json::{Value, json};

/// Goal: the `qemu.qmp` client drives add, export, query, delete; errors are all-or-nothing.
/// Method: a script that checks each answer; afterwards the image is sound and the daemon ends cleanly.
#[test]
fn the_python_client_drives_the_daemon() {
    let dir = TestDir::new("qmp");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "8M"]).ok();
    let daemon = Daemon::on(&dir).start();
    let script = workspace_file("tests/py/qmp_drive.py");
    let out = tools::qmp_python()
        .args([&script, &daemon.qmp_socket(), &daemon.nbd_socket(), &image])
        .timeout(std::time::Duration::from_secs(60))
        .ok();
    assert_eq!(out.stdout, "driven\n");
    daemon.quit();
    ringblock_tests::images::check_clean(&image);
}

/// Messages and the peer's answers to them, in order; `DIR` stands for the test's directory.
const DIALOGUE: &[&str] = &[
    r#"{"execute": "qmp_capabilities"}"#,
    r#"{"execute": "nosuch"}"#,
    r#"{"execute": "query-version", "arguments": {"x": 1}}"#,
    r#"{"execute": 5}"#,
    r#"{"arguments": {}}"#,
    r#"{"execute": "query-block", "foo": 1}"#,
    r#"{"execute": "query-block", "id": {"a": [1, "two", null]}}"#,
    r#"{"execute": "query-block", "arguments": []}"#,
    r#"[]"#,
    r#"{'execute': 'query-block', 'id': 'single'}"#,
    r#"{"exec-oob": "query-block"}"#,
    r#"{"execute": "query-block-exports", "id": 7}"#,
    r#"{"execute": "blockdev-add"}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "nope", "node-name": "n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": "x"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576, "foo": 1}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576, "read-zeroes": 1}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n", "size": 1048576}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "/nonexistent/file"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "nosuch"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "r", "file": "n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "DIR/disk.raw", "cache": {"direct": 1}}}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "discard": "maybe", "file": "n"}}"#,
    r#"{"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": "n", "offset": 4096, "size": 8192}}"#,
    r#"{"execute": "blockdev-del", "arguments": {"node-name": "zz"}}"#,
    r#"{"execute": "blockdev-del", "arguments": {"node-name": "n"}}"#,
    r#"{"execute": "blockdev-del", "arguments": {}}"#,
    r#"{"execute": "block_resize", "arguments": {"size": 5}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "zz", "size": 512}}"#,
    r#"{"execute": "block_resize", "arguments": {"node-name": "n", "size": -1}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "r", "name": "x"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "r", "name": "x"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f", "node-name": "r", "name": "x"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nosuch", "id": "f", "node-name": "r"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "!", "node-name": "r"}}"#,
    r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "f"}}"#,
    r#"{"execute": "query-block-exports"}"#,
    r#"{"execute": "blockdev-del", "arguments": {"node-name": "r"}}"#,
    r#"{"execute": "block-export-del", "arguments": {"id": "nosuch"}}"#,
    r#"{"execute": "block-export-del", "arguments": {"id": "e", "mode": "later"}}"#,
    r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "DIR/other"}}}}"#,
    r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "pigeon", "data": {}}}}"#,
    r#"{"execute": "nbd-server-add", "arguments": {"device": "zz"}}"#,
    r#"{"execute": "nbd-server-remove", "arguments": {"name": "zz"}}"#,
    r#"{"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "zz", "file": "n"}]}}"#,
    r#"{"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "r", "file": "n"}]}}"#,
    r#"{"execute": "qmp_capabilities"}"#,
    r#"{"execute": "query-block", "id": "last"}"#,
];

/// Holds the dialogue; returns each answer without the parts that name the program.
fn answers(dir: &TestDir, socket: &str) -> Vec<Value> {
    let (mut qmp, _) = Qmp::raw(socket);
    let mut answers = Vec::new();
    for line in DIALOGUE {
        qmp.send(&format!("{}\n", line.replace("DIR", &dir.path().to_string_lossy())));
        let text = qmp.reply().to_string().replace(&*dir.path().to_string_lossy(), "DIR");
        answers.push(serde_json::from_str(&text).expect("still JSON"));
    }
    answers
}

/// Goal: to the same messages the same answers, error classes and texts included.
/// Method: one dialogue with each daemon, compared message by message; all differences are shown.
#[test]
fn the_same_answers_as_the_peer() {
    let mut said = Vec::new();
    for start in [Daemon::on as fn(&TestDir) -> _, Daemon::peer] {
        let dir = TestDir::new("dialogue");
        std::fs::write(dir.file("disk.raw"), vec![0; 65536]).expect("write");
        let daemon = start(&dir).start();
        said.push(answers(&dir, &daemon.qmp_socket()));
        daemon.quit();
    }
    let mut wrong = String::new();
    for (n, line) in DIALOGUE.iter().enumerate() {
        if said[0][n] != said[1][n] {
            wrong += &format!("to  {line}\n  ours {}\n  peer {}\n", said[0][n], said[1][n]);
        }
    }
    assert!(wrong.is_empty(), "different answers:\n{wrong}");
}

/// Goal: an empty reopen is answered (it aborts qemu-storage-daemon 10.0.2). Method: send it, then ask on.
#[test]
fn an_empty_reopen_is_survived() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("reopen");
    let daemon = Daemon::on(&dir).start();
    let mut qmp = daemon.qmp();
    let _ = qmp.execute("blockdev-reopen", json!({"options": []}));
    qmp.run("query-version", json!({}));
    drop(qmp);
    daemon.quit();
}

/// Goal: garbage on the pipe is answered, never fatal; other clients do not notice; several may be there.
/// Method: broken messages on one connection, commands on another.
#[test]
fn garbage_is_survived() {
    let dir = TestDir::new("garbage");
    // The peer's socket takes one client at a time, so the second has a monitor of its own.
    let second = dir.file("second.qmp");
    let daemon = Daemon::on(&dir)
        .option("--chardev", &format!("socket,id=two,path={second},server=on,wait=off"))
        .option("--monitor", "chardev=two")
        .start();
    let (mut bad, _) = Qmp::raw(&daemon.qmp_socket());
    let mut good = Qmp::connect(&second);
    for garbage in
        ["garbage\n", "{\"execute\": \n}", "\u{1}", "}}}", "[1, 2]", "{'a': \"\\ud800\"}\n", "\"\n"]
    {
        bad.send(garbage);
        good.run("query-version", json!({}));
    }
    bad.send("\u{1}\n{\"execute\": \"qmp_capabilities\", \"id\": \"sane\"}\n");
    while bad.reply().get("id") != Some(&json!("sane")) {}
    bad.send("{\"execute\": \"query-block\", \"id\": 2}\n");
    assert_eq!(bad.reply(), json!({"return": [], "id": 2}));
    // Deep nesting and a message without an end must not take the process along.
    bad.send(&"[".repeat(5000));
    good.run("query-version", json!({}));
    drop(bad);
    drop(good);
    daemon.quit();
}

/// Goal: several clients at once on one socket, each with every event. Method: two connections, a deleted
/// export; ours only, for the peer's socket takes one client at a time.
#[test]
fn several_clients_on_one_socket() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("clients");
    let daemon =
        Daemon::on(&dir).blockdev("driver=null-co,node-name=n,size=1048576").export("d", "n", true).start();
    let (mut one, mut two) = (daemon.qmp(), daemon.qmp());
    one.run("block-export-del", json!({"id": "e-d"}));
    for client in [&mut one, &mut two] {
        assert_eq!(client.event("BLOCK_EXPORT_DELETED"), json!({"id": "e-d"}));
    }
    drop(one);
    two.run("query-version", json!({}));
    drop(two);
    daemon.quit();
}

/// Goal: before negotiation only negotiation works. Method: a command at once, the class and text compared.
#[test]
fn negotiation_comes_first() {
    let dir = TestDir::new("nego");
    let daemon = Daemon::on(&dir).start();
    let (mut qmp, greeting) = Qmp::raw(&daemon.qmp_socket());
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    qmp.send("{\"execute\": \"query-block\"}\n");
    let reply = qmp.reply();
    assert_eq!(reply["error"]["class"], "CommandNotFound", "{reply}");
    let desc = reply["error"]["desc"].as_str().unwrap_or_default();
    assert!(desc.contains("Expecting capabilities negotiation with 'qmp_capabilities'"), "{reply}");
    drop(qmp);
    daemon.quit();
}

/// Goal: both ways to end leave nothing behind. Method: SIGTERM and quit; the sockets and the pid file are
/// gone, the image is sound, written data is there.
#[test]
fn a_clean_end() {
    for terminate in [true, false] {
        let dir = TestDir::new("end");
        let image = dir.file("disk.qcow2");
        tools::qemu_img().line("create -q -f qcow2 -o lazy_refcounts=on").args([&image, "8M"]).ok();
        let daemon = Daemon::serving(&dir, "qcow2", &image).start();
        let uri = daemon.uri("d");
        let mut client = ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
        client.write(0, &[5; 65536], 0).expect("write");
        if terminate {
            daemon.terminate()
        } else {
            daemon.quit()
        }
        ringblock_tests::images::check_clean(&image);
        tools::qemu_io().line("-r -f qcow2 -c").args(["read -P 5 0 64k", &image]).ok();
        let left: Vec<String> = std::fs::read_dir(dir.path())
            .expect("the folder is there")
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            // The peer leaves the NBD socket.
            .filter(|name| tools::is_product("RINGBLOCK_SERVE") || !name.ends_with(".nbd"))
            .filter(|name| [".pid", ".nbd", ".qmp"].iter().any(|end| name.ends_with(end)))
            .collect();
        assert!(left.is_empty(), "left behind: {left:?} ({uri})");
    }
}
