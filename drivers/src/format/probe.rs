//! Which format the first bytes of an image look like.
//!
//! Guessing is for reading: a guest that may write block 0 of a raw image could make it look like another format and
//! have its host open a file of the guest's choice as backing file. Therefore a node that was guessed to be raw
//! refuses writes that would change the guess (see [`super::raw`]).

/// How many bytes of an image are looked at.
pub const HEAD: usize = 512;

/// Magic numbers by offset. Formats that Ringblock does not open are listed too: `raw` would be the wrong answer.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb\0\0\0\x02", "qcow2"),
    (0, b"QFI\xfb\0\0\0\x03", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
];

/// The format of an image that begins with `head` (up to [`HEAD`] bytes; a shorter file gives fewer); `raw` for
/// anything not known.
pub fn probe(head: &[u8]) -> &'static str {
    let known = MAGICS.iter().find(|(at, magic, _)| head.get(*at..at + magic.len()) == Some(magic));
    known.map_or("raw", |(_, _, format)| format)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: known images are told apart and anything else is raw. Method: each magic in place, shifted, and cut.
    #[test]
    fn magics() {
        for (at, magic, name) in MAGICS {
            let mut head = vec![0; HEAD];
            head[*at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(probe(&head), *name);
            assert_eq!(probe(&head[..at + magic.len() - 1]), "raw");
            head.insert(0, b'x');
            assert_eq!(probe(&head), "raw");
        }
        assert_eq!(probe(b""), "raw");
        assert_eq!(probe(b"QFI\xfb\0\0\0\x04"), "raw");
    }
}
