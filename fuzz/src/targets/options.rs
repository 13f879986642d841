//! Option arguments: dotted `key=value` pairs and JSON, of nodes, exports and objects. What is accepted, written out and
//! read again is the same.

use super::Target;
use crate::Outcome;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::export::{BlockExportOptions, NbdServerOptions};
use ringblock_drivers::options::object::ObjectOptions;
use ringblock_drivers::options::{Error, Qapi, from_arg, from_json};

pub(super) const TARGET: Target = Target {
    name: "options",
    run,
    seeds,
    words: &[
        b"driver=",
        b"node-name=",
        b"file.",
        b"file.driver=file",
        b"file.filename=",
        b"backing.",
        b"backing=",
        b"data-file.",
        b"cache.direct=on",
        b"cache.no-flush=off",
        b"l2-cache-size=",
        b"read-only=on",
        b"discard=unmap",
        b"detect-zeroes=unmap",
        b"qcow2",
        b"raw",
        b"null-co",
        b"null-aio",
        b"host_device",
        b"offset=",
        b"size=",
        b",,",
        b"\"driver\":",
        b"\"file\":{",
        b"null",
        b"type=nbd",
        b"id=",
        b"addr.type=unix",
        b"addr.path=",
        b"addr.host=",
        b"addr.port=",
        b"qom-type=iothread",
        b".0.",
        b".1=",
    ],
    longest: 4096,
    share: 250_000,
};

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let Ok(text) = std::str::from_utf8(data) else { return out };
    let (first, text) = match text.split_once('!') {
        Some((kind, rest)) => (kind, rest),
        None => ("", text),
    };
    match first {
        "export" => check::<BlockExportOptions>("export", text, Some("type"), &mut out),
        "object" => check::<ObjectOptions>("object", text, Some("qom-type"), &mut out),
        "server" => check::<NbdServerOptions>("server", text, None, &mut out),
        _ => check::<BlockdevOptions>("blockdev", text, Some("driver"), &mut out),
    }
    out
}

fn check<T: Qapi + PartialEq + std::fmt::Debug>(
    place: &str,
    text: &str,
    implied: Option<&str>,
    out: &mut Outcome,
) {
    let read: Result<T, Error> = from_arg(text, implied);
    out.result(place, &read);
    let Ok(options) = read else { return };
    let tree = options.write();
    let again: T = from_json(&tree).expect("what we wrote, we read");
    assert_eq!(again, options);
    members(place, &tree, out);
}

/// Which members there are.
fn members(place: &str, tree: &serde_json::Value, out: &mut Outcome) {
    for (key, value) in tree.as_object().into_iter().flatten() {
        out.text(place, key);
        members(key, value, out);
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let seeds: [&str; 10] = [
        "driver=qcow2,node-name=d,file.driver=file,file.filename=a,,b,cache.direct=on,l2-cache-size=4M",
        "{\"driver\": \"raw\", \"offset\": 512, \"file\": {\"driver\": \"file\", \"filename\": \"x\"}}",
        "null-co,size=1G,latency-ns=5,read-zeroes=on",
        "raw,file=node0,size=1.5k",
        "qcow2,file.driver=null-co,backing=,data-file.driver=null-aio,cache-clean-interval=5",
        "{'driver':'qcow2','file':'a','backing':null,'discard':'unmap','detect-zeroes':'on'}",
        "export!type=nbd,id=e0,node-name=disk,name=d,writable=on,description=x",
        "object!iothread,id=io0",
        "server!addr.type=unix,addr.path=s,max-connections=16",
        "server!addr.type=inet,addr.host=::1,addr.port=10809,addr.ipv6=on",
    ];
    seeds.map(|s| s.as_bytes().to_vec()).to_vec()
}
