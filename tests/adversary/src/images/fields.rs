//! Every field of several images, made to say every kind of nonsense; and mutations of many fields at once by a seed.

use ringblock_tests::Rng;

use super::case::{Case, Named};
use super::forge::{self, Forge, Forged, Sense};

/// An image to poke at: its name, how it is made, and which fields (by the start of their names; none: all).
type Base = (&'static str, fn() -> Forge, &'static [&'static str]);

const HEADER: &[&str] =
    &["version", "cluster-bits", "size", "l1-", "reftable-", "snapshot", "refcount-0", "l2-0"];

const BASES: &[Base] = &[
    ("v3", || Forge::new(12), &[]),
    ("v2", || Forge { version: 2, ..Forge::new(16) }, HEADER),
    ("c512", || Forge { order: 6, ..Forge::new(9) }, HEADER),
    ("rc1", || Forge { order: 0, ..Forge::new(12) }, &["refcount-", "reftable-", "l1-0", "l2-"]),
    ("ext", || Forge { extended: true, ..Forge::new(14) }, &["l1-", "l2-", "snap-l2", "cluster-bits"]),
    (
        "zstd",
        || Forge { zstd: true, ..Forge::new(12) },
        &["l2-1", "compression", "incompatible", "refcount-12"],
    ),
    ("dirty", || Forge { dirty: true, ..Forge::new(12) }, &["l1-", "l2-", "ref", "snap-l", "bitmap-table"]),
    ("backing", || Forge::on(12, "base.raw", Some("raw")), &["backing-", "ext-format"]),
    ("data", || Forge::beside(12, "data.raw"), &["ext-data", "l2-", "incompatible", "autoclear"]),
];

/// What a field is made to say.
fn values(f: &forge::Field, image: &Forged) -> Vec<u64> {
    let (own, cluster, len) = (image.get(f.at, f.width), 1u64 << image.bits, image.bytes.len() as u64);
    let wide: Vec<u64> = match (f.sense, f.width) {
        (Sense::Offset, _) => {
            let flags = own & (forge::COPIED | forge::COMPRESSED);
            let places = [0, forge::REFTABLE, forge::REFBLOCK, forge::L1, forge::L2, forge::DATA];
            let mut v: Vec<u64> = places.iter().map(|c| (c << image.bits) | flags).collect();
            let others = [
                len - cluster,
                len,
                len + 64 * cluster,
                1 << 40,
                (1 << 55) + cluster,
                (1 << 56) - cluster,
                1 << 56,
                own.wrapping_add(512),
                own | 1,
                own | 2,
            ];
            v.extend(others.map(|x| x | flags));
            v.extend([
                own ^ forge::COPIED,
                own ^ forge::COMPRESSED,
                1 << 63,
                u64::MAX - 511,
                u64::MAX,
                i64::MAX as u64,
            ]);
            v
        }
        (_, 8) => vec![
            0,
            1,
            own.wrapping_add(1),
            own.wrapping_sub(1),
            own.wrapping_shl(1),
            1 << 31,
            1 << 32,
            1 << 40,
            1 << 56,
            (1 << 63) - 1,
            1 << 63,
            u64::MAX - 511,
            u64::MAX,
        ],
        (_, 4) => vec![
            0,
            1,
            own.wrapping_add(1),
            own.wrapping_sub(1),
            own.wrapping_mul(2),
            1024,
            0x1_0000,
            0x10_0000,
            0x40_0000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
        ],
        (_, 2) => vec![0, 1, own.wrapping_add(1), 0x3ff, 0x7fff, 0xffff],
        _ => vec![0, 1, 2, 9, 63, 64, 255],
    };
    let mask = if f.width == 8 { u64::MAX } else { (1 << (8 * f.width)) - 1 };
    let mut seen = vec![own];
    let fresh = |v: u64| {
        if seen.contains(&v) {
            None
        } else {
            seen.push(v);
            Some(v)
        }
    };
    wide.into_iter().map(|v| v & mask).filter_map(fresh).collect()
}

/// The case of an image of a base.
fn case(name: &str, bytes: Vec<u8>) -> Case {
    let mut case = Case { plenty: true, ..Case::qcow2(name, bytes) };
    if name.starts_with("backing/") || name.contains("-backing-") {
        case = case.with_data("base.raw", vec![0x42; 65536]).following("base.raw");
    }
    if case.external() {
        case = case.with_data("data.raw", vec![0x43; 65536]).following("data.raw");
    }
    case
}

/// One case for each field and value.
pub(super) fn pokes() -> Vec<Named> {
    let mut out = Vec::new();
    for (base, forge, wanted) in BASES {
        let image = forge().build();
        for f in &image.fields {
            if !wanted.is_empty() && !wanted.iter().any(|w| f.name.starts_with(w)) {
                continue;
            }
            for v in values(f, &image) {
                let (name, field) = (format!("{base}/{}={v:#x}", f.name), f.name.clone());
                out.push(Named::new(name.clone(), move |_| {
                    case(&name, forge().build().with(&field, v).bytes)
                }));
            }
        }
    }
    out
}

/// The mutation number `n` of a seed: some fields, some bytes, perhaps cut off.
pub(super) fn mutation(seed: u64, n: u64) -> Named {
    let mut rng = Rng::new(seed << 32 ^ n);
    let (base, forge, _) = *rng.pick(BASES);
    let name = format!("mutation-{base}-{seed}-{n}");
    Named::new(name.clone(), move |_| {
        let mut rng = rng.clone();
        let mut image = forge().build();
        for _ in 0..1 + rng.below(4) {
            let field = rng.pick(&image.fields).clone();
            let known = values(&field, &image);
            let value = if rng.chance(70) { *rng.pick(&known) } else { rng.next_u64() >> rng.below(64) };
            image.set(field.at, field.width, value);
        }
        let len = image.bytes.len() as u64;
        if rng.chance(30) {
            for _ in 0..1 + rng.below(8) {
                // metadata are early in their clusters
                let at = (rng.below(forge::CLUSTERS) << image.bits) + rng.below(128);
                let byte = rng.next_u64();
                image.set(at, 1, byte & 0xff);
            }
        }
        if rng.chance(20) {
            image.bytes.truncate(rng.below(len) as usize);
        }
        case(&name, image.bytes)
    })
}
