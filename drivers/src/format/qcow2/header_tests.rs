//! Tests of the header against images and error texts of qemu-img.

use super::super::testkit::{Scratch, qemu_img};
use super::*;

fn first_cluster(path: &std::path::Path) -> Vec<u8> {
    let mut all = std::fs::read(path).unwrap();
    let bits = peek_cluster_bits(&all).unwrap();
    all.resize(all.len().max(1 << bits), 0);
    all.truncate(1 << bits);
    all
}

/// Goal: the header of a foreign image parses and serialises to the same bytes. Method: qemu-img images over the
/// feature combinations, compared up to the end of the name.
#[test]
fn foreign_headers_survive_a_round_trip() {
    let dir = Scratch::new();
    for opts in [
        "compat=v2",
        "compat=v3",
        "compat=v3,cluster_size=512,backing_file=base,backing_fmt=raw",
        "cluster_size=2M,refcount_bits=1",
        "refcount_bits=64,lazy_refcounts=on",
        "extended_l2=on,compression_type=zstd",
        "data_file=d.raw,data_file_raw=on",
        "backing_file=some/where/base,backing_fmt=qcow2",
        "compat=v2,backing_file=base,backing_fmt=raw",
    ] {
        let (rc, _, err) =
            qemu_img(&dir, &["create", "-q", "-u", "-f", "qcow2", "-o", opts, "a.qcow2", "64M"]);
        assert_eq!(rc, 0, "{opts}: {err}");
        let bytes = first_cluster(&dir.path("a.qcow2"));
        let header = Header::parse(&bytes).unwrap();
        let mut back = header.serialise().unwrap();
        back.resize(bytes.len(), 0);
        assert!(back == bytes, "{opts}: {header:#?}");
        assert_eq!(Header::parse(&back).unwrap(), header);
    }
}

/// Goal: a damaged header is refused with the peer's words. Method: one field at a time is overwritten in a good
/// image and both are asked.
#[test]
fn refusals_have_the_texts_of_qemu_img() {
    let dir = Scratch::new();
    let image = "a.qcow2";
    let make = |opts: &str| {
        let (rc, _, err) = qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, image, "64M"]);
        assert_eq!(rc, 0, "{err}");
        std::fs::read(dir.path(image)).unwrap()
    };
    let plain = make("cluster_size=64k");
    let v2 = make("compat=v2");
    let wide: &[(&[u8], usize, &[u8])] = &[
        (&plain, 4, &[0, 0, 0, 9]),
        (&plain, 20, &[0, 0, 0, 8]),
        (&plain, 20, &[0, 0, 0, 22]),
        (&plain, 100, &[0, 0, 0, 103]),
        (&plain, 100, &[0, 2, 0, 0]),
        (&plain, 8, &[0, 0, 0, 0, 0, 1, 0, 1]),
        (&plain, 72, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
        (&plain, 72, &[0x80, 0, 0, 0, 0, 0, 1, 0x20]),
        (&plain, 72, &[0, 0, 0, 0, 0, 0, 0, 8]),
        (&plain, 104, &[1]),
        (&plain, 104, &[7]),
        (&plain, 96, &[0, 0, 0, 7]),
        (&plain, 32, &[0, 0, 0, 3]),
        (&plain, 56, &[0, 0, 1, 0]),
        (&plain, 48, &[0, 0, 0, 0, 0, 1, 0, 1]),
        (&plain, 48, &[0xff, 0, 0, 0, 0, 1, 0, 0]),
        (&plain, 60, &[0, 1, 0, 1]),
        (&plain, 36, &[0x10, 0, 0, 0]),
        (&plain, 40, &[0, 0, 0, 0, 0, 3, 2, 0]),
        (&plain, 40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        (&plain, 24, &[0x7f, 0, 0, 0, 0, 0, 0, 0]),
        (&plain, 24, &[0, 0, 0, 1, 0, 0, 0, 0]),
        (&plain, 112, &[1, 2, 3, 4, 0xff, 0, 0, 0]),
        (&plain, 112, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16]),
        (&plain, 112, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16]),
        (&plain, 8, &[0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 4, 0]),
        (&v2, 20, &[0, 0, 0, 63]),
        (&v2, 4, &[0, 0, 0, 1]),
    ];
    let mut wrong = Vec::new();
    for (base, at, patch) in wide {
        let mut bytes = base.to_vec();
        bytes[*at..at + patch.len()].copy_from_slice(patch);
        std::fs::write(dir.path(image), &bytes).unwrap();
        let (rc, _, err) = qemu_img(&dir, &["info", "-f", "qcow2", image]);
        let peer =
            err.trim().strip_prefix("qemu-img: Could not open 'a.qcow2': ").unwrap_or(err.trim()).to_owned();
        bytes.resize(65536 * 2, 0);
        let ours = Header::parse(&bytes[..65536]).map(|_| ()).err().map_or(String::new(), |e| e.message);
        if ours != peer || (rc != 0) == ours.is_empty() {
            wrong.push(format!("at {at} {patch:x?}: peer {rc} {peer:?}, here {ours:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Goal: what is not understood is kept. Method: unknown fields and an unknown extension are put into a header.
#[test]
fn unknown_parts_are_kept() {
    let dir = Scratch::new();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let mut header = Header::parse(&first_cluster(&dir.path("a.qcow2"))).unwrap();
    header.unknown_fields = vec![1, 2, 3, 4, 5, 6, 7, 8];
    header.extensions.unknown.push((0x1234_5678, vec![9; 11]));
    header.backing_file = Some("base.img".into());
    let mut bytes = header.serialise().unwrap();
    bytes.resize(65536, 0);
    assert_eq!(Header::parse(&bytes).unwrap(), header);
    header.backing_file = Some("x".repeat(1024));
    assert_eq!(header.serialise().unwrap_err().message, "No space left in the file header");
}

/// Goal: no first cluster, however mangled, makes the parser panic. Method: random single and multiple byte changes.
#[test]
fn mangled_headers_do_not_panic() {
    let dir = Scratch::new();
    qemu_img(
        &dir,
        &[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512,backing_file=b,backing_fmt=raw",
            "a.qcow2",
            "1M",
        ],
    );
    let good = first_cluster(&dir.path("a.qcow2"));
    let mut x = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for _ in 0..20000 {
        let mut bytes = good.clone();
        for _ in 0..=random() % 4 {
            let at = (random() % 160) as usize;
            bytes[at] = random() as u8;
        }
        let cut = if random() % 8 == 0 { (random() % 512) as usize } else { 512 };
        if let Ok(h) = Header::parse(&bytes[..cut]) {
            let _ = h.serialise();
        }
    }
}
