//! Images whose shape is the attack: cut off, looping, overlapping, fanned out, huge, packed to burst, or of other formats.

use super::case::{Case, Named};
use super::forge::{self, COPIED, Forge, Forged};

/// All of them.
pub(super) fn all() -> Vec<Named> {
    let mut out = Vec::new();
    cut(&mut out);
    loops(&mut out);
    fans(&mut out);
    crowds(&mut out);
    sparse(&mut out);
    bombs(&mut out);
    magics(&mut out);
    out
}

fn add(out: &mut Vec<Named>, name: impl Into<String>, make: impl Fn(&str) -> Case + Send + Sync + 'static) {
    let name = name.into();
    out.push(Named::new(name.clone(), move |_| make(&name)));
}

/// Files that end early, at and around every structure.
fn cut(out: &mut Vec<Named>) {
    let header = [0, 1, 3, 4, 8, 23, 24, 71, 72, 103, 104, 111, 112, 120, 144, 200, 511, 512, 513];
    let clusters = (1..forge::CLUSTERS).flat_map(|c| [(c << 12) - 1, c << 12, (c << 12) + 9]);
    for len in header.into_iter().chain(clusters) {
        add(out, format!("cut/{len}"), move |name| {
            let mut bytes = Forge::new(12).build().bytes;
            bytes.truncate(len as usize);
            Case::qcow2(name, bytes)
        });
    }
    for (what, format) in [("raw", Some("raw")), ("guess", None)] {
        for len in [0, 1, 511, 513] {
            add(out, format!("cut/{what}-{len}"), move |name| Case::of(name, format, vec![7; len]));
        }
    }
    // the first cluster is the whole file, and a header for 2 MiB clusters is all there is
    add(out, "cut/two-mib", |name| {
        let mut image = Forge::new(21);
        image.version = 2;
        let mut bytes = image.build().bytes;
        bytes.truncate(512);
        Case::qcow2(name, bytes)
    });
}

/// Tables that name each other, or themselves.
fn loops(out: &mut Vec<Named>) {
    let fields = [
        "l1-offset",
        "reftable-offset",
        "snapshots-offset",
        "l1-0",
        "l2-0",
        "l2-3",
        "reftable-0",
        "snap-l1-offset",
        "snap-l1-0",
        "snap-l2-0",
        "ext-bitmaps-offset",
        "bitmap-table-offset",
        "bitmap-table-0",
    ];
    for field in fields {
        for to in 0..forge::CLUSTERS {
            add(out, format!("loop/{field}-{to}"), move |name| {
                let flag = if field.starts_with('l') && !field.ends_with("offset") { COPIED } else { 0 };
                Case::qcow2(name, Forge::new(12).build().with(field, (to << 12) | flag).bytes)
            });
        }
    }
}

/// Fills a table with entries.
fn fill(image: &mut Forged, at: u64, count: u64, entry: impl Fn(u64) -> u64) {
    let bytes: Vec<u8> = (0..count).flat_map(|i| entry(i).to_be_bytes()).collect();
    image.put(at, &bytes);
}

/// Few bytes that ask for much work: many entries that name the same thing.
fn fans(out: &mut Vec<Named>) {
    for (what, bits, entries) in
        [("512", 9, 512u64), ("4k", 12, 1 << 15), ("64k", 16, 1 << 18), ("all", 16, (32 << 20) / 8)]
    {
        add(out, format!("fan/l1-{what}"), move |name| {
            // an L1 table of that many entries behind the image, all of them for one full L2 table
            let mut image = Forge::new(bits).build();
            let (l2, data, behind) = (forge::L2 << bits, forge::DATA << bits, image.bytes.len() as u64);
            fill(&mut image, l2, (1 << bits) / 8, |_| data);
            fill(&mut image, behind, entries, |_| l2 | COPIED);
            let span = ((1u64 << bits) / 8) << bits;
            let image = image.with("l1-offset", behind).with("l1-size", entries);
            Case::qcow2(name, image.with("size", entries.saturating_mul(span).min(1 << 62)).bytes)
        });
        add(out, format!("fan/reftable-{what}"), move |name| {
            let mut image = Forge::new(bits).build();
            let (block, behind) = (forge::REFBLOCK << bits, image.bytes.len() as u64);
            let clusters = ((entries * 8) >> bits).clamp(1, (8 << 20) >> bits);
            fill(&mut image, behind, (clusters << bits) / 8, |_| block);
            Case::qcow2(name, image.with("reftable-offset", behind).with("reftable-clusters", clusters).bytes)
        });
    }
    for (what, count, l1) in [("many", 65_536u32, 2u32), ("deep", 2_000, 1 << 16), ("both", 65_536, 1 << 22)]
    {
        add(out, format!("fan/snapshots-{what}"), move |name| {
            // snapshots that all name one L1 table, which is as large as may be
            let mut image = Forge::new(12).build();
            let behind = image.bytes.len() as u64;
            let tables = behind + u64::from(count) * 48;
            let tables = tables.next_multiple_of(4096);
            let mut one = [0; 48];
            one[..8].copy_from_slice(&tables.to_be_bytes());
            one[8..12].copy_from_slice(&l1.to_be_bytes());
            one[13] = 1;
            one[15] = 1;
            one[40..42].copy_from_slice(b"1s");
            image.put(behind, &one.repeat(count as usize));
            fill(&mut image, tables, u64::from(l1).min(1 << 16), |_| forge::SNAP_L2 << 12);
            let image = image.with("snapshots-offset", behind).with("snapshot-count", count.into());
            let end = tables + u64::from(l1) * 8;
            Case::qcow2(name, image.bytes).long(end)
        });
    }
    for (what, count, table) in
        [("many", 65_535u64, 512u32), ("wide", 64, 0x10_0000), ("both", 65_535, 0x80_0000)]
    {
        add(out, format!("fan/bitmaps-{what}"), move |name| {
            let mut image = Forge::new(12).build();
            let behind = image.bytes.len() as u64;
            let mut one = [0; 32];
            let tables = (behind + count * 32).next_multiple_of(4096);
            one[..8].copy_from_slice(&tables.to_be_bytes());
            one[8..12].copy_from_slice(&table.to_be_bytes());
            (one[16], one[17], one[19]) = (1, 16, 1);
            one[24] = b'b';
            image.put(behind, &one.repeat(count as usize));
            fill(&mut image, tables, u64::from(table).min(1 << 16), |_| forge::BITMAP << 12);
            let image = image.with("ext-bitmaps-offset", behind).with("ext-bitmaps-count", count);
            let image = image.with("ext-bitmaps-size", count * 32);
            Case::qcow2(name, image.bytes).long(tables + u64::from(table) * 8)
        });
    }
}

/// As much as a field allows, and one more.
fn crowds(out: &mut Vec<Named>) {
    for extra in [24u32, 1024, 1025, 0x10_0000, u32::MAX] {
        for count in [1u32, 1000, 65_536, 65_537] {
            add(out, format!("crowd/snapshots-{count}-{extra}"), move |name| {
                let image = Forge::new(12).build().with("snap-extra-length", extra.into());
                Case::qcow2(name, image.with("snapshot-count", count.into()).bytes).long(1 << 20)
            });
        }
    }
    for (field, len) in
        [("snap-id-length", 0xffffu64), ("snap-name-length", 0xffff), ("bitmap-name-length", 0xffff)]
    {
        add(out, format!("crowd/{field}"), move |name| {
            Case::qcow2(name, Forge::new(12).build().with(field, len).bytes).long(1 << 20)
        });
    }
    // extensions without end: as many as fit a header of 2 MiB, some empty, some as long as can be
    for (what, len) in [("empty", 0usize), ("8", 8), ("4096", 4096)] {
        add(out, format!("crowd/extensions-{what}"), move |name| {
            let mut image = Forge::new(16);
            image.version = 3;
            let mut image = image.build();
            let mut one = vec![0x12, 0x34, 0x56, 0x78];
            one.extend((len as u32).to_be_bytes());
            one.extend(vec![9; len]);
            let fits = ((1 << 16) - 112) / one.len();
            image.put(112, &one.repeat(fits));
            Case::qcow2(name, image.bytes)
        });
    }
    // a feature name table that names a million features, and an unknown one that must be named from it
    add(out, "crowd/features", |name| {
        let mut image = Forge::new(16).build().with("incompatible", 1 << 63);
        let mut table = 0x6803_f857u32.to_be_bytes().to_vec();
        table.extend(65_000u32.to_be_bytes());
        table.extend([[0, 63].as_slice(), &[b'x'; 46]].concat().repeat(1354));
        image.put(112, &table);
        Case::qcow2(name, image.bytes)
    });
}

/// Files much longer than what is in them.
fn sparse(out: &mut Vec<Named>) {
    for shift in [32u32, 36, 40, 43, 50, 62] {
        for (what, format) in [("raw", Some("raw")), ("guess", None)] {
            add(out, format!("sparse/{what}-{shift}"), move |name| {
                Case::of(name, format, vec![1]).long(1 << shift)
            });
        }
        for bits in [9u32, 12, 16] {
            add(out, format!("sparse/qcow2-{bits}-{shift}"), move |name| {
                Case::qcow2(name, Forge::new(bits).build().bytes).long(1 << shift)
            });
            add(out, format!("sparse/far-{bits}-{shift}"), move |name| {
                // the last cluster of a huge file is in use
                let image = Forge::new(bits)
                    .build()
                    .with("l2-3", ((1u64 << shift) - (1 << bits)) & !(1 << 63) | COPIED);
                Case::qcow2(name, image.bytes).long(1 << shift)
            });
        }
    }
    for shift in [40u32, 50, 56, 62, 63] {
        add(out, format!("sparse/disk-{shift}"), move |name| {
            // a disk as large as its L1 table allows
            let l1 = ((1u64 << shift) >> 42).clamp(2, 1 << 22);
            let mut image = Forge::new(21);
            image.version = 2;
            let image = image.build().with("l1-size", l1).with("size", (1 << shift) - 1);
            let l1_at = image.bytes.len() as u64;
            let data: Vec<u8> = image.bytes[..1 << 12].to_vec();
            let case = Case::qcow2(name, data).more(l1_at, vec![0; 8]).long(l1_at + l1 * 8);
            let mut offset = l1_at.to_be_bytes().to_vec();
            offset.extend(1u64.wrapping_shl(21).to_be_bytes());
            case.more(40, offset)
        });
    }
}

/// Clusters that unpack to more than they should, or never.
fn bombs(out: &mut Vec<Named>) {
    for zstd in [false, true] {
        let kind = if zstd { "zstd" } else { "zlib" };
        for bits in [9u32, 12, 16, 21] {
            let forge = move || Forge { zstd, ..Forge::new(bits) };
            add(out, format!("bomb/{kind}-{bits}-giant"), move |name| {
                // what is packed is 64 MiB, a cluster is asked for
                let mut image = forge().build();
                let mut packed = forge::pack(zstd, &vec![0; 64 << 20]);
                packed.truncate(1 << bits);
                image.put(forge::PACKED << bits, &packed);
                Case::qcow2(name, image.with("l2-1", forge().descriptor(packed.len())).bytes)
            });
            add(out, format!("bomb/{kind}-{bits}-all"), move |name| {
                // every cluster of the disk is the same packed one
                let mut image = forge().build();
                let word = forge().descriptor(forge().packed().len());
                fill(&mut image, forge::L2 << bits, (1 << bits) / 8, |_| word);
                let table = ((1u64 << bits) / 8) << bits;
                Case::qcow2(name, image.with("size", table.min(1 << 40)).bytes)
            });
            for (what, bytes) in junk(zstd) {
                add(out, format!("bomb/{kind}-{bits}-{what}"), move |name| {
                    let mut image = forge().build();
                    image.put(forge::PACKED << bits, &vec![0; 1 << bits]);
                    image.put(forge::PACKED << bits, &bytes[..bytes.len().min(1 << bits)]);
                    Case::qcow2(
                        name,
                        image.with("l2-1", forge().descriptor(bytes.len().min(1 << bits))).bytes,
                    )
                });
            }
            for (what, add_to) in [("long", 0x3fff_u64 << 40), ("end", 0), ("flag", COPIED)] {
                add(out, format!("bomb/{kind}-{bits}-{what}"), move |name| {
                    let image = forge().build();
                    let at =
                        if what == "end" { (forge::CLUSTERS << bits) - 512 } else { forge::PACKED << bits };
                    let word = forge::descriptor(bits, at, 1 << bits) | add_to;
                    Case::qcow2(name, image.with("l2-1", word).bytes)
                });
            }
        }
    }
}

/// Streams that are not what they say.
fn junk(zstd: bool) -> Vec<(&'static str, Vec<u8>)> {
    if !zstd {
        return vec![
            ("stored", [0x00u8, 0x00, 0x00, 0xff, 0xff].repeat(800)),
            ("dynamic", [0x04u8, 0xff, 0xff, 0xff].repeat(1000)),
            ("wrapped", [0x78u8, 0x9c, 0x03, 0x00].repeat(1000)),
            ("ones", vec![0xff; 4096]),
        ];
    }
    let frame = |head: &[u8], rest: &[u8]| [&[0x28u8, 0xb5, 0x2f, 0xfd], head, rest].concat();
    vec![
        // frame header descriptor: window of 2^41, then an RLE block
        ("window", frame(&[0x00, 0xf8], &[0x03, 0x00, 0x80, 0x00])),
        // a content of 2^64-1 in one segment: the window is as large
        ("content", frame(&[0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], &[0x03, 0, 1, 7])),
        ("content-gib", frame(&[0xe0, 0, 0, 0, 0x40, 0, 0, 0, 0], &[0x03, 0, 1, 7])),
        ("window-128m", frame(&[0x00, 0x88], &[0x02, 0, 0x10, 7].repeat(200))),
        ("dictionary", frame(&[0x23, 1, 2, 3, 4, 9], &[0x03, 0, 1, 7])),
        ("skippable", [0x50u8, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(500)),
        ("skip-huge", vec![0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff]),
        ("empty-blocks", frame(&[0x00, 0x00], &[0x00u8; 4000])),
        ("empty-frames", [0x28u8, 0xb5, 0x2f, 0xfd, 0x20, 0x00, 0x01, 0x00, 0x00].repeat(450)),
        ("old-frame", [0x1eu8, 0xb5, 0x2f, 0xfd].repeat(1000)),
        ("ones", vec![0xff; 4096]),
    ]
}

/// Disks that begin like other formats, some of which name files.
fn magics(out: &mut Vec<Named>) {
    let vmdk =
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";
    let table: Vec<(&'static str, u64, Vec<u8>)> = vec![
        ("vmdk-text", 0, format!("{vmdk}RW 128 FLAT \"decoy.raw\" 0\n").into_bytes()),
        (
            "vmdk-abs",
            0,
            format!("{vmdk}RW 128 FLAT \"/dev/full\" 0\nRW 1 FLAT \"../outside/secret.raw\" 0\n")
                .into_bytes(),
        ),
        ("vmdk-parent", 0, format!("{vmdk}parentFileNameHint=\"decoy.raw\"\n").into_bytes()),
        ("vmdk-sparse", 0, [b"KDMV".as_slice(), &[1, 0, 0, 0, 3, 0, 0, 0], &[0xff; 64]].concat()),
        ("vmdk-cowd", 0, [b"COWD".as_slice(), &[1, 0, 0, 0], &[0xff; 64]].concat()),
        ("vhdx", 0, b"vhdxfile".to_vec()),
        ("vpc", 0, b"conectix\0\0\0\x02".to_vec()),
        ("vdi", 64, vec![0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]),
        ("qed", 0, [b"QED\0".as_slice(), &[0, 0, 1, 0, 4, 0, 0, 0], &[0x01; 24], &[0x40; 32]].concat()),
        ("parallels", 0, b"WithoutFreeSpace\x02\0\0\0".to_vec()),
        ("parallels-ext", 0, b"WithouFreSpacExt\x02\0\0\0".to_vec()),
        ("bochs", 0, b"Bochs Virtual HD Image\0\0\0\0\0\0\0\0\0\0Redolog".to_vec()),
        (
            "cloop",
            0,
            b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
                .to_vec(),
        ),
        ("dmg", 0, b"koly\0\0\0\x04\0\0\x02\0".to_vec()),
        ("luks", 0, b"LUKS\xba\xbe\0\x01aes".to_vec()),
        ("qcow1", 0, [0x514649fbu32.to_be_bytes(), 1u32.to_be_bytes()].concat()),
        ("qcow4", 0, [0x514649fbu32.to_be_bytes(), 4u32.to_be_bytes()].concat()),
        ("qcow-max", 0, [0x514649fbu32.to_be_bytes(), u32::MAX.to_be_bytes()].concat()),
        ("iso", 0x8001, b"CD001".to_vec()),
        ("json", 0, b"json:{\"driver\":\"raw\",\"file.filename\":\"decoy.raw\"}".to_vec()),
        ("elf", 0, b"\x7fELF\x02\x01\x01".to_vec()),
    ];
    for (what, at, bytes) in table {
        for (how, format) in [("guess", None), ("raw", Some("raw")), ("qcow2", Some("qcow2"))] {
            let bytes = bytes.clone();
            add(out, format!("magic/{what}-{how}"), move |name| {
                Case::of(name, format, Vec::new())
                    .more(at, bytes.clone())
                    .long(1 << 20)
                    .with_data("decoy.raw", vec![1; 4096])
            });
        }
    }
    // a guessed image is qcow2, and is followed no further than one that is said to be
    add(out, "magic/qcow2-guess", |name| {
        let bytes =
            Forge::on(12, "json:{\"driver\":\"raw\",\"file.filename\":\"decoy.raw\"}", None).build().bytes;
        Case::of(name, None, bytes).with_data("decoy.raw", vec![1; 4096])
    });
    add(out, "magic/qcow2-in-raw", |name| {
        Case::of(name, Some("raw"), Forge::on(12, "decoy.raw", None).build().bytes)
            .with_data("decoy.raw", vec![1; 4096])
    });
}
