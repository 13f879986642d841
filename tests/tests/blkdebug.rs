//! The `blkdebug` filter: beside the peer's, and under our qcow2.
//!
//! Method common to all: where filter and request path alone decide, the same command lines run here and with the peer
//! ([`Twins`]) and must say and leave the same. Where qcow2 is between, the two write metadata at different moments; there
//! a fault must be reported, the image must pass the peer's check, and the same work must succeed once the fault is gone.

use ringblock_tests::tools::{self, is_product};
use ringblock_tests::{Daemon, Output, TestDir, Twins, for_all};
use serde_json::{Value, json};

/// Options of a node on `plain.raw`, for `--image-opts`.
fn on_raw(options: &str) -> String {
    format!("--image-opts driver=blkdebug,image.driver=file,image.filename=plain.raw,{options}")
}

fn raw_twins(name: &str) -> Twins {
    let twins = Twins::new(name);
    twins.qemu_img("create -q -f raw plain.raw 1M");
    twins.qemu_img("create -q -f qcow2 disk.qcow2 8M");
    twins.qemu_io("-f raw -c 'write -P 1 0 1M' plain.raw");
    twins.qemu_io("-c 'write -P 2 0 1M' disk.qcow2");
    twins
}

/// Goal: limits are checked as the peer does, with its words, and are kept to by splitting and by whole blocks.
#[test]
fn limits() {
    let mut twins = raw_twins("blkdebug-limits");
    for options in [
        "align=3",
        "align=0",
        "align=512",
        "align=4G",
        "align=512,max-transfer=1000",
        "align=512,opt-write-zero=513",
        "align=512,opt-write-zero=1024,max-write-zero=3000",
        "align=512,opt-discard=100",
        "align=512,max-discard=700",
        "max-discard=4G",
        "take-child-perms.0=write,take-child-perms.1=resize",
        "unshare-child-perms.0=write",
        "config=nofile",
    ] {
        twins.io(&format!("{} -c 'read -P 1 0 512'", on_raw(options)));
    }
    let small = on_raw("align=4096,max-transfer=4096");
    let large = on_raw("align=4096,opt-write-zero=16k,max-write-zero=32k,opt-discard=16k,max-discard=64k");
    for line in [
        format!("{small} -c 'write -P 3 0 64k' -c 'read -P 3 1 60000' -c 'write -P 4 100 9000'"),
        format!("{small} -c 'read -P 3 0 100' -c 'read -P 4 100 9000' -c 'read -P 3 9100 5000'"),
        format!("{small} -c 'write -P 6 8191 2' -c 'read -P 4 8190 1' -c 'read -P 6 8191 2'"),
        format!("{large} -c 'write -z 5000 200000' -c 'read -P 0 5000 200000' -c 'write -z 7 9'"),
        format!("{large} -c 'discard 300k 200k' -c 'read 0 1M' -c 'write -z -u 600001 100'"),
        "--image-opts driver=blkdebug -c 'read 0 512'".to_owned(),
    ] {
        twins.io(&line);
    }
    twins.same_disk("plain.raw", "raw");
    twins.finish();
}

/// Goal: rules with every key hit the requests that the peer's hit. Method: the same sequences with both.
#[test]
fn rules() {
    let mut twins = raw_twins("blkdebug-rules");
    let machine = "inject-error.0.event=none,inject-error.0.state=2,set-state.0.event=pwritev,set-state.0.new_state=2,\
                   inject-error.1.event=pwritev_done,inject-error.1.state=2";
    for (options, commands) in [
        (
            "inject-error.0.event=none,inject-error.0.once=on",
            "-c 'read 0 512' -c 'read 0 512' -c 'write 0 512'",
        ),
        ("inject-error.0.event=none,inject-error.0.errno=28", "-c 'read 0 512' -c 'write 0 512'"),
        (
            "inject-error.0.event=none,inject-error.0.errno=28,inject-error.0.immediately=on",
            "-c 'read 0 512' -c 'write 0 512'",
        ),
        ("inject-error.0.event=none,inject-error.0.errno=0", "-c 'read 0 512' -c 'write 0 512'"),
        ("inject-error.0.event=none,inject-error.0.iotype=block-status", "-c map -c 'alloc 0 512'"),
        (
            "inject-error.0.event=none,inject-error.0.iotype=write-zeroes",
            "-c 'write -z 0 4096' -c 'write 0 512' -c 'read 0 512'",
        ),
        ("inject-error.0.event=none,inject-error.0.iotype=discard", "-c 'discard 0 4096' -c 'write 0 512'"),
        ("inject-error.0.event=none,inject-error.0.iotype=read", "-c 'write 0 512' -c 'read 0 512'"),
        ("inject-error.0.event=none,inject-error.0.iotype=write", "-c 'write 0 512' -c 'read 0 512'"),
        (
            "inject-error.0.event=none,inject-error.0.sector=2",
            "-c 'read 0 1024' -c 'read 0 1025' -c 'read 1k 1' -c 'write 1k 512' -c 'discard 0 4k' \
             -c 'write -z 0 4k' -c 'write 2k 512' -c flush",
        ),
        (machine, "-c 'read 0 512' -c 'write 0 512' -c 'read 0 512' -c 'write 0 512' -c 'read 0 512'"),
        (
            "inject-error.0.event=pwritev_zero,inject-error.0.errno=28,inject-error.0.once=on",
            "-c 'write 0 512' -c 'write -z 0 512' -c 'write -z 0 512'",
        ),
    ] {
        twins.io(&format!("{} {commands}", on_raw(options)));
    }
    twins.same_disk("plain.raw", "raw");
    twins.finish();
}

/// Config files: what they hold, whether both must say the same, and what opens with them.
const CONFIGS: &[(&str, &str)] = &[
    ("once.conf", "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce = \"on\"\n"),
    (
        "machine.conf",
        "# from state 1 to 2 and back\n[set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n\n\
         [set-state]\nevent = \"write_aio\"\nstate = \"2\"\nnew_state = \"1\"\n\n\
         [inject-error]\nevent = \"read_aio\"\nstate = \"2\"\nerrno = \"28\"\niotype = \"read\"\n",
    ),
    ("event.conf", "[inject-error]\nevent = \"nope\"\n"),
    ("none.conf", "[inject-error]\nerrno = \"7\"\n"),
    ("number.conf", "[inject-error]\nevent = \"none\"\nerrno = \"abc\"\n"),
    ("bool.conf", "[inject-error]\nevent = \"none\"\nonce = \"maybe\"\n"),
    ("key.conf", "[inject-error]\nevent = \"none\"\nfoo = \"1\"\n"),
    ("group.conf", "[foo]\nevent = \"none\"\n"),
    ("bare.conf", "event = \"none\"\n"),
];

/// Goal: config files and the short names. Method: good and bad files, opened by name with both tools.
#[test]
fn config_files() {
    let mut twins = raw_twins("blkdebug-config");
    twins.both(|dir| {
        for (name, text) in CONFIGS {
            std::fs::write(dir.file(name), text).expect("write");
        }
    });
    for (name, _) in CONFIGS {
        twins.io(&format!(
            "-f raw -c 'read 0 512' -c 'read 0 512' -c 'write -P 1 0 512' -c 'read 0 512' -c 'write -P 1 0 512' \
             -c 'read 0 512' blkdebug:{name}:plain.raw"
        ));
    }
    for line in [
        "-f raw -c 'read -P 1 0 1M' blkdebug::plain.raw",
        "-c 'read -P 2 0 1M' -c length blkdebug::disk.qcow2",
        "-c 'read -P 2 0 1M' -c map blkdebug::blkdebug::disk.qcow2",
        "-c 'read 0 512' blkdebug:plain.raw",
        "-c 'read 0 512' blkdebug:nofile:disk.qcow2",
    ] {
        twins.io(line);
    }
    for line in [
        "check blkdebug::disk.qcow2",
        "map --output=json blkdebug::disk.qcow2",
        "compare blkdebug::disk.qcow2 disk.qcow2",
        "convert -O raw blkdebug::disk.qcow2 out.raw",
        "convert -O raw blkdebug:once.conf:disk.qcow2 out2.raw",
    ] {
        twins.img(line);
    }
    twins.same_disk("out.raw", "raw");
    twins.finish();
}

/// Goal: a request can be held up, waited for and let go. Method: the peer's outputs to the same commands.
#[test]
fn breakpoints() {
    let mut twins = raw_twins("blkdebug-break");
    for line in [
        "-f raw -c 'break read_aio A' -c 'aio_read 0 512' -c 'wait_break A' -c 'resume A' -c aio_flush blkdebug::plain.raw",
        "-f raw -c 'break write_aio A' -c 'aio_write -P 8 0 512' -c 'wait_break A' -c 'read -P 1 0 512' -c 'resume A' \
         -c aio_flush -c 'read -P 8 0 512' blkdebug::plain.raw",
        "-f raw -c 'break nope A' -c 'resume A' -c 'remove_break A' blkdebug::plain.raw",
        "-f raw -c 'break read_aio A' -c 'remove_break A' -c 'read 0 512' blkdebug::plain.raw",
        "-f raw -c 'break read_aio A' -c 'resume A' -c 'remove_break A' plain.raw",
        "-f raw -c break -c 'wait_break' -c 'help break' plain.raw",
        "--image-opts -c flush -c 'write 0 512' driver=blkdebug,image.driver=file,image.filename=plain.raw,inject-error.0.event=none,inject-error.0.iotype=flush",
    ] {
        twins.io(line);
    }
    twins.same_disk("plain.raw", "raw");
    twins.finish();
}

/// Goal: reads, block status, sizes, writes, zeroes and resizing work through a filter at any place. Method: on top of a chain,
/// between a format and its file, above another filter, below a backing edge; the peer's outputs to the same lines.
#[test]
fn at_any_place() {
    let mut twins = Twins::new("blkdebug-places");
    twins.qemu_img("create -q -f qcow2 base.qcow2 4M");
    twins.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 6M");
    twins.qemu_io("-c 'write -P 1 0 2M' base.qcow2");
    twins.qemu_io("-c 'write -P 2 1M 128k' -c 'write -z 3M 64k' top.qcow2");
    let file = |name: &str| format!("driver=file,F.filename={name}");
    let place = |text: &str, edge: &str, inner: &str| {
        // `F.` stands for the path of the innermost edge
        format!(
            "{text},{}",
            inner
                .split(',')
                .map(|o| format!("{edge}.{}", o.trim_start_matches("F.")))
                .collect::<Vec<_>>()
                .join(",")
        )
    };
    let top = place("driver=blkdebug,image.driver=qcow2", "image.file", &file("top.qcow2"));
    let between = place("driver=qcow2,file.driver=blkdebug,file.align=512", "file.image", &file("top.qcow2"));
    let twice = place(
        "driver=blkdebug,image.driver=blkdebug,image.image.driver=qcow2",
        "image.image.file",
        &file("top.qcow2"),
    );
    let window = place(
        "driver=raw,file.driver=blkdebug,file.image.driver=qcow2",
        "file.image.file",
        &file("top.qcow2"),
    );
    for options in [&top, &between, &twice, &window] {
        for commands in [
            "-c 'read -P 1 0 1M' -c 'read -P 2 1M 128k' -c 'read -P 0 3M 3M' -c length",
            "-c 'write -P 7 5M 10k' -c 'write -z -u 1M 64k' -c 'discard 1088k 64k' -c flush",
            "-c 'read -P 7 5M 10k' -c 'read -P 0 1M 64k'",
        ] {
            twins.io(&format!("--image-opts -d unmap {commands} {options}"));
        }
        twins.img(&format!("convert --image-opts -O raw {options} out.raw"));
        twins.same_disk("out.raw", "raw");
        twins.same_disk("top.qcow2", "qcow2");
    }
    for line in [
        format!("map --image-opts --output=json {between}"),
        format!("compare --image-opts {top} {between}"),
        format!("check --image-opts {between}"),
        format!("resize --image-opts {between} 8M"),
        format!("resize --image-opts {top} 9M"),
    ] {
        twins.img(&line);
    }
    twins.same_disk("top.qcow2", "qcow2");
    twins.finish();
}

/// Runs our tool on `disk.qcow2` with these rules below qcow2.
fn faulty(dir: &TestDir, rules: &Value, commands: &[&str]) -> Output {
    let mut file =
        json!({"driver": "blkdebug", "image": {"driver": "file", "filename": dir.file("disk.qcow2")}});
    for (key, value) in rules.as_object().expect("an object") {
        file[key] = value.clone();
    }
    let name = format!("json:{}", json!({"driver": "qcow2", "file": file}));
    io(commands, &name)
}

fn io(commands: &[&str], name: &str) -> Output {
    let with = commands.iter().flat_map(|c| ["-c", c]);
    tools::io().line("-d unmap -t writeback").args(with).arg(name).run()
}

/// A small image with data, compressed data, and data in the backing file only.
fn sample(name: &str, cluster: u32) -> TestDir {
    let dir = TestDir::new(name);
    let img = |line: &str| tools::qemu_img().dir(dir.path()).line(line).ok();
    img("create -q -f qcow2 -o cluster_size=4k base.qcow2 4M");
    tools::qemu_io().dir(dir.path()).args(["-c", "write -P 3 0 1M", "base.qcow2"]).ok();
    img(&format!(
        "create -q -f qcow2 -o cluster_size={cluster},refcount_bits=64 -b base.qcow2 -F qcow2 disk.qcow2 4M"
    ));
    let writes = ["-c", "write -P 1 2M 64k", "-c", "write -c -P 2 3M 4k", "disk.qcow2"];
    tools::qemu_io().dir(dir.path()).args(writes).ok();
    dir
}

/// What has to be said when a fault is met: the error in words.
const FAULTS: &[(&str, &str)] = &[
    ("l1_update", "Input/output error"),
    ("l1_grow_write_table", "Input/output error"),
    ("l1_grow_activate_table", "No space left on device"),
    ("l2_load", "Input/output error"),
    ("l2_update", "Input/output error"),
    ("l2_update", "No space left on device"),
    ("l2_alloc_write", "No space left on device"),
    ("l2_update_compressed", "Input/output error"),
    ("read_aio", "Input/output error"),
    ("read_compressed", "Input/output error"),
    ("write_aio", "No space left on device"),
    ("write_compressed", "Input/output error"),
    ("cow_read", "Input/output error"),
    ("cow_write", "No space left on device"),
    ("refblock_load", "Input/output error"),
    ("refblock_update", "No space left on device"),
    ("refblock_alloc", "No space left on device"),
    ("refblock_alloc_write", "Input/output error"),
    ("refblock_alloc_hookup", "Input/output error"),
    ("reftable_update", "No space left on device"),
    ("reftable_grow", "Input/output error"),
    ("refblock_alloc_write_blocks", "Input/output error"),
    ("refblock_alloc_write_table", "No space left on device"),
    ("refblock_alloc_switch_table", "Input/output error"),
    ("cluster_alloc", "No space left on device"),
    ("cluster_alloc_bytes", "Input/output error"),
    ("cluster_alloc_space", "No space left on device"),
    ("flush_to_os", "Input/output error"),
    ("flush_to_disk", "Input/output error"),
    ("pwritev", "No space left on device"),
    ("pwritev_done", "Input/output error"),
    ("l1_shrink_write_table", "Input/output error"),
];

/// Work that comes past every event above, and makes the disk longer and shorter.
const WORK: &[&str] = &[
    "read -P 1 2M 4k",
    "read -P 2 3M 4k",
    "write -P 5 1k 1k",
    "write -P 6 1M 900k",
    "flush",
    "discard 2M 64k",
    "flush",
    "write -z 10k 20k",
    "write -c -P 7 3500k 4k",
    "flush",
    "truncate 1G",
    "write -P 8 900M 9M",
    "flush",
    "truncate 2M",
    "flush",
    "truncate 4M",
];

/// Work that makes the refcount table grow where clusters have 512 bytes, and goes on.
const GROWING: &[&str] =
    &["write -P 9 1M 2900k", "flush", "write -P 9 1M 1M", "flush", "write -P 9 0 2k", "flush"];

/// Goal: an error that is met once, at any point of qcow2's update sequence, is reported; the image stays sound, nothing
/// flushed is lost, and the same work succeeds when it is done again. Method: [`FAULTS`] at [`WORK`].
#[test]
fn one_fault_at_each_event() {
    if !is_product("RINGBLOCK_IO") {
        return;
    }
    for_all(FAULTS, |(event, words)| {
        // with clusters of 512 bytes the refcount table has to grow
        let grows = matches!(*event, "reftable_grow" | "refblock_alloc_write_blocks")
            || matches!(*event, "refblock_alloc_write_table" | "refblock_alloc_switch_table");
        let work = if grows { GROWING } else { WORK };
        let dir = sample(&format!("fault-{event}-{}", &words[..2]), if grows { 512 } else { 4096 });
        let errno = if words.starts_with("No space") { 28 } else { 5 };
        let mut rule = json!({"event": event, "errno": errno, "once": true});
        if event.starts_with("l1_shrink") {
            // clusters are being freed meanwhile: a discard, which is advice, must not use the error up
            rule["iotype"] = json!("write");
        }
        let out = faulty(&dir, &json!({"inject-error": [rule]}), work);
        let said = format!("{}{}", out.stdout, out.stderr);
        assert!(out.code != 0 && said.contains(words), "{event}: no error\n{}", out.describe());
        let image = dir.file("disk.qcow2");
        let check = tools::qemu_img().line("check -q").arg(&image).run();
        // a failed flush may leave clusters that nobody uses
        assert!(check.code == 0 || check.code == 3, "{event}: {}", check.describe());
        let again =
            ["write -P 5 1k 1k", "write -P 6 1M 900k", "flush", "read -P 5 1k 1k", "read -P 6 1M 900k"];
        let again = io(&again, &image);
        assert_eq!(again.code, 0, "{event}: {}", again.describe());
        tools::io().args(["-c", "read -P 3 8k 1k", "-c", "read -P 3 4k 4k"]).arg(&image).ok();
        let check = tools::qemu_img().line("check -q").arg(&image).run();
        assert!(check.code == 0 || check.code == 3, "{event}: {}", check.describe());
    });
}

/// Goal: after a flush that failed no later one claims success (crash contract, G6), and a new open is sound.
#[test]
fn a_failed_flush_is_remembered() {
    if !is_product("RINGBLOCK_IO") {
        return;
    }
    let dir = sample("failed-flush", 4096);
    let rules = json!({"inject-error": [{"event": "none", "iotype": "flush", "once": true}]});
    let out = faulty(&dir, &rules, &["write -P 9 0 64k", "flush", "flush", "write -P 9 3M 64k"]);
    assert_eq!(out.stderr.matches("flush: Input/output error").count(), 2, "{}", out.describe());
    assert!(out.stdout.contains("write failed: Input/output error"), "{}", out.describe());
    let image = dir.file("disk.qcow2");
    assert_eq!(io(&["write -P 9 0 64k", "flush", "read -P 9 0 64k"], &image).code, 0);
}

/// Goal: a failed read of a block that is to be changed fails the write, which the peer lets pass with the block's rest
/// zeroed. Method: the read fails at the head and at the tail; the file must be as it was, and a retry works.
#[test]
fn a_failed_read_modify_write_changes_nothing() {
    if !is_product("RINGBLOCK_IO") {
        return;
    }
    for (event, at) in
        [("pwritev_rmw_head", "512 512"), ("pwritev_rmw_tail", "0 5000"), ("pwritev_rmw_head", "4000 9000")]
    {
        let dir = TestDir::new("rmw");
        let file = dir.file("plain.raw");
        std::fs::write(&file, vec![0xaa; 65536]).expect("write");
        let options = format!(
            "driver=raw,file.driver=blkdebug,file.align=4096,file.inject-error.0.event={event},\
             file.inject-error.0.iotype=read,file.inject-error.0.errno=5,file.inject-error.0.once=on,\
             file.image.driver=file,file.image.filename={file}"
        );
        let write = format!("write -P 0x11 {at}");
        let out = tools::io().args(["--image-opts", &options, "-c", &write]).run();
        assert_eq!(
            (out.code, out.stdout.as_str()),
            (1, "write failed: Input/output error\n"),
            "{event} {at}"
        );
        assert!(std::fs::read(&file).expect("read").iter().all(|b| *b == 0xaa), "{event} {at}: changed");
        let verify = format!("read -P 0x11 {at}");
        tools::io().args(["--image-opts", &options, "-c", &write, "-c", &write, "-c", &verify]).run();
        let bytes = std::fs::read(&file).expect("read");
        let (from, len) = at.split_once(' ').expect("two numbers");
        let (from, len): (usize, usize) = (from.parse().expect("from"), len.parse().expect("len"));
        let right = bytes
            .iter()
            .enumerate()
            .all(|(i, b)| *b == if (from..from + len).contains(&i) { 0x11 } else { 0xaa });
        assert!(right, "{event} {at}: the retry wrote something else");
    }
}

/// Goal: what a request found by its lookup is not reused while it is held up below qcow2 (I3, I4).
/// Method: a read hangs in front of its cluster; the cluster is freed, the change made durable, and other data written;
/// then the read goes on, and must not show the other data.
#[test]
fn a_request_held_up_keeps_its_cluster() {
    if !is_product("RINGBLOCK_IO") {
        return;
    }
    let dir = TestDir::new("held");
    let image = dir.file("disk.qcow2");
    tools::qemu_img().line("create -q -f qcow2 -o cluster_size=4k").args([&image, "4M"]).ok();
    tools::qemu_io().args(["-c", "write -P 1 0 4k", &image]).ok();
    let mut commands =
        vec!["break read_aio A", "aio_read -v 0 64", "wait_break A", "discard 0 4k", "flush", "sleep 50"];
    // more than is reserved ahead, so that freed clusters are looked for
    commands.extend(["write -P 9 64k 3500k", "flush", "write -P 9 4k 60k", "flush", "resume A", "aio_flush"]);
    let out = faulty(&dir, &json!({}), &commands);
    assert_eq!(out.code, 0, "{}", out.describe());
    assert!(!out.stdout.contains("09 09 09 09"), "another's data: {}", out.describe());
    assert!(out.stdout.contains("01 01 01 01") || out.stdout.contains("00 00 00 00"), "{}", out.describe());
    ringblock_tests::images::check_clean(&image);
}

/// What is asked of a daemon with a blkdebug node, in order.
fn dialogue(image: &str) -> Vec<(&'static str, Value)> {
    let file = json!({"driver": "file", "filename": image, "node-name": "f"});
    let node = |more: Value| {
        let mut node = json!({"driver": "blkdebug", "node-name": "d", "image": file});
        for (key, value) in more.as_object().expect("an object") {
            node[key] = value.clone();
        }
        node
    };
    let reopen = |more| json!({"options": [node(more)]});
    let rule = json!([{"event": "none", "errno": 28, "once": true}]);
    vec![
        ("blockdev-add", node(json!({"inject-error": [{"event": "nope"}]}))),
        ("blockdev-add", node(json!({"inject-error": [{"errno": 5}]}))),
        ("blockdev-add", node(json!({"inject-error": [{"event": "none", "iotype": "x"}]}))),
        ("blockdev-add", node(json!({"inject-error": [{"event": "none", "foo": 1}]}))),
        ("blockdev-add", node(json!({"inject-error": [{"event": "none", "errno": "5"}]}))),
        ("blockdev-add", node(json!({"inject-error": 5}))),
        ("blockdev-add", node(json!({"set-state": [{"event": "none"}]}))),
        ("blockdev-add", node(json!({"align": 3}))),
        ("blockdev-add", node(json!({"config": "/nonexistent/file"}))),
        ("blockdev-add", node(json!({}))),
        ("blockdev-add", node(json!({}))),
        ("blockdev-reopen", reopen(json!({"align": 512}))),
        ("blockdev-reopen", reopen(json!({"inject-error": [{"event": "none"}]}))),
        ("blockdev-reopen", reopen(json!({"read-only": true}))),
        ("blockdev-reopen", json!({"options": [{"driver": "blkdebug", "node-name": "d", "image": "f"}]})),
        ("blockdev-del", json!({"node-name": "d"})),
        ("blockdev-add", node(json!({"align": 4096, "inject-error": rule}))),
        (
            "blockdev-reopen",
            reopen(
                json!({"align": 4096, "inject-error": rule, "set-state": [{"event": "none", "new_state": 2}]}),
            ),
        ),
        ("blockdev-del", json!({"node-name": "d"})),
        (
            "blockdev-add",
            node(json!({"take-child-perms": ["write", "resize"], "unshare-child-perms": ["write"]})),
        ),
        (
            "blockdev-add",
            json!({"driver": "blkdebug", "node-name": "e", "image": "f", "take-child-perms": ["write"]}),
        ),
        ("blockdev-del", json!({"node-name": "d"})),
    ]
}

/// Goal: adding, reopening and removing a node by QMP. Method: the same dialogue with both daemons; the same answers.
#[test]
fn the_same_answers_as_the_peer() {
    let mut said = Vec::new();
    for start in [Daemon::on as fn(&TestDir) -> _, Daemon::peer] {
        let dir = TestDir::new("blkdebug-qmp");
        std::fs::write(dir.file("plain.raw"), vec![0; 65536]).expect("write");
        let daemon = start(&dir).start();
        let mut qmp = daemon.qmp();
        let asked = dialogue(&dir.file("plain.raw"));
        let answers: Vec<String> =
            asked.iter().map(|(command, with)| format!("{:?}", qmp.execute(command, with.clone()))).collect();
        qmp.run(
            "blockdev-add",
            json!({"driver": "blkdebug", "node-name": "d",
            "image": {"driver": "file", "filename": dir.file("plain.raw")}}),
        );
        let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
        let d = nodes.as_array().and_then(|n| n.iter().find(|n| n["node-name"] == "d")).expect("the node");
        assert_eq!(d["file"], format!("blkdebug::{}", dir.file("plain.raw")));
        qmp.run("blockdev-del", json!({"node-name": "d"}));
        drop(qmp);
        daemon.quit();
        said.push((asked, answers));
    }
    let (asked, ours) = &said[0];
    let mut wrong = String::new();
    for (n, (command, with)) in asked.iter().enumerate() {
        if ours[n] != said[1].1[n] {
            wrong += &format!("to {command} {with}\n  ours {}\n  peer {}\n", ours[n], said[1].1[n]);
        }
    }
    assert!(wrong.is_empty(), "different answers:\n{wrong}");
}
