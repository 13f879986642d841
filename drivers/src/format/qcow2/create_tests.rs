//! Tests of new images against qemu-img.

use std::os::unix::fs::FileExt;

use super::super::testkit::{Scratch, qemu_img};
use super::*;

/// Writes a new image the way a caller would.
fn write(dir: &Scratch, name: &str, image: &NewImage) {
    let f = std::fs::File::create(dir.path(name)).unwrap();
    f.set_len(image.file_size).unwrap();
    for (at, bytes) in image.writes() {
        f.write_all_at(&bytes, at.0).unwrap();
    }
    if let (Some(size), Some(data)) = (image.data_file_size, &image.header.extensions.data_file) {
        std::fs::File::create(dir.path(data)).unwrap().set_len(size).unwrap();
    }
}

/// Goal: qemu-img finds nothing wrong with a new image of any combination, and reads it as zeros of the right size.
/// Method: the product of the options.
#[test]
fn new_images_pass_the_check_of_qemu_img() {
    let dir = Scratch::new();
    std::fs::write(dir.path("base.raw"), vec![0; 1 << 20]).unwrap();
    let mut all = Vec::new();
    for cluster_size in [512, 4096, 16384, 65536, 2 << 20] {
        for refcount_bits in [1, 8, 16, 64] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let size = (40 << 20) + 512 * 3;
                let base =
                    CreateOptions { size, cluster_size, refcount_bits, preallocation, ..Default::default() };
                if cluster_size >= 16384 {
                    all.push(CreateOptions { extended_l2: true, ..base.clone() });
                }
                if refcount_bits == 16 {
                    all.push(CreateOptions { version: 2, ..base.clone() });
                    all.push(CreateOptions { lazy_refcounts: true, ..base.clone() });
                    all.push(CreateOptions {
                        data_file: Some("d".into()),
                        data_file_raw: true,
                        ..base.clone()
                    });
                    all.push(CreateOptions { data_file: Some("d".into()), ..base.clone() });
                }
                all.push(base);
            }
        }
        all.push(CreateOptions {
            size: 3 << 20,
            cluster_size,
            compression: CompressionType::Zstd,
            backing_file: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            ..Default::default()
        });
    }
    all.push(CreateOptions { size: 0, ..Default::default() });
    all.push(CreateOptions { size: 128 << 30, cluster_size: 512, ..Default::default() });
    for options in all {
        let image = create(&options).unwrap();
        write(&dir, "a.qcow2", &image);
        let (rc, out, err) = qemu_img(&dir, &["check", "-f", "qcow2", "a.qcow2"]);
        assert_eq!(rc, 0, "{options:?}\n{out}{err}");
        let (_, out, _) = qemu_img(&dir, &["info", "-f", "qcow2", "--output=json", "a.qcow2"]);
        assert!(out.contains(&format!("\"virtual-size\": {},", options.size)), "{options:?}\n{out}");
        if options.preallocation == Preallocation::Metadata && options.size < 1 << 30 {
            std::fs::File::create(dir.path("zero.raw")).unwrap().set_len(options.size).unwrap();
            let (rc, out, err) =
                qemu_img(&dir, &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "zero.raw"]);
            assert_eq!(rc, 0, "{options:?}\n{out}{err}");
        }
    }
}

/// Goal: a refused combination is refused with the peer's words. Method: the same options to both.
#[test]
fn refusals_have_the_texts_of_qemu_img() {
    let dir = Scratch::new();
    let d = CreateOptions { size: 1 << 20, ..Default::default() };
    let named = |file: &str| CreateOptions {
        backing_file: Some(file.into()),
        backing_format: Some("raw".into()),
        ..d.clone()
    };
    for (opts, ours) in [
        ("cluster_size=300", CreateOptions { cluster_size: 300, ..d.clone() }),
        ("cluster_size=256", CreateOptions { cluster_size: 256, ..d.clone() }),
        ("cluster_size=4M", CreateOptions { cluster_size: 4 << 20, ..d.clone() }),
        (
            "extended_l2=on,cluster_size=8k",
            CreateOptions { extended_l2: true, cluster_size: 8192, ..d.clone() },
        ),
        ("extended_l2=on,compat=v2", CreateOptions { extended_l2: true, version: 2, ..d.clone() }),
        ("refcount_bits=7", CreateOptions { refcount_bits: 7, ..d.clone() }),
        ("refcount_bits=128", CreateOptions { refcount_bits: 128, ..d.clone() }),
        ("refcount_bits=0", CreateOptions { refcount_bits: 0, ..d.clone() }),
        ("refcount_bits=8,compat=v2", CreateOptions { refcount_bits: 8, version: 2, ..d.clone() }),
        ("lazy_refcounts=on,compat=0.10", CreateOptions { lazy_refcounts: true, version: 2, ..d.clone() }),
        (
            "compression_type=zstd,compat=v2",
            CreateOptions { compression: CompressionType::Zstd, version: 2, ..d.clone() },
        ),
        ("data_file_raw=on", CreateOptions { data_file_raw: true, ..d.clone() }),
        ("data_file=x,compat=v2", CreateOptions { data_file: Some("x".into()), version: 2, ..d.clone() }),
        (
            "data_file=x,data_file_raw=on,backing_file=b,backing_fmt=raw",
            CreateOptions { data_file: Some("x".into()), data_file_raw: true, ..named("b") },
        ),
        (
            "backing_file=b,backing_fmt=raw,preallocation=metadata",
            CreateOptions { preallocation: Preallocation::Metadata, ..named("b") },
        ),
        ("backing_fmt=raw", CreateOptions { backing_format: Some("raw".into()), ..d.clone() }),
        ("cluster_size=512,size=200G", CreateOptions { cluster_size: 512, size: 200 << 30, ..d.clone() }),
        ("size=7E", CreateOptions { size: 7 << 60, ..d.clone() }),
    ] {
        let opts = if opts.contains("200G") || opts.contains("=7E") {
            opts.into()
        } else {
            format!("{opts},size=1M")
        };
        let (rc, _, err) = qemu_img(&dir, &["create", "-q", "-u", "-f", "qcow2", "-o", &opts, "a.qcow2"]);
        let peer = err.trim().strip_prefix("qemu-img: a.qcow2: ").unwrap_or(&err).to_owned();
        assert_eq!((rc, create(&ours).unwrap_err().message), (1, peer), "{opts}");
    }
}

/// Goal: sizes equal those of qemu-img measure. Method: several geometries and sizes.
#[test]
fn measured_sizes_equal_those_of_qemu_img() {
    let dir = Scratch::new();
    for size in [0u64, 1 << 20, 64 << 20, 1 << 30, (1 << 30) + 512, 1 << 40] {
        for (opts, ours) in [
            ("cluster_size=64k", CreateOptions::default()),
            ("cluster_size=2M", CreateOptions { cluster_size: 2 << 20, ..Default::default() }),
            ("cluster_size=512", CreateOptions { cluster_size: 512, ..Default::default() }),
            ("extended_l2=on", CreateOptions { extended_l2: true, ..Default::default() }),
            ("refcount_bits=1", CreateOptions { refcount_bits: 1, ..Default::default() }),
            (
                "preallocation=full",
                CreateOptions { preallocation: Preallocation::Full, ..Default::default() },
            ),
        ] {
            let ours = CreateOptions { size, ..ours };
            if ours.check().is_err() {
                continue;
            }
            let (rc, out, err) = qemu_img(
                &dir,
                &["measure", "--output=json", "-O", "qcow2", "-o", opts, "--size", &size.to_string()],
            );
            assert_eq!(rc, 0, "{err}");
            let m = measure(&ours, 0).unwrap();
            assert!(out.contains(&format!("\"required\": {},", m.required)), "{opts} {size}: {m:?} {out}");
            assert!(
                out.contains(&format!("\"fully-allocated\": {}", m.fully_allocated)),
                "{opts} {size}: {m:?} {out}"
            );
        }
    }
}
