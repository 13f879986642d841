//! A snapshot table; the first byte says how many entries the header promises. What is accepted survives a round trip.

use super::Target;
use crate::Outcome;
use ringblock_drivers::format::qcow2::snapshot_table::{self, Parsed};

pub(super) const TARGET: Target =
    Target { name: "snapshot_table", run, seeds, words: &[b"\0\0\0\x10"], longest: 2048, share: 350_000 };

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let Some((&count, table)) = data.split_first() else { return out };
    match snapshot_table::parse(table, u32::from(count)) {
        Err(e) => out.text("refused", &e.to_string()),
        Ok(Parsed::Need(n)) => {
            assert!(n > table.len() as u64, "more is needed, and {n} is not more");
            out.size("need", n);
        }
        Ok(Parsed::Done(snapshots, _)) => {
            out.size("snapshots", snapshots.len() as u64);
            for s in &snapshots {
                out.kind("disk size", u64::from(s.disk_size().is_some()));
                out.kind("icount", u64::from(s.icount().is_some()));
                out.size("name", s.name.len() as u64);
            }
            let bytes = snapshot_table::serialise(&snapshots).expect("what was accepted can be written");
            match snapshot_table::parse(&bytes, u32::from(count)) {
                Ok(Parsed::Done(again, _)) => assert_eq!(again, snapshots),
                other => panic!("written and not read: {other:?}"),
            }
        }
    }
    out
}

fn seeds() -> Vec<Vec<u8>> {
    let mut entry = vec![1u8];
    entry.extend(0x50000u64.to_be_bytes());
    entry.extend(2u32.to_be_bytes());
    entry.extend([0, 1, 0, 4]);
    entry.extend([0u8; 16]);
    entry.extend(0u32.to_be_bytes());
    entry.extend(16u32.to_be_bytes());
    entry.extend([0u8; 16]);
    entry.extend(b"1snap\0\0\0");
    let mut two = [entry.clone(), entry[1..].to_vec()].concat();
    two[0] = 2;
    vec![entry, two, vec![0], vec![255; 300]]
}
