//! A qcow2 header: parsed, written back, and parsed again to the same.

use super::Target;
use crate::Outcome;
use ringblock_drivers::format::qcow2::header::Header;

pub(super) const TARGET: Target = Target {
    name: "qcow2_header",
    run,
    seeds,
    words: &[
        b"QFI\xfb",
        b"\xe2\x79\x2a\xca",
        b"\x68\x03\xf8\x57",
        b"\x44\x41\x54\x41",
        b"\x23\x85\x28\x75",
        b"\x05\x37\xbe\x77",
        b"\0\0\0\x70",
    ],
    longest: 4096,
    share: 470_000,
};

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let parsed = Header::parse(data);
    out.result("parse", &parsed);
    let Ok(header) = parsed else { return out };
    out.kind("version", header.version.into());
    out.kind("cluster", header.cluster_bits.into());
    out.kind("features", header.incompatible << 8 | header.autoclear << 4 | header.compatible);
    let extensions = &header.extensions;
    let has = [
        extensions.backing_format.is_some(),
        extensions.data_file.is_some(),
        extensions.crypto.is_some(),
        extensions.bitmaps.is_some(),
        extensions.feature_names.is_some(),
        header.backing_file.is_some(),
        !extensions.unknown.is_empty(),
        !header.unknown_fields.is_empty(),
    ];
    for (i, has) in has.into_iter().enumerate().filter(|(_, has)| *has) {
        out.kind("has", (i as u64) << 1 | u64::from(has));
    }
    let written = header.serialise();
    out.result("write", &written);
    if let Ok(bytes) = written {
        let mut cluster = bytes.clone();
        cluster.resize(1 << header.cluster_bits, 0);
        let again = Header::parse(&cluster).expect("what we wrote, we read");
        assert_eq!(again.serialise().expect("twice"), bytes);
    }
    out
}

fn seeds() -> Vec<Vec<u8>> {
    let v3 = v3();
    let mut v2 = v3.clone();
    v2[7] = 2;
    v2[72..].fill(0);
    vec![v3, v2]
}

/// A version 3 header with a name, an extension and its end mark, in clusters of 512 bytes.
fn v3() -> Vec<u8> {
    let mut h = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &160u64.to_be_bytes());
    put(16, &4u32.to_be_bytes());
    put(20, &9u32.to_be_bytes());
    put(24, &(1u64 << 16).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &0x600u64.to_be_bytes());
    put(48, &0x200u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(112, &0xe279_2acau32.to_be_bytes());
    put(116, &3u32.to_be_bytes());
    put(120, b"raw");
    put(160, b"base");
    h
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the seeds are worth something. Method: both are read.
    #[test]
    fn seeds_are_valid() {
        seeds().iter().for_each(|s| assert!(Header::parse(s).is_ok()));
    }
}
