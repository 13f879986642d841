//! What users type to say which image, and how large: plain paths, `PROTOCOL:PATH`, `json:{…}`, image options, sizes.
//! Nothing is opened; a size for people is short.

use super::Target;
use crate::Outcome;
use ringblock::tool::{names, parse_size};
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::size::{self, human};
use ringblock_drivers::options::{Mode, from_tree};

pub(super) const TARGET: Target = Target {
    name: "names",
    run,
    seeds,
    words: &[
        b"json:{",
        b"json:",
        b"file:",
        b"host_device:",
        b"nbd:",
        b"/dev/null",
        b"'driver':",
        b"'file':{",
        b"'filename':'x'",
        b"driver=",
        b"file.filename=",
        b"backing.",
        b"0x",
        b".5",
        b"k",
        b"E",
        b"18446744073709551615",
        b"'backing':null",
    ],
    longest: 2048,
    share: 200_000,
};

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let Ok(text) = std::str::from_utf8(data) else { return out };
    // nothing on this machine is to be looked at, so paths lead nowhere
    let text = text.replace('/', "\u{2215}");
    for format in [None, Some("raw"), Some("qcow2"), Some("file")] {
        let tree = names::from_name(&text, format);
        out.result("name", &tree);
        let typed = tree.and_then(|t| from_tree::<BlockdevOptions>(&t, Mode::Keyval));
        out.result("typed", &typed);
    }
    let tree = names::from_options(&text);
    out.result("options", &tree);
    out.result("plain", &names::plain_path(&text));
    sizes(&text, &mut out);
    out
}

fn sizes(text: &str, out: &mut Outcome) {
    match (size::parse(text, 0), parse_size(text)) {
        (Ok(n), limited) => {
            assert_eq!(limited.is_ok(), n <= i64::MAX as u64);
            let text = human(n);
            assert!(text.len() <= 10, "{text}");
            out.size("size", n);
        }
        (Err(e), limited) => {
            assert_eq!(limited, Err(e));
            out.kind("bad size", e as u64);
        }
    }
    for shift in [9, 20, 30] {
        if let (Ok(plain), Ok(shifted)) = (size::parse(text, 0), size::parse(text, shift)) {
            assert!(shifted == plain || shifted == plain << shift, "{plain} {shifted}");
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let seeds: [&str; 9] = [
        "disk.qcow2",
        "file:a:b",
        "host_device:x",
        "json:{'driver':'raw','offset':512,'file':{'filename':'a'}}",
        "json:{'file':{'driver':'null-co','size':'1G'},'driver':'qcow2','backing':null}",
        "driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b",
        "1.5G",
        "0x10",
        "15.99E",
    ];
    seeds.map(|s| s.as_bytes().to_vec()).to_vec()
}
