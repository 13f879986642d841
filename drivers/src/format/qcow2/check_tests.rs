//! The checker against qemu-img, on damaged images; repair; and images made to do harm.

use std::path::Path;
use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::driver::Punch;

use super::check::{self, CheckReport, Repair};
use super::simkit::{Disk, Sim, SimFile, SimFiles};
use super::testkit::{Random, Scratch, qemu_img, qemu_io};

/// Our report on an image in memory, and the image afterwards.
fn ours(bytes: Vec<u8>, fix: Repair) -> (Result<CheckReport, String>, Vec<u8>) {
    let sim = Sim::new(1);
    let file = SimFile::new(&sim, bytes);
    let f = file.clone();
    let report = sim.run(async move { check::run(&*f, fix).await.map_err(|e| e.message) });
    (report, file.content())
}

/// A number in the JSON of qemu-img, 0 where it is left out.
fn number(json: &str, name: &str) -> u64 {
    let Some(at) = json.find(&format!("\"{name}\": ")) else { return 0 };
    json[at + name.len() + 4..]
        .chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap_or(0)
}

/// An image with something of everything.
fn sample(dir: &Scratch, opts: &str) -> Vec<u8> {
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "1M"]);
    qemu_io(dir, &["-f", "qcow2", "-c", "write -P 1 0 200k", "-c", "write -c -P 2 512k 64k", "a.qcow2"]);
    if !opts.contains("data_file") {
        qemu_img(dir, &["snapshot", "-c", "s", "a.qcow2"]);
    }
    qemu_io(dir, &["-f", "qcow2", "-c", "write -P 3 100k 30k", "-c", "write -z 700k 128k", "a.qcow2"]);
    std::fs::read(dir.path("a.qcow2")).unwrap()
}

fn peer(dir: &Scratch, bytes: &[u8]) -> (i32, String) {
    std::fs::write(dir.path("b.qcow2"), bytes).unwrap();
    let (rc, out, err) = qemu_img(dir, &["check", "-f", "qcow2", "--output=json", "b.qcow2"]);
    (rc, out + &err)
}

/// Goal: on sound images the numbers are those of qemu-img. Method: several geometries, all fields compared.
#[test]
fn sound_images_get_the_same_numbers() {
    for opts in [
        "cluster_size=64k",
        "cluster_size=512",
        "extended_l2=on",
        "refcount_bits=64,compat=v3",
        "data_file=d",
    ] {
        let dir = Scratch::new();
        let bytes = sample(&dir, opts);
        let (rc, out) = peer(&dir, &bytes);
        let report = ours(bytes, Repair::None).0.unwrap();
        assert!(rc == 0 && report.is_clean(), "{opts}: {out} {report:?}");
        let mine = [
            report.total_clusters,
            report.allocated_clusters,
            report.fragmented_clusters,
            report.compressed_clusters,
            report.image_end_offset,
        ];
        let names = [
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
            "image-end-offset",
        ];
        assert_eq!(mine, names.map(|n| number(&out, n)), "{opts}: {out}");
    }
}

/// Goal: what qemu-img calls damaged is damaged here too, and the other way round, with the same kind of finding.
/// Method: random changes of 8 bytes in tables of a small image; both report; repair -r all then satisfies both.
#[test]
fn damaged_images_get_the_same_verdict() {
    let dir = Scratch::new();
    let good = sample(&dir, "cluster_size=4k");
    let mut random = Random::new(11);
    let (mut wrong, mut damaged) = (Vec::new(), 0);
    for round in 0..250 {
        let mut bytes = good.clone();
        // Tables only: damage to guest data is none of a checker's business.
        let at = loop {
            let at = random.below(bytes.len() as u64 / 8) * 8;
            if at >= 4096
                && bytes[at as usize..at as usize + 8] != [1; 8]
                && bytes[at as usize..at as usize + 8] != [3; 8]
            {
                break at as usize;
            }
        };
        match random.below(3) {
            0 => bytes[at + random.below(8) as usize] ^= 1 << random.below(8),
            1 => bytes[at..at + 8].fill(0),
            _ => bytes[at + 6] ^= 0x10,
        }
        let (rc, out) = peer(&dir, &bytes);
        let verdict = match ours(bytes.clone(), Repair::None).0 {
            Err(_) => 1,
            Ok(r) if r.corruptions + r.check_errors > 0 => 2,
            Ok(r) => i32::from(r.leaks > 0) * 3,
        };
        damaged += i32::from(verdict != 0);
        if rc != verdict {
            wrong.push(format!("round {round} at {at:#x}: peer {rc}, here {verdict}: {out}"));
        }
    }
    assert!(damaged > 20, "{damaged} of the changes mattered");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Goal: repair puts refcounts and flags right without changing what the guest reads, and doing it again changes nothing.
/// Method: refcounts raised, lowered and cleared at random; repaired; qemu-img checks and compares.
#[test]
fn repair_puts_refcounts_right() {
    for opts in ["cluster_size=4k", "cluster_size=512", "cluster_size=512,refcount_bits=64", "extended_l2=on"]
    {
        let dir = Scratch::new();
        let good = sample(&dir, opts);
        std::fs::write(dir.path("good.qcow2"), &good).unwrap();
        let header = super::header::Header::parse(&good[..1 << 9.max(good[23])]).unwrap();
        let g = header.geometry().unwrap();
        let table = header.reftable_offset.0 as usize;
        let block = u64::from_be_bytes(good[table..table + 8].try_into().unwrap()) as usize;
        let mut random = Random::new(5);
        for round in 0..20 {
            let mut bytes = good.clone();
            for _ in 0..=random.below(5) {
                let c = super::geometry::InBlock(random.below(g.refblock_entries().min(200)));
                let part = &mut bytes[block..block + g.cluster_size() as usize];
                assert!(super::refcount::set(part, g.refcount_order, c, random.below(4)));
            }
            if random.below(4) == 0 {
                bytes[table..table + 8].fill(0);
            }
            let (report, fixed) = ours(bytes, Repair::All);
            let report = report.unwrap();
            assert!(report.is_clean(), "{opts} round {round}: {report:?}");
            let (rc, out) = peer(&dir, &fixed);
            assert_eq!(rc, 0, "{opts} round {round}: {out}");
            let (rc, out, err) =
                qemu_img(&dir, &["compare", "-f", "qcow2", "-F", "qcow2", "b.qcow2", "good.qcow2"]);
            assert_eq!(rc, 0, "{opts} round {round}: {out}{err}");
            assert!(
                ours(fixed.clone(), Repair::All).1 == fixed,
                "{opts} round {round}: repair is a fixpoint"
            );
        }
    }
}

/// Goal: leaks alone are taken back in place; lower refcounts are left to a full repair. Method: one of each.
#[test]
fn leaks_are_taken_back() {
    let dir = Scratch::new();
    let good = sample(&dir, "cluster_size=64k");
    let at = 0x20000 + 200 * 2 + 1;
    let mut bytes = good.clone();
    bytes[at] = 1;
    bytes.resize(201 * 65536, 0);
    let (report, fixed) = ours(bytes.clone(), Repair::Leaks);
    let report = report.unwrap();
    assert_eq!((report.leaks_fixed, report.is_clean()), (1, true), "{report:?}");
    assert_eq!(peer(&dir, &fixed).0, 0);
    bytes[0x20000 + 3] = 0;
    let report = ours(bytes, Repair::Leaks).0.unwrap();
    assert!(report.messages.iter().any(|m| m == "ERROR need to rebuild refcount structures"), "{report:?}");
}

/// Goal: no image, however mangled, makes a reader, a writer or the checker panic, hang or use memory without bound.
/// Method: random changes all over an image, opened, read, written, punched and flushed; errors are fine.
#[test]
fn mangled_images_do_not_panic() {
    for (n, opts) in
        ["cluster_size=512", "cluster_size=4k,refcount_bits=1", "extended_l2=on,cluster_size=16k"]
            .iter()
            .enumerate()
    {
        let dir = Scratch::new();
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "300k"]);
        qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 1 0 100k", "-c", "write -c -P 2 192k 64k", "a.qcow2"]);
        let good = std::fs::read(dir.path("a.qcow2")).unwrap();
        let mut random = Random::new(n as u64 + 1);
        for _ in 0..400 {
            let mut bytes = good.clone();
            for _ in 0..=random.below(6) {
                let at = random.below(bytes.len() as u64 - 8) as usize;
                let near = at & !7;
                match random.below(4) {
                    0 => bytes[at] = random.next() as u8,
                    1 => bytes[near] ^= 0x80,
                    2 => bytes[near..near + 8]
                        .copy_from_slice(&(random.below(400) << 9 | random.below(2) << 63).to_be_bytes()),
                    _ => bytes[near..near + 8].fill(random.next() as u8),
                }
            }
            let (_, _) = ours(bytes.clone(), Repair::All);
            use_it(bytes, &mut random);
        }
    }
}

/// Opens and uses an image; errors are fine.
fn use_it(bytes: Vec<u8>, random: &mut Random) {
    let sim = Sim::new(random.next());
    let file = SimFile::new(&sim, bytes);
    let seed = random.next();
    let (s, f) = (sim.clone(), file.clone());
    sim.run(async move {
        let Ok(disk) = Disk::try_open(&s, SimFiles::one(f), None).await else { return };
        let mut random = Random::new(seed);
        let size = disk.shared.size().min(1 << 20) & !511;
        if size == 0 {
            return;
        }
        for _ in 0..20 {
            let at = random.below(size / 512) * 512;
            let end = (at + 512 * (1 + random.below(100))).min(size);
            let _: Result<(), Errno> = match random.below(4) {
                0 => disk.read(at..end).await.map(drop),
                1 => disk.write(at, &vec![9; (end - at) as usize]).await,
                2 => disk.image.punch(at..end, Punch::Discard).await,
                _ => disk.image.flush().await,
            };
        }
        let _ = disk.image.close().await;
        let _: Rc<Disk> = disk;
    });
}

/// Goal: the messages are those of qemu-img. Method: one leak and one low refcount.
#[test]
fn messages_are_those_of_qemu_img() {
    let dir = Scratch::new();
    let mut bytes = sample(&dir, "cluster_size=64k");
    bytes[0x20000 + 4 * 2 + 1] = 9;
    bytes[0x20000 + 3] = 0;
    std::fs::write(dir.path("b.qcow2"), &bytes).unwrap();
    let (_, out, err) = qemu_img(&dir, &["check", "-f", "qcow2", "b.qcow2"]);
    let report = ours(bytes, Repair::None).0.unwrap();
    for line in &report.messages {
        assert!(format!("{out}{err}").contains(line.as_str()), "{line} is not in\n{out}{err}");
    }
    assert!(Path::new(&dir.path("b.qcow2")).exists() && report.messages.len() >= 2);
}

/// Goal: clusters in use behind the end of the file, whose length a crash took, are neither given away nor written over.
/// Method: a dirty image cut off in its data, its refcounts gone; repaired, all is in place and reads as before.
#[test]
fn references_behind_the_end_are_kept() {
    let dir = Scratch::new();
    qemu_img(
        &dir,
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts=on", "a.qcow2", "1M"],
    );
    qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 1 0 400k", "a.qcow2"]);
    let mut bytes = std::fs::read(dir.path("a.qcow2")).unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    bytes[table..table + 8].fill(0);
    bytes[79] |= 1;
    let whole = bytes.len();
    bytes.truncate(whole - 200 * 1024);
    let (report, fixed) = ours(bytes.clone(), Repair::All);
    assert!(report.as_ref().is_ok_and(CheckReport::is_clean), "{report:?}");
    assert!(fixed.len() > whole && fixed[79] & 1 == 0);
    let (rc, out) = peer(&dir, &fixed);
    assert_eq!(rc, 0, "{out}");
    let (_, out, _) =
        qemu_io(&dir, &["-f", "qcow2", "-c", "read -P 1 0 190k", "-c", "read -P 0 212k 188k", "b.qcow2"]);
    assert!(!out.contains("failed"), "{out}");
    assert!(ours(fixed.clone(), Repair::All).1 == fixed, "repair is a fixpoint");
}

/// Goal: what cannot be put right keeps the dirty bit, and its clusters. Method: a compressed cluster with the COPIED flag,
/// and a table entry that is not aligned; a leak besides.
#[test]
fn what_cannot_be_repaired_stays() {
    let dir = Scratch::new();
    let good = sample(&dir, "cluster_size=64k");
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    let packed = (0..16).map(|i| l2 + i * 8).find(|&at| good[at] & 0x40 != 0).expect("a compressed cluster");
    let mut copied = good.clone();
    copied[packed] |= 0x80;
    copied[79] |= 1;
    let (report, fixed) = ours(copied.clone(), Repair::All);
    let report = report.unwrap();
    assert!(report.corruptions > 0 && report.leaks_fixed == 0, "{report:?}");
    assert!(fixed == copied, "nothing of it is given away, and the image is still dirty");
    let mut unaligned = good;
    unaligned[l1 + 6] |= 2;
    let (report, fixed) = ours(unaligned.clone(), Repair::Leaks);
    assert!(report.is_ok_and(|r| r.check_errors > 0) && fixed == unaligned);
}

/// Goal: the clusters of an external data file are nobody else's, and their flags have to say so. Method: flags cleared;
/// qemu-img finds as many errors as we do, and none after a repair.
#[test]
fn flags_of_an_external_data_file() {
    let dir = Scratch::new();
    let mut bytes = sample(&dir, "cluster_size=64k,data_file=d.raw");
    let word = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    let l1 = word(&bytes, 40) as usize;
    let l2 = (word(&bytes, l1) & super::entry::OFFSET_MASK) as usize;
    for i in 1..3 {
        bytes[l2 + 8 * i] &= 0x7f;
    }
    let (report, _) = ours(bytes.clone(), Repair::None);
    assert_eq!(report.unwrap().corruptions, 2);
    let (rc, out) = peer(&dir, &bytes);
    assert!(rc == 2 && out.contains("OFLAG_COPIED data cluster: l2_entry=10000 refcount=1"), "{rc} {out}");
    let (report, fixed) = ours(bytes, Repair::All);
    assert!(report.is_ok_and(|r| r.is_clean() && r.corruptions_fixed == 2));
    assert_eq!(peer(&dir, &fixed).0, 0);
}

/// Goal: where the L1 table lies in the header nobody can tell what is in use, so nothing is given away. Method: its offset is
/// that of the header; a repair leaves every byte. (Refcount structures may lie anywhere: they are built anew.)
#[test]
fn tangled_images_are_not_repaired() {
    let dir = Scratch::new();
    let good = sample(&dir, "cluster_size=4k");
    let mut bytes = good.clone();
    bytes[40..48].fill(0);
    for fix in [Repair::Leaks, Repair::All] {
        let (report, after) = ours(bytes.clone(), fix);
        assert!(after == bytes, "{fix:?}: {report:?}");
        assert!(report.is_ok_and(|r| r.check_errors > 0 && !r.is_clean()));
    }
}

/// Goal: a repair is done when it is done. Method: a data cluster that an entry shares with the refcount block; the block is
/// made anew elsewhere, so that the cluster has one user and its flag has to be set again.
#[test]
fn one_repair_is_enough() {
    let dir = Scratch::new();
    let mut bytes = sample(&dir, "cluster_size=4k");
    let word = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    qemu_img(&dir, &["snapshot", "-d", "s", "a.qcow2"]);
    bytes = std::fs::read(dir.path("a.qcow2")).unwrap_or(bytes);
    let block = word(&bytes, word(&bytes, 48) as usize);
    let l2 = (word(&bytes, word(&bytes, 40) as usize) & super::entry::OFFSET_MASK) as usize;
    bytes[l2..l2 + 8].copy_from_slice(&(block | super::entry::COPIED).to_be_bytes());
    let (report, fixed) = ours(bytes, Repair::All);
    assert!(report.as_ref().is_ok_and(CheckReport::is_clean), "{report:?}");
    let (report, again) = ours(fixed.clone(), Repair::All);
    assert!(report.is_ok_and(|r| r.is_clean() && r.corruptions_fixed + r.leaks_fixed == 0));
    assert!(again == fixed, "nothing was left to do");
}

/// Goal: a repair that a power cut interrupts can be repeated, and never makes it worse. Method: damaged counters and flags;
/// power cuts at every moment of the repair; each state is repaired again, and qemu-img finds the same data.
#[test]
fn interrupted_repairs_can_be_repeated() {
    let dir = Scratch::new();
    for (n, opts) in ["cluster_size=4k", "cluster_size=512,compat=0.10", "extended_l2=on"].iter().enumerate()
    {
        let good = sample(&dir, opts);
        std::fs::write(dir.path("good.qcow2"), &good).unwrap();
        let header = super::header::Header::parse(&good[..1 << 9.max(good[23])]).unwrap();
        let g = header.geometry().unwrap();
        let table = header.reftable_offset.0 as usize;
        let block = u64::from_be_bytes(good[table..table + 8].try_into().unwrap()) as usize;
        let mut random = Random::new(n as u64);
        for round in 0..6 {
            let mut bytes = good.clone();
            for _ in 0..8 {
                let c = super::geometry::InBlock(random.below(g.refblock_entries().min(100)));
                let value = if round < 3 { 1 + random.below(3) } else { random.below(3) };
                let part = &mut bytes[block..block + g.cluster_size() as usize];
                assert!(super::refcount::set(part, g.refcount_order, c, value));
            }
            let sim = Sim::new(round);
            let file = SimFile::new(&sim, bytes);
            let f = file.clone();
            let report = sim.run(async move { check::run(&*f, Repair::All).await.unwrap() });
            assert!(report.is_clean(), "{opts} round {round}: {report:?}");
            for time in 0..=sim.stamp() {
                let state = file.crash_image(time, &mut random);
                let (report, fixed) = ours(state, Repair::All);
                let what = format!("{opts} round {round} time {time}");
                assert!(report.as_ref().is_ok_and(CheckReport::is_clean), "{what}: {report:?}");
                let (rc, out) = peer(&dir, &fixed);
                assert_eq!(rc, 0, "{what}: {out}");
                let (rc, out, err) =
                    qemu_img(&dir, &["compare", "-f", "qcow2", "-F", "qcow2", "b.qcow2", "good.qcow2"]);
                assert_eq!(rc, 0, "{what}: {out}{err}");
            }
        }
    }
}

/// An image whose first refcount table entry, and whose header, can be pointed elsewhere; and its first data cluster.
fn with_tables(dir: &Scratch) -> (Vec<u8>, usize, u64) {
    let good = sample(dir, "cluster_size=4k");
    std::fs::write(dir.path("good.qcow2"), &good).unwrap();
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let table = word(48) as usize;
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let data = word(l2) & 0x00ff_ffff_ffff_fe00;
    (good, table, data)
}

/// Goal: where an old refcount structure lay over something else, that has one reference after a rebuild, and its COPIED flag
/// says so. Method: a refcount block, and the table, over a data cluster and over the header; one full repair is enough.
#[test]
fn structures_over_something_else_are_given_up() {
    let dir = Scratch::new();
    let (good, table, data) = with_tables(&dir);
    for (what, at, value) in [
        ("a block over data", table, data),
        ("the table over data", 48, data),
        ("the table over the header", 48, 0),
        ("the table over itself as a block", table, table as u64),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        let (report, fixed) = ours(bytes, Repair::All);
        assert!(report.as_ref().is_ok_and(CheckReport::is_clean), "{what}: {report:?}");
        let (rc, out) = peer(&dir, &fixed);
        assert_eq!(rc, 0, "{what}: {out}");
        let (rc, out, err) =
            qemu_img(&dir, &["compare", "-f", "qcow2", "-F", "qcow2", "b.qcow2", "good.qcow2"]);
        assert_eq!(rc, 0, "{what}: {out}{err}");
        assert!(ours(fixed.clone(), Repair::All).1 == fixed, "{what}: repair is a fixpoint");
    }
}

/// Goal: damaged fields get the verdict of the peer: corrupt, or not to be checked at all. Method: fields of the header, of the
/// refcount table, of the L1 table and of the snapshot table, each with a value that once was judged otherwise.
#[test]
fn damaged_fields_get_the_same_verdict() {
    let dir = Scratch::new();
    let good = sample(&dir, "cluster_size=4k");
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let (l1, table, snapshots) = (word(40) as usize, word(48) as usize, word(64) as usize);
    let mut bad = Vec::new();
    for (at, value) in [
        (table, word(table) | 2),
        (table, word(table) | 0x400),
        (table, word(table) | 1 << 63),
        (64, word(64) | 2),
        (64, 1 << 63),
        (40, 1 << 57),
        (88, 2),
        (l1, word(l1) | 0x200),
        (snapshots + 32, word(snapshots + 32) & !0xffff_ffff),
        (snapshots + 32, word(snapshots + 32) | 0x1000),
        (snapshots, word(snapshots) | 1 << 63),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        let (rc, out) = peer(&dir, &bytes);
        let ours = ours(bytes, Repair::None).0;
        let code = match &ours {
            Err(_) => 1,
            Ok(r) if r.check_errors > 0 => 1,
            Ok(r) if r.corruptions > 0 => 2,
            Ok(r) => i32::from(r.leaks > 0) * 3,
        };
        if code != rc {
            bad.push(format!("{at:#x} {value:#x}: peer {rc}, here {code} {ours:?}: {out}"));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

/// Goal: with an external data file every allocated cluster has COPIED, and a repair sets it. Method: one flag cleared.
#[test]
fn copied_with_a_data_file() {
    let dir = Scratch::new();
    let good = sample(&dir, "data_file=d");
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let entry = (l2..l2 + 4096).step_by(8).find(|&at| word(at) & 0x00ff_ffff_ffff_fe00 != 0).unwrap();
    let mut bytes = good.clone();
    bytes[entry] &= 0x7f;
    assert_eq!(peer(&dir, &bytes).0, 2);
    let (report, fixed) = ours(bytes, Repair::All);
    assert!(report.as_ref().is_ok_and(|r| r.is_clean() && r.corruptions_fixed == 1), "{report:?}");
    assert!(fixed == good);
}
