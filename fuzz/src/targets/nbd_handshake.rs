//! The option phase of an NBD connection; replies stay in proportion to what was asked.

use super::{Target, nbd_stream};
use crate::Outcome;
use ringblock_drivers::export::nbd::handshake::{Catalogue, ExportInfo, Handshake, Step};

pub(super) const TARGET: Target = Target {
    name: "nbd_handshake",
    run,
    seeds,
    words: &[
        b"IHAVEOPT\0\0\0",
        b"IHAVEOPT\0\0\0\x06",
        b"IHAVEOPT\0\0\0\x07",
        b"IHAVEOPT\0\0\0\x09",
        b"IHAVEOPT\0\0\0\x0a",
        b"base:allocation",
        b"base:",
        b"qemu:",
        b"qemu:allocation-depth",
        b"\0\0\0\x01d",
    ],
    longest: 1 << 16,
    share: 350_000,
};

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

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let (mut shake, mut at) = (Handshake::new(), 0);
    let (mut replies, mut seen) = (Vec::new(), 0);
    loop {
        let (used, step) = shake.step(&data[at..], &One, &mut replies);
        at += used;
        assert!(at <= data.len());
        assert!(replies.len() <= 64 * data.len() + 65_536, "{} bytes of replies", replies.len());
        // option and type of the reply
        if let Some(kind) = replies.get(seen..).and_then(|r| r.get(8..16)) {
            out.kind("reply", kind.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
        }
        seen = replies.len();
        let goes_on = step == Step::Again;
        match step {
            Step::Again => {}
            Step::More => out.kind("more", 0),
            Step::Close => out.kind("close", 0),
            Step::Enter(n) => {
                let contexts = u64::from(n.contexts.base) | u64::from(n.contexts.depth) << 1;
                out.kind("enter", u64::from(n.flags) << 8 | contexts << 4 | n.framing as u64);
            }
        }
        if !goes_on {
            return out;
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    use nbd_stream::{go, meta, option};
    let flags = 3u32.to_be_bytes().to_vec();
    let talk =
        [flags.clone(), option(3, b""), option(8, b""), option(10, &meta()), option(7, &go())].concat();
    let extended = [flags.clone(), option(11, b""), option(9, &meta()), option(6, &go())].concat();
    let short = [flags.clone(), option(1, b"d")].concat();
    vec![talk, extended, short, [flags.clone(), option(2, b"")].concat(), flags]
}
