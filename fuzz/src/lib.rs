//! Fuzz targets: what Ringblock reads from strangers, as plain functions on bytes.
//!
//! ```text
//!   cargo fuzz run TARGET --features libfuzzer       coverage-guided, for as long as you like
//!   cargo test -p ringblock-fuzz                     the same functions under a small seeded mutator, on stable
//! ```
//!
//! Property of all: no panic, memory bounded by the input, and what was accepted survives a round trip.
#![forbid(unsafe_code)]

use ringblock_drivers::export::nbd::handshake::{Catalogue, ExportInfo, Handshake, Step};
use ringblock_drivers::format::qcow2::header::Header;
use ringblock_drivers::format::qcow2::snapshot_table;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::{from_arg, json};

/// A qcow2 header: parsed, written back, and parsed again to the same.
pub fn qcow2_header(data: &[u8]) {
    let Ok(header) = Header::parse(data) else { return };
    if let Ok(bytes) = header.serialise() {
        let mut cluster = bytes.clone();
        cluster.resize(1 << header.cluster_bits, 0);
        let again = Header::parse(&cluster).expect("what we wrote, we read");
        assert_eq!(again.serialise().expect("twice"), bytes);
    }
}

/// A snapshot table; the first byte says how many entries the header promises.
pub fn snapshot_table(data: &[u8]) {
    let Some((&count, table)) = data.split_first() else { return };
    if let Ok(snapshot_table::Parsed::Done(snapshots, _)) = snapshot_table::parse(table, u32::from(count)) {
        let bytes = snapshot_table::serialise(&snapshots).expect("what was accepted can be written");
        match snapshot_table::parse(&bytes, u32::from(count)) {
            Ok(snapshot_table::Parsed::Done(again, _)) => assert_eq!(again, snapshots),
            other => panic!("written and not read: {other:?}"),
        }
    }
}

struct One;

impl Catalogue for One {
    fn find(&self, name: &[u8]) -> Option<ExportInfo> {
        (name == b"d" || name.is_empty()).then(|| self.all().remove(0))
    }
    fn all(&self) -> Vec<ExportInfo> {
        vec![ExportInfo {
            name: "d".into(),
            description: Some("disk".into()),
            size: 1 << 30,
            flags: 1,
            block_min: 1,
            block_preferred: 4096,
            depth: true,
        }]
    }
    fn count(&self) -> usize {
        1
    }
}

/// The option phase of an NBD connection; replies stay in proportion to what was asked.
pub fn nbd_handshake(data: &[u8]) {
    let (mut shake, mut at) = (Handshake::new(), 0);
    let mut out = Vec::new();
    loop {
        let (used, step) = shake.step(&data[at..], &One, &mut out);
        at += used;
        assert!(at <= data.len());
        assert!(out.len() <= 64 * data.len() + 65_536, "{} bytes of replies", out.len());
        if step != Step::Again {
            return;
        }
    }
}

/// A QMP stream: every message that is accepted is written in a form that reads as the same.
pub fn json(data: &[u8]) {
    let mut reader = json::Reader::default();
    reader.feed(data, &mut |message| {
        if let Ok(value) = message {
            let text = json::write(&value, false);
            assert!(text.is_ascii());
            // as text: a number without a fraction comes back as an integer
            assert_eq!(json::write(&json::parse(&text).expect("what we wrote, we read"), false), text);
        }
    });
    reader.finish(&mut |_| {});
}

/// An option string of `--blockdev`.
pub fn options(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = from_arg::<BlockdevOptions>(text, Some("driver"));
    }
}
