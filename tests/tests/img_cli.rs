//! The image tool beside the peer's: the same command lines, the same exit codes, outputs and errors.
//!
//! Method common to all: [`Twins`]: two folders prepared alike, each line run in both, everything compared
//! that may be compared; then the images that came of it.

use ringblock_tests::{TestDir, Twins};

/// Images for the reading commands, made by the peer.
fn samples(twins: &Twins) {
    for line in [
        "create -q -f qcow2 empty.qcow2 10M",
        "create -q -f qcow2 data.qcow2 10M",
        "create -q -f qcow2 -o compat=0.10 v2.qcow2 10M",
        "create -q -f qcow2 -o lazy_refcounts=on,cluster_size=4k,refcount_bits=8 small.qcow2 3M",
        "create -q -f qcow2 -o extended_l2=on ext.qcow2 10M",
        "create -q -f qcow2 -o compression_type=zstd zstd.qcow2 10M",
        "create -q -f qcow2 -o data_file=ext.data,data_file_raw=on dataraw.qcow2 4M",
        "create -q -f raw plain.raw 4M",
        "create -q -f qcow2 -o preallocation=metadata meta.qcow2 10M",
        "create -q -f qcow2 -b data.qcow2 -F qcow2 top.qcow2",
        "create -q -f qcow2 -b top.qcow2 -F qcow2 over.qcow2 20M",
        "create -q -f qcow2 snap.qcow2 4M",
    ] {
        twins.qemu_img(line);
    }
    for line in [
        "-c 'write -P 1 1M 2M' -c 'write -z 5M 1M' -c 'write -P 2 9M 512' data.qcow2",
        "-c 'write -P 1 0 100k' -c 'write -P 3 2M 10k' small.qcow2",
        "-c 'write -P 1 10k 3k' -c 'write -z 2k 2k' ext.qcow2",
        "-f raw -c 'write -P 7 1M 1M' plain.raw",
        "-c 'write -P 9 2M 64k' -c 'write -z 1M 64k' top.qcow2",
        "-c 'write -P 4 15M 64k' over.qcow2",
        "-c 'write -P 1 0 64k' snap.qcow2",
        "-c 'write -P 8 1M 64k' dataraw.qcow2",
    ] {
        twins.qemu_io(line);
    }
    twins.qemu_img("convert -c -O qcow2 data.qcow2 packed.qcow2");
    twins.qemu_img("convert -c -O qcow2 -o compression_type=zstd data.qcow2 packedz.qcow2");
    twins.both(|dir| {
        std::fs::write(dir.path().join("text.txt"), "not an image, only text\n").expect("write");
        std::fs::write(dir.path().join("empty.raw"), "").expect("write");
    });
}

/// Changes a refcount of a 64 KiB-cluster, 16-bit image without any program's help.
fn set_refcount(dir: &TestDir, name: &str, cluster: usize, refcount: u16) {
    let path = dir.path().join(name);
    let mut bytes = std::fs::read(&path).expect("read");
    let at =
        |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize;
    let table = at(&bytes, 48);
    let entry = at(&bytes, table) + cluster * 2;
    bytes[entry..entry + 2].copy_from_slice(&refcount.to_be_bytes());
    std::fs::write(path, bytes).expect("write");
}

/// Goal: `create` says, does and refuses what the peer's does.
#[test]
fn create() {
    let mut twins = Twins::new("create");
    twins.qemu_img("create -q -f qcow2 base.qcow2 5M");
    twins.qemu_img("create -q -f raw base.raw 5M");
    let good = [
        "create -f qcow2 a1.qcow2 10M",
        "create -f qcow2 a2.qcow2 10000",
        "create -f raw a3.raw 10000",
        "create a4.raw 1M",
        "create -q -f qcow2 a5.qcow2 1G",
        "create -f qcow2 -o size=3M a6.qcow2",
        "create -f qcow2 -o compat=0.10 a7.qcow2 1T",
        "create -f qcow2 -o cluster_size=512,refcount_bits=1 a8.qcow2 1M",
        "create -f qcow2 -o cluster_size=2M,refcount_bits=64 a9.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=on,compat=1.1 a10.qcow2 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=128k a11.qcow2 1M",
        "create -f qcow2 -o compression_type=zstd a12.qcow2 1M",
        "create -f qcow2 -o preallocation=metadata a13.qcow2 3M",
        "create -f qcow2 -o preallocation=falloc a14.qcow2 3M",
        "create -f qcow2 -o preallocation=full a15.qcow2 3M",
        "create -f raw -o preallocation=falloc a16.raw 3M",
        "create -f raw -o preallocation=full a17.raw 3M",
        "create -f qcow2 -b base.qcow2 -F qcow2 a18.qcow2",
        "create -f qcow2 -b base.raw -F raw a19.qcow2 9M",
        "create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 a20.qcow2",
        "create -f qcow2 -u -b nosuch.qcow2 -F qcow2 a21.qcow2 2M",
        "create -f qcow2 -o data_file=a22.data a22.qcow2 2M",
        "create -f qcow2 -o data_file=a23.data,data_file_raw=on a23.qcow2 2M",
        "create -f qcow2 a24.qcow2 1.5k",
        "create -f qcow2 -o cluster_size=4K -o refcount_bits=16 a25.qcow2 0x100000",
        "create -f qcow2 a26.qcow2 0",
    ];
    for line in good {
        twins.img(line);
        let name = line.split_whitespace().find(|w| w.starts_with('a') && w.contains('.')).unwrap_or("none");
        twins.same_info(name);
        if !name.contains("a21") {
            twins.same_disk(name, name.rsplit('.').next().unwrap_or("raw"));
        }
    }
    for line in [
        "create",
        "create -f qcow2",
        "create -f qcow2 b1.qcow2",
        "create -f qcow2 b2.qcow2 1M extra",
        "create -f nosuch b3.qcow2 1M",
        "create -f qcow2 b4.qcow2 -1",
        "create -f qcow2 b5.qcow2 abc",
        "create -f qcow2 b6.qcow2 9999999999999999999999",
        "create -f qcow2 b7.qcow2 8E",
        "create -f qcow2 -o size=1M b8.qcow2 1M",
        "create -f qcow2 -o cluster_size=3000 b9.qcow2 1M",
        "create -f qcow2 -o cluster_size=256 b10.qcow2 1M",
        "create -f qcow2 -o cluster_size=4M b11.qcow2 1M",
        "create -f qcow2 -o refcount_bits=5 b12.qcow2 1M",
        "create -f qcow2 -o refcount_bits=128 b13.qcow2 1M",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on b14.qcow2 1M",
        "create -f qcow2 -o compat=0.10,refcount_bits=8 b15.qcow2 1M",
        "create -f qcow2 -o compat=7 b16.qcow2 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=4k b17.qcow2 1M",
        "create -f qcow2 -o compat=0.10,extended_l2=on b18.qcow2 1M",
        "create -f qcow2 -o compat=0.10,compression_type=zstd b19.qcow2 1M",
        "create -f qcow2 -o compression_type=lz4 b20.qcow2 1M",
        "create -f qcow2 -o nosuch=1 b21.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=perhaps b22.qcow2 1M",
        "create -f qcow2 -o data_file_raw=on b23.qcow2 1M",
        "create -f qcow2 -o data_file=b24.data,data_file_raw=on -b base.qcow2 -F qcow2 b24.qcow2",
        "create -f qcow2 -o preallocation=most b25.qcow2 1M",
        "create -f qcow2 -o preallocation=full -b base.qcow2 -F qcow2 b26.qcow2",
        "create -f qcow2 -o cluster_size=512 b27.qcow2 1P",
        "create -f qcow2 -b base.qcow2 b28.qcow2",
        "create -f qcow2 -b nosuch.qcow2 -F qcow2 b29.qcow2",
        "create -f qcow2 -b base.qcow2 -F nosuch b30.qcow2",
        "create -f qcow2 -u -b base.qcow2 -F qcow2 b31.qcow2",
        "create -f raw -b base.qcow2 -F qcow2 b32.raw",
        "create -f qcow2 -b b33.qcow2 -F qcow2 b33.qcow2 1M",
        "create -f qcow2 nosuchdir/b34.qcow2 1M",
        "create --nosuch b35.qcow2 1M",
        "create -f qcow2 -F qcow2 b36.qcow2 1M",
        "create -f raw -o preallocation=metadata b37.raw 1M",
    ] {
        twins.img(line);
        let made = |w: &&str| w.starts_with('b') && !w.starts_with("base") && w.contains('.');
        let name = line.split_whitespace().find(made).unwrap_or("none");
        twins.nothing_left(name);
    }
    twins.finish();
}

/// Goal: `info` reports what the peer's does, in both forms.
#[test]
fn info() {
    let mut twins = Twins::new("info");
    samples(&twins);
    twins.qemu_img("snapshot -c first snap.qcow2");
    let names = [
        "empty.qcow2",
        "data.qcow2",
        "v2.qcow2",
        "small.qcow2",
        "ext.qcow2",
        "zstd.qcow2",
        "dataraw.qcow2",
        "plain.raw",
        "meta.qcow2",
        "top.qcow2",
        "over.qcow2",
        "packed.qcow2",
        "packedz.qcow2",
        "text.txt",
        "empty.raw",
        "nosuch",
    ];
    for name in names {
        twins.img(&format!("info {name}"));
        twins.img(&format!("info --output=json {name}"));
        twins.img(&format!("info -U --backing-chain {name}"));
    }
    twins.img("info --backing-chain --output=json over.qcow2");
    twins.img("info -f raw data.qcow2");
    twins.img("info -f qcow2 plain.raw");
    twins.img("info -f nosuch data.qcow2");
    twins.img("info --image-opts driver=qcow2,file.driver=file,file.filename=data.qcow2");
    twins.img("info --image-opts -f qcow2 driver=qcow2,file.filename=data.qcow2");
    twins.img("info --output=xml data.qcow2");
    twins.img("info");
    twins.img("info data.qcow2 top.qcow2");
    twins.img("info --nosuch data.qcow2");
    twins.finish();
}

/// Goal: `check` finds, reports, repairs and exits like the peer's.
#[test]
fn check() {
    let mut twins = Twins::new("check");
    samples(&twins);
    for name in [
        "empty.qcow2",
        "data.qcow2",
        "v2.qcow2",
        "small.qcow2",
        "ext.qcow2",
        "packed.qcow2",
        "over.qcow2",
        "meta.qcow2",
    ] {
        twins.img(&format!("check {name}"));
        twins.img(&format!("check --output=json {name}"));
    }
    twins.img("check -q data.qcow2");
    twins.img("check -f raw plain.raw");
    twins.img("check plain.raw");
    twins.img("check nosuch.qcow2");
    twins.img("check -f qcow2 text.txt");
    twins.img("check -r some data.qcow2");
    twins.img("check");
    twins.img("check --nosuch data.qcow2");
    // A leak: a cluster counted though nothing uses it. An error: one used though not counted.
    for (name, cluster, refcount) in [("leak.qcow2", 60, 1), ("error.qcow2", 5, 0), ("low.qcow2", 6, 3)] {
        for repair in ["leaks", "all"] {
            twins.both(|dir| {
                std::fs::copy(dir.file("data.qcow2"), dir.file(name)).expect("copy");
                set_refcount(dir, name, cluster, refcount);
            });
            twins.img(&format!("check {name}"));
            twins.img(&format!("check --output=json {name}"));
            twins.img(&format!("check -q {name}"));
            if (name, repair) == ("error.qcow2", "all") {
                let why = "a rebuild frees the old structures without naming their clusters";
                twins.img_codes(&format!("check -r {repair} {name}"), why);
            } else {
                twins.img(&format!("check -r {repair} {name}"));
            }
            twins.img(&format!("check {name}"));
        }
        twins.same_disk(name, "qcow2");
    }
    twins.finish();
}

/// Goal: `map` reports what the peer's does.
#[test]
fn map() {
    let mut twins = Twins::new("map");
    samples(&twins);
    for name in [
        "empty.qcow2",
        "data.qcow2",
        "v2.qcow2",
        "small.qcow2",
        "ext.qcow2",
        "plain.raw",
        "meta.qcow2",
        "top.qcow2",
        "over.qcow2",
        "packed.qcow2",
        "empty.raw",
    ] {
        if name == "ext.qcow2" {
            let why = "subclusters that hold nothing have no offset";
            twins.img_codes(&format!("map --output=json {name}"), why);
        } else {
            twins.img(&format!("map --output=json {name}"));
        }
        twins.img(&format!("map {name}"));
    }
    let named = "driver=qcow2,file.driver=file,file.filename=dataraw.qcow2,data-file.driver=file,data-file.filename=ext.data";
    twins.img(&format!("map --output=json --image-opts {named}"));
    twins.img("map --output=json --start-offset=1M --max-length=3M over.qcow2");
    twins.img("map --output=json -s 15M over.qcow2");
    twins.img("map --output=json --start-offset=100M over.qcow2");
    twins.img("map --start-offset=abc over.qcow2");
    twins.img("map --output=csv over.qcow2");
    twins.img("map nosuch.qcow2");
    twins.img("map");
    twins.finish();
}

/// Goal: `convert` makes what the peer's makes, and refuses what it refuses.
#[test]
fn convert() {
    let mut twins = Twins::new("convert");
    samples(&twins);
    let good = [
        "convert -O raw data.qcow2 c1.raw",
        "convert -O qcow2 data.qcow2 c2.qcow2",
        "convert -f qcow2 -O qcow2 -o cluster_size=4k over.qcow2 c3.qcow2",
        "convert -O qcow2 -c data.qcow2 c4.qcow2",
        "convert -O qcow2 -c -o compression_type=zstd over.qcow2 c5.qcow2",
        "convert -O qcow2 packed.qcow2 c6.qcow2",
        "convert -O raw packedz.qcow2 c7.raw",
        "convert -f raw -O qcow2 plain.raw c8.qcow2",
        "convert -O qcow2 -B data.qcow2 -F qcow2 top.qcow2 c9.qcow2",
        "convert -O qcow2 -o backing_file=data.qcow2,backing_fmt=qcow2 top.qcow2 c10.qcow2",
        "convert -O raw -S 0 data.qcow2 c11.raw",
        "convert -O qcow2 -S 64k ext.qcow2 c12.qcow2",
        "convert -O qcow2 -o preallocation=metadata data.qcow2 c13.qcow2",
        "convert -O raw -W -m 4 over.qcow2 c14.raw",
        "convert -q -O raw data.qcow2 plain.raw c15.raw",
        "convert -O qcow2 -U data.qcow2 c16.qcow2",
        "convert -p -O raw empty.qcow2 c17.raw",
        "convert -O qcow2 -t none -T none data.qcow2 c18.qcow2",
        "convert -O qcow2 -r 1G data.qcow2 c19.qcow2",
        "convert data.qcow2 c20.raw",
        "convert -O qcow2 empty.raw c21.qcow2",
        "convert -O qcow2 -o data_file=c22.data data.qcow2 c22.qcow2",
        "convert -O qcow2 -o extended_l2=on data.qcow2 c25.qcow2",
        "convert -O qcow2 -o compat=0.10 data.qcow2 c26.qcow2",
    ];
    twins.both(|dir| {
        std::fs::copy(dir.file("snap.qcow2"), dir.file("snap1.qcow2")).expect("copy");
    });
    twins.qemu_img("snapshot -c one snap1.qcow2");
    twins.qemu_io("-c 'write -P 2 0 64k' snap1.qcow2");
    for line in good {
        twins.img(line);
        let name = line.split_whitespace().next_back().unwrap_or("none");
        twins.same_info(name);
        twins.same_disk(name, name.rsplit('.').next().unwrap_or("raw"));
    }
    twins.img_refuses("convert -C -O raw data.qcow2 c23.raw", "copy-range-offloading");
    twins.img_refuses("convert -O raw -l snapshot.name=one snap1.qcow2 c24.raw", "snapshot");
    twins.nothing_left("c24.raw");
    twins.qemu_img("create -q -f qcow2 there.qcow2 10M");
    twins.qemu_io("-c 'write -P 200 0 10M' there.qcow2");
    twins.img("convert -n -O qcow2 data.qcow2 there.qcow2");
    twins.same_disk("there.qcow2", "qcow2");
    twins.qemu_img("create -q -f raw tiny.raw 1M");
    for line in [
        "convert -n -O raw data.qcow2 tiny.raw",
        "convert -n -O raw data.qcow2 nosuch.raw",
        "convert -n -o cluster_size=4k -O qcow2 data.qcow2 there.qcow2",
        "convert -C -c -O qcow2 data.qcow2 e1.qcow2",
        "convert -C -S 4k -O qcow2 data.qcow2 e2.qcow2",
        "convert --target-is-zero -O qcow2 data.qcow2 e3.qcow2",
        "convert -O nosuch data.qcow2 e4.qcow2",
        "convert -c -O raw data.qcow2 e5.raw",
        "convert -c -O qcow2 -o preallocation=full data.qcow2 e6.qcow2",
        "convert -O qcow2 -B data.qcow2 -F qcow2 data.qcow2 plain.raw e7.qcow2",
        "convert -O qcow2 -B data.qcow2 top.qcow2 e8.qcow2",
        "convert -O qcow2 -o nosuch=1 data.qcow2 e9.qcow2",
        "convert -S 100 -O raw data.qcow2 e10.raw",
        "convert -m 17 -O raw data.qcow2 e11.raw",
        "convert -m 0 -O raw data.qcow2 e12.raw",
        "convert -f nosuch -O raw data.qcow2 e13.raw",
        "convert -f raw -O qcow2 nosuch.raw e14.qcow2",
        "convert -f qcow2 -O raw plain.raw e15.raw",
        "convert -O raw data.qcow2",
        "convert",
        "convert --nosuch -O raw data.qcow2 e17.raw",
        "convert -O raw data.qcow2 nosuchdir/e18.raw",
        "convert -t nosuch -O raw data.qcow2 e19.raw",
        "convert -T nosuch -O raw data.qcow2 e20.raw",
    ] {
        twins.img(line);
    }
    twins.finish();
}

/// Goal: `compare` judges like the peer's.
#[test]
fn compare() {
    let mut twins = Twins::new("compare");
    samples(&twins);
    twins.qemu_img("convert -O raw data.qcow2 same.raw");
    twins.qemu_img("convert -O qcow2 data.qcow2 other.qcow2");
    twins.qemu_io("-c 'write -P 9 3M 1' other.qcow2");
    twins.both(|dir| {
        let mut longer = std::fs::read(dir.file("same.raw")).expect("read");
        longer.extend_from_slice(&[0; 65536]);
        std::fs::write(dir.file("longer.raw"), &longer).expect("write");
        longer.push(1);
        longer.extend_from_slice(&[0; 511]);
        std::fs::write(dir.file("tail.raw"), &longer).expect("write");
    });
    for line in [
        "compare -F raw data.qcow2 same.raw",
        "compare data.qcow2 packed.qcow2",
        "compare packed.qcow2 packedz.qcow2",
        "compare data.qcow2 other.qcow2",
        "compare other.qcow2 data.qcow2",
        "compare data.qcow2 top.qcow2",
        "compare -F raw data.qcow2 longer.raw",
        "compare -f raw longer.raw data.qcow2",
        "compare -s -F raw data.qcow2 longer.raw",
        "compare -F raw data.qcow2 tail.raw",
        "compare -s data.qcow2 meta.qcow2",
        "compare -s data.qcow2 data.qcow2",
        "compare -p data.qcow2 packed.qcow2",
        "compare -q data.qcow2 other.qcow2",
        "compare -U data.qcow2 data.qcow2",
        "compare empty.qcow2 meta.qcow2",
        "compare -s empty.qcow2 zstd.qcow2",
        "compare nosuch.qcow2 data.qcow2",
        "compare data.qcow2 nosuch.qcow2",
        "compare data.qcow2",
        "compare",
        "compare -f nosuch data.qcow2 data.qcow2",
        "compare -f qcow2 -F qcow2 plain.raw data.qcow2",
        "compare -T nosuch data.qcow2 data.qcow2",
        "compare --nosuch data.qcow2 data.qcow2",
    ] {
        twins.img(line);
    }
    twins.finish();
}

/// Goal: `resize` grows, shrinks and refuses like the peer's.
#[test]
fn resize() {
    let mut twins = Twins::new("resize");
    samples(&twins);
    for (line, name) in [
        ("resize data.qcow2 20M", "data.qcow2"),
        ("resize data.qcow2 +1M", "data.qcow2"),
        ("resize data.qcow2 10M", "data.qcow2"),
        ("resize --shrink data.qcow2 2M", "data.qcow2"),
        ("resize --shrink data.qcow2 -1M", "data.qcow2"),
        ("resize data.qcow2 1M", "data.qcow2"),
        ("resize -q data.qcow2 3M", "data.qcow2"),
        ("resize small.qcow2 1G", "small.qcow2"),
        ("resize --shrink small.qcow2 1M", "small.qcow2"),
        ("resize ext.qcow2 100M", "ext.qcow2"),
        ("resize v2.qcow2 1T", "v2.qcow2"),
        ("resize over.qcow2 30M", "over.qcow2"),
        ("resize --preallocation=metadata empty.qcow2 20M", "empty.qcow2"),
        ("resize --preallocation=falloc empty.qcow2 22M", "empty.qcow2"),
        ("resize -f raw plain.raw 6M", "plain.raw"),
        ("resize -f raw plain.raw 7000", "plain.raw"),
        ("resize -f raw --shrink plain.raw 7000", "plain.raw"),
        ("resize -f raw plain.raw +512", "plain.raw"),
        ("resize meta.qcow2 10000001", "meta.qcow2"),
    ] {
        twins.img(line);
        twins.same_info(name);
        twins.same_disk(name, name.rsplit('.').next().unwrap_or("raw"));
    }
    twins.qemu_img("snapshot -c first snap.qcow2");
    for line in [
        "resize --shrink snap.qcow2 1M",
        "resize snap.qcow2 8M",
        "resize data.qcow2",
        "resize",
        "resize data.qcow2 abc",
        "resize data.qcow2 -100M",
        "resize --shrink data.qcow2 -100M",
        "resize nosuch.qcow2 10M",
        "resize -f nosuch data.qcow2 10M",
        "resize --preallocation=nosuch data.qcow2 50M",
        "resize --nosuch data.qcow2 50M",
        "resize --shrink --preallocation=full data.qcow2 1M",
        "resize -f qcow2 text.txt 1M",
    ] {
        twins.img(line);
    }
    twins.finish();
}

/// Goal: the tool as a whole refuses what the peer's refuses.
#[test]
fn the_tool_itself() {
    let mut twins = Twins::new("tool");
    twins.img("");
    twins.img("nosuch");
    twins.img("--nosuch");
    twins.finish();
}

/// Goal: `bench` runs and reports in the peer's form. Method: numbers vary, so the words are compared.
#[test]
fn bench() {
    let mut twins = Twins::new("bench");
    samples(&twins);
    for line in [
        "bench -c 200 -d 8 -s 4k data.qcow2",
        "bench -w -c 200 -d 8 -s 4k --pattern=3 data.qcow2",
        "bench -w -c 64 -d 4 --flush-interval=16 data.qcow2",
        "bench -c 100 -o 1M -S 8k data.qcow2",
        "bench -c 10 -f raw -t none -n plain.raw",
        "bench -c 0 data.qcow2",
        "bench -c 10 -d 0 data.qcow2",
        "bench -c x data.qcow2",
        "bench --flush-interval=4 -c 10 data.qcow2",
        "bench nosuch.qcow2",
        "bench",
    ] {
        twins.img(line);
    }
    twins.same_disk("data.qcow2", "qcow2");
    twins.finish();
}
