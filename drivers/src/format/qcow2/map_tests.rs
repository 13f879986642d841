//! Tests of lookups: what they say of each kind of entry, and what readers see while the home core changes things.

use ringblock_engine::driver::Extent;
use ringblock_engine::units::HostOffset;

use super::*;
use crate::format::qcow2::entry::Packed;
use crate::format::qcow2::geometry::GuestCluster;

const CS: u64 = 16384;

fn shared(extended: bool, below: Option<ChildIx>) -> Shared {
    let geometry = Geometry::new(14, 4, extended).unwrap();
    let format = EntryFormat { geometry, zero_flag: true, external_data: false };
    let s = Shared::new(format, 1 << 30, 4, 0, below);
    s.fill(0, std::iter::empty());
    s.set_place(SliceIndex(0), Place::Frame(0));
    s.set_place(SliceIndex(1), Place::Empty);
    s
}

fn put(s: &Shared, c: u64, e: L2Entry) {
    s.publish(0, s.geometry().in_slice(GuestCluster(c)), s.format().encode(e));
}

fn at(host: u64, copied: bool) -> Allocation {
    Allocation { host: HostOffset(host), copied }
}

fn look(s: &Shared, access: Access, range: Range<u64>) -> (Lookup, Vec<Extent>) {
    let mut out = Extents::new();
    let lookup = s.lookup(access, range, &mut out);
    (lookup, out.as_slice().to_vec())
}

/// Goal: each kind of entry reads as what it is, and neighbours that follow each other become one extent. Method: one
/// cluster of each kind, read from the middle of the first to the middle of the last.
#[test]
fn reads_of_every_kind() {
    let s = shared(false, Some(3));
    put(&s, 0, L2Entry::Data(at(10 * CS, true)));
    put(&s, 1, L2Entry::Data(at(11 * CS, false)));
    put(&s, 3, L2Entry::Zero { kept: Some(at(20 * CS, true)) });
    put(&s, 4, L2Entry::Zero { kept: None });
    let packed = L2Entry::Compressed(Packed { at: HostOffset(777), len: 512 - 265 });
    put(&s, 5, packed);
    let (lookup, list) = look(&s, Access::Read, 512..6 * CS - 512);
    assert_eq!(lookup, Lookup::Hit);
    let targets = [
        (2 * CS - 512, Target::Data { child: 0, off: 10 * CS + 512 }),
        (CS, Target::Below { child: 3, off: 2 * CS }),
        (CS, Target::Zero { keeps: Some((0, 20 * CS)) }),
        (CS, Target::Zero { keeps: None }),
        (CS - 512, Target::Encoded { cookie: s.format().encode(packed).word }),
    ];
    assert_eq!(list, targets.map(|(len, target)| Extent { len, target }));
}

/// Goal: slices are known, empty or missed. Method: ranges in each and across.
#[test]
fn slices_missing_and_empty() {
    let s = shared(false, None);
    let span = s.geometry().slice_span();
    let (lookup, list) = look(&s, Access::Read, span..2 * span);
    assert_eq!(
        (lookup, list),
        (Lookup::Hit, vec![Extent { len: span, target: Target::Hole { keeps: None } }])
    );
    assert_eq!(look(&s, Access::Read, 2 * span..3 * span), (Lookup::Miss(2), vec![]));
    let (lookup, list) = look(&s, Access::Read, span..3 * span);
    assert_eq!((lookup, list.len(), list[0].len), (Lookup::Hit, 1, span));
    assert_eq!(look(&s, Access::Write, span..span + 100).0, Lookup::NeedsClaim { len: 100 });
    assert_eq!(look(&s, Access::Write, 3 * span..3 * span + 1).0, Lookup::Miss(3));
}

/// Goal: only what is allocated here alone is written in place, and a claim is asked for as far as it is needed. Method:
/// ours, ours, shared, unallocated, ours.
#[test]
fn writes_in_place_or_claimed() {
    let s = shared(false, None);
    put(&s, 0, L2Entry::Data(at(10 * CS, true)));
    put(&s, 1, L2Entry::Data(at(30 * CS, true)));
    put(&s, 2, L2Entry::Data(at(40 * CS, false)));
    put(&s, 4, L2Entry::Data(at(50 * CS, true)));
    let (lookup, list) = look(&s, Access::Write, 100..5 * CS);
    assert_eq!((lookup, list.len()), (Lookup::Hit, 2));
    assert_eq!(look(&s, Access::Write, 2 * CS + 5..5 * CS).0, Lookup::NeedsClaim { len: 2 * CS - 5 });
    assert_eq!(look(&s, Access::Write, 3 * CS..3 * CS + 7).0, Lookup::NeedsClaim { len: 7 });
    put(&s, 4, L2Entry::Unallocated);
    s.publish(0, InSlice(4), RawEntry::from(crate::format::qcow2::entry::BROKEN));
    assert_eq!(look(&s, Access::Read, 4 * CS..5 * CS).0, Lookup::Bad(Errno::EIO));
}

/// Goal: subclusters are told apart. Method: a pattern of allocated, zero and unallocated ones.
#[test]
fn subclusters() {
    let s = shared(true, Some(1));
    let sub = s.geometry().subcluster_size();
    put(&s, 0, L2Entry::Sub { host: Some(at(10 * CS, true)), allocated: 0b0011, zero: 0b0100 });
    let (_, list) = look(&s, Access::Read, 1..CS);
    let targets = [
        (2 * sub - 1, Target::Data { child: 0, off: 10 * CS + 1 }),
        (sub, Target::Zero { keeps: Some((0, 10 * CS + 2 * sub)) }),
        (29 * sub, Target::Below { child: 1, off: 3 * sub }),
    ];
    assert_eq!(list, targets.map(|(len, target)| Extent { len, target }));
    assert_eq!(
        look(&s, Access::Write, 0..CS).1,
        vec![Extent { len: 2 * sub, target: Target::Data { child: 0, off: 10 * CS } }]
    );
    assert_eq!(look(&s, Access::Write, 2 * sub + 1..CS).0, Lookup::NeedsClaim { len: 30 * sub - 1 });
    put(&s, 0, L2Entry::Sub { host: Some(at(10 * CS, true)), allocated: 0b1001, zero: 0 });
    assert_eq!(look(&s, Access::Write, sub..CS).0, Lookup::NeedsClaim { len: 2 * sub });
}

/// Goal: a reader never sees half of a change, nor an entry of another slice. Method: one thread switches two-word
/// entries and moves slices between frames, the other checks that all it sees belongs together.
#[test]
fn readers_see_whole_entries() {
    let s = shared(true, None);
    s.set_place(SliceIndex(0), Place::Missing);
    let stop = AtomicBool::new(false);
    // counted here, so that the writer goes on until a reader that starts late has seen something
    let seen = AtomicU64::new(0);
    let span = s.geometry().slice_span();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for slice in [0u64, 2] {
                    let (lookup, list) = look(&s, Access::Read, slice * span..slice * span + CS);
                    match (lookup, list.first()) {
                        (Lookup::Miss(_), _) => {}
                        (Lookup::Hit, Some(&Extent { target: Target::Data { off, .. }, len })) => {
                            // The host offset says which slice, and how many subclusters are allocated.
                            let sub = s.geometry().subcluster_size();
                            assert_eq!(off / CS % 2, slice / 2, "an entry of another slice");
                            assert_eq!(len / sub, off / CS / 2, "half an entry");
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        let entry = |slice: u64, n: u64| {
            let host = at((2 * n + slice / 2) * CS, true);
            s.format().encode(L2Entry::Sub { host: Some(host), allocated: (1u32 << n) - 1, zero: 0 })
        };
        let enough = |round: u64| round >= 200_000 && seen.load(Ordering::Relaxed) > 0;
        for round in (0..u64::MAX).take_while(|&round| !enough(round) && !reader.is_finished()) {
            let slice = round / 7 % 2 * 2;
            let n = round % 5 + 1;
            if round % 7 == 0 {
                s.set_place(SliceIndex(2 - slice), Place::Missing);
                let raw = entry(slice, n);
                s.fill((round / 7 % 3) as u32, [raw.word, raw.bitmap].into_iter());
                s.set_place(SliceIndex(slice), Place::Frame((round / 7 % 3) as u32));
            } else {
                s.publish((round / 7 % 3) as u32, InSlice(0), entry(slice, n));
            }
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}
