//! Images of every feature combination, both ways with the peer.
//!
//! Method common to all: content is decided here, byte by byte; one program makes and fills the image, the
//! other reads it, writes to it and hands it back; after every change of hands the peer's check must find
//! nothing, and a plain copy made by each program must equal the content.

use ringblock_tests::images::{self, Base, Content, RECIPES, Recipe, check_clean, run_io, run_io_on};
use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{Daemon, Rng, TestDir, for_all};

/// Not a multiple of any larger cluster, so that the last cluster is cut short.
const SIZE: u64 = 5 * 1024 * 1024 + 3 * 512;

/// Both programs of one side.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    img: fn() -> Cmd,
    io: fn() -> Cmd,
}

const OURS: Side = Side { name: "ours", img: tools::img, io: tools::io };
const PEER: Side = Side { name: "peer", img: tools::qemu_img, io: tools::qemu_io };

/// Fails unless `side` reads `content` from the image (named by `spec`, an option string), and reports it sound.
fn expect(side: Side, dir: &TestDir, spec: &str, content: &Content, when: &str) {
    let what = format!("{} reads {spec}, {when}", side.name);
    let raw = dir.file(&format!("copy-{}.raw", side.name));
    (side.img)().line("convert -O raw --image-opts").args([spec, &raw]).ok();
    content.expect_raw(&raw, &what);
    let reference = dir.file("reference.raw");
    content.save(&reference);
    let reference = format!("driver=raw,file.driver=file,file.filename={reference}");
    let same = (side.img)().line("compare --image-opts").args([spec, &reference]).ok();
    assert_eq!(same.stdout, "Images are identical.\n", "{what}");
    (side.img)().line("check --image-opts").arg(spec).ok();
}

/// `first` makes and fills the image, `second` reads and writes it, `first` reads and writes it again.
fn both_hands(recipe: &Recipe, first: Side, second: Side) {
    let dir = TestDir::new(recipe.name);
    let mut content = Content::new(SIZE);
    let mut rng = Rng::new(20 + recipe.name.len() as u64);
    let image = recipe.make(&dir, first.img, &mut content);
    let spec = recipe.spec(&dir, &image);
    expect(second, &dir, &spec, &content, "fresh");
    for (n, side) in [first, second, first].into_iter().enumerate() {
        run_io_on(side.io, &dir, &["--image-opts", &spec], &content.steps(&mut rng, 24));
        check_clean(&image);
        let when = format!("after writes by {} (step {n})", side.name);
        expect(OURS, &dir, &spec, &content, &when);
        expect(PEER, &dir, &spec, &content, &when);
    }
    if recipe.base == Base::DataFile(true) {
        // The file itself may be longer, up to a whole cluster.
        let mut data = std::fs::read(recipe.data_file(&dir)).expect("the data file can be read");
        let rest = data.split_off(data.len().min(SIZE as usize));
        content.expect_bytes(&data, "the raw data file itself");
        assert!(
            rest.len() < 4096 && rest.iter().all(|&b| b == 0),
            "{} bytes beyond the disk's end",
            rest.len()
        );
    }
}

/// Goal: images that the peer makes in every combination are read and written by us, to its satisfaction.
#[test]
fn made_by_the_peer() {
    for_all(RECIPES, |recipe| both_hands(recipe, PEER, OURS));
}

/// Goal: images that we make in every combination are read and written by the peer.
#[test]
fn made_by_us() {
    for_all(RECIPES, |recipe| both_hands(recipe, OURS, PEER));
}

/// Goal: compressed clusters are read, and overwritten in part, without harm to their neighbours.
/// Method: the peer compresses with both algorithms and several cluster sizes; we read, write, it checks.
#[test]
fn compressed_by_the_peer() {
    let variants = [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=4096",
        "compression_type=zstd,cluster_size=2097152",
        "compression_type=zlib,compat=0.10",
        "compression_type=zlib,cluster_size=512,refcount_bits=64",
        "compression_type=zstd,extended_l2=on",
    ];
    for_all(&variants, |options| {
        let dir = TestDir::new("compressed");
        let mut rng = Rng::new(5);
        let mut content = Content::new(SIZE);
        content.steps(&mut rng, 60);
        // Some of it must not compress, and some must span several compressed neighbours.
        content.patch(&mut rng, SIZE, 3);
        content.save(&dir.file("source.raw"));
        let image = dir.file("compressed.qcow2");
        let convert = tools::qemu_img().line("convert -c -f raw -O qcow2 -o").arg(options);
        convert.args([&dir.file("source.raw"), &image]).ok();
        let spec = format!("driver=qcow2,file.driver=file,file.filename={image}");
        expect(OURS, &dir, &spec, &content, options);
        for n in 0..3 {
            run_io(tools::io, &dir, &image, &content.steps(&mut rng, 16));
            check_clean(&image);
            let when = format!("{options}, after writes (round {n})");
            expect(OURS, &dir, &spec, &content, &when);
            expect(PEER, &dir, &spec, &content, &when);
        }
    });
}

/// Goal: internal snapshots survive our writes byte for byte.
/// Method: the peer takes a snapshot between fills; we overwrite; the peer extracts each snapshot.
#[test]
fn snapshots_are_never_written() {
    for options in ["cluster_size=65536", "cluster_size=512,refcount_bits=8", "extended_l2=on", "compat=0.10"]
    {
        let dir = TestDir::new("snapshots");
        let mut rng = Rng::new(9);
        let mut content = Content::new(SIZE);
        let recipe = Recipe { name: "snap", options, base: Base::None };
        let image = recipe.make(&dir, tools::qemu_img, &mut content);
        let mut kept = Vec::new();
        for name in ["one", "two"] {
            run_io(tools::qemu_io, &dir, &image, &content.steps(&mut rng, 20));
            tools::qemu_img().line("snapshot -c").args([name, &image]).ok();
            kept.push((name, content.clone()));
        }
        run_io(tools::io, &dir, &image, &content.steps(&mut rng, 30));
        check_clean(&image);
        let spec = recipe.spec(&dir, &image);
        expect(OURS, &dir, &spec, &content, "after writes above snapshots");
        expect(PEER, &dir, &spec, &content, "after writes above snapshots");
        for (name, then) in kept {
            let raw = dir.file("snapshot.raw");
            tools::qemu_img().line("convert -f qcow2 -O raw -l").args([name, &image, &raw]).ok();
            then.expect_raw(&raw, &format!("snapshot {name} ({options})"));
        }
        for name in ["one", "two"] {
            tools::qemu_img().line("snapshot -d").args([name, &image]).ok();
            check_clean(&image);
        }
    }
}

/// Goal: discards do what the peer's do: same content afterwards, nothing of a backing file shows again, no
/// leak. Method: identical commands by both on twin images, then compare the twins' contents.
#[test]
fn discards_equal_the_peers() {
    let commands = [
        "write -P 17 0 2M",
        "discard 64k 128k",
        "discard 300k 100k",
        "write -z -u 1M 200k",
        "write -z 1400k 33k",
        "discard 1M 2M",
        "discard 4M 1M",
        "write -P 18 1100k 10k",
        "flush",
        "discard 0 4096",
        "discard 5M 1536",
    ];
    for_all(RECIPES, |recipe| {
        let mut copies = Vec::new();
        for side in [OURS, PEER] {
            let dir = TestDir::new("discard");
            let mut content = Content::new(SIZE);
            let image = recipe.make(&dir, tools::qemu_img, &mut content);
            // We discard single subclusters; the peer only whole clusters. Both may.
            let coarse = recipe.options.contains("extended_l2");
            let commands =
                commands.iter().filter(|c| !(coarse && c.starts_with("discard") && !c.ends_with('M')));
            let commands: Vec<String> = commands.map(|c| c.to_string()).collect();
            run_io_on(side.io, &dir, &["--image-opts", &recipe.spec(&dir, &image)], &commands);
            check_clean(&image);
            let raw = dir.file("copy.raw");
            tools::qemu_img().line("convert -f qcow2 -O raw").args([&image, &raw]).ok();
            let bytes = std::fs::read(&raw).expect("the copy can be read");
            copies.push((Content { bytes }, dir));
        }
        copies[1].0.expect_bytes(&copies[0].0.bytes, &format!("ours against the peer's, {}", recipe.name));
    });
}

/// Goal: an image that we made and filled is served by the peer's daemon, and one of the peer's by ours.
/// Method: each daemon exports the other's image; a third party, nbdcopy, reads it.
#[test]
fn each_daemon_serves_the_others_image() {
    for recipe in
        RECIPES.iter().filter(|r| matches!(r.name, "v3" | "c512" | "ext-l2" | "chain3" | "data-file"))
    {
        for (maker, start) in [(OURS, Daemon::peer as fn(&TestDir) -> _), (PEER, Daemon::on)] {
            let dir = TestDir::new("served");
            let mut content = Content::new(SIZE);
            let image = recipe.make(&dir, maker.img, &mut content);
            let spec = recipe.spec(&dir, &image);
            run_io_on(maker.io, &dir, &["--image-opts", &spec], &content.steps(&mut Rng::new(3), 20));
            let daemon = start(&dir).blockdev(&recipe.node(&dir, &image)).export("d", "q", false).start();
            let raw = dir.file("copied.raw");
            Cmd::new("nbdcopy").arg(daemon.uri("d")).arg(&raw).ok();
            content.expect_raw(&raw, &format!("{} made by {}", recipe.name, maker.name));
            daemon.quit();
            check_clean(&image);
        }
    }
}

/// Goal: unknown features are refused by name and the image stays as it was.
/// Method: the peer makes an image; a bit is set in its header's incompatible features here.
#[test]
fn unknown_incompatible_features_are_refused() {
    let dir = TestDir::new("feature");
    let image = dir.file("future.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "1M"]).ok();
    let mut bytes = std::fs::read(&image).expect("read");
    // Header bytes 72..80: incompatible features, big-endian. Bit 40 means nothing today.
    bytes[72 + 2] |= 1;
    std::fs::write(&image, &bytes).expect("write");
    let out = tools::io().line("-f qcow2 -c").arg("write 0 4096").arg(&image).fails(1);
    assert!(out.stderr.contains("Unknown incompatible feature"), "{}", out.describe());
    assert_eq!(std::fs::read(&image).expect("read"), bytes, "the image was changed");
}

/// Goal: nobody trusts a persistent bitmap that missed our writes. Method: the peer adds a bitmap; reading
/// changes nothing; after our write either the bitmaps as a whole are called inconsistent (the autoclear bit),
/// or each is marked as in use, and the image is sound.
#[test]
fn bitmaps_that_missed_writes_are_not_trusted() {
    let dir = TestDir::new("autoclear");
    let image = dir.file("bitmap.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&image, "4M"]).ok();
    tools::qemu_img().line("bitmap --add").args([&image, "b0"]).ok();
    let in_order = || {
        let info = tools::qemu_img().line("info --output=json -f qcow2").arg(&image).ok().json();
        let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        bitmaps.iter().any(|b| !b["flags"].as_array().is_some_and(|f| f.iter().any(|f| f == "in-use")))
    };
    assert!(in_order(), "the peer marks its bitmaps consistent");
    tools::io().line("-r -f qcow2 -c").arg("read 0 4096").arg(&image).ok();
    assert!(in_order(), "reading changes nothing");
    run_io(tools::io, &dir, &image, &["write -P 3 0 64k".to_string()]);
    if tools::is_product("RINGBLOCK_IO") {
        assert!(!in_order(), "a bitmap that missed our write must not look up to date");
    }
    images::check_no_errors(&image);
}
