//! Images that name other files: as backing file, as data file, in chains and in circles.

use std::path::{Path, PathBuf};

use super::case::{Case, Ground, Kind, Named};
use super::forge::Forge;

/// All of them.
pub(super) fn all() -> Vec<Named> {
    let mut out = Vec::new();
    for (label, name) in NAMES {
        for (role, format) in [
            ("backing", Some("raw")),
            ("backing-qcow2", Some("qcow2")),
            ("backing-guess", None),
            ("data", None),
        ] {
            let (label, name) = (format!("name/{role}/{label}"), *name);
            out.push(Named::new(label.clone(), move |ground| named(&label, role, format, name, ground)));
        }
    }
    formats(&mut out);
    chains(&mut out);
    odd_files(&mut out);
    out
}

/// Names as bytes; `@` stands for the file outside that nobody may open for a name that is no plain path.
const NAMES: &[(&str, &[u8])] = &[
    ("json-file", br#"json:{"driver":"raw","file":{"driver":"file","filename":"@"}}"#),
    ("json-short", br#"json:{"driver":"file","filename":"@"}"#),
    ("json-dotted", br#"json:{"file.driver":"file","file.filename":"@","driver":"raw"}"#),
    ("json-empty", b"json:{}"),
    ("json-broken", b"json:{"),
    ("json-deep", br#"json:{"driver":"qcow2","file":{"driver":"file","filename":"image"}}"#),
    ("json-space", br#" json:{"driver":"file","filename":"@"}"#),
    ("json-upper", br#"JSON:{"driver":"file","filename":"@"}"#),
    ("file-prefix", b"file:@"),
    ("file-url", b"file://@"),
    ("host-device", b"host_device:/dev/full"),
    ("raw-prefix", b"raw:@"),
    ("qcow2-prefix", b"qcow2:@"),
    ("fat", b"fat:rw:."),
    ("nbd-unix", b"nbd:unix:/nonexistent"),
    ("nbd-url", b"nbd://127.0.0.1:1/x"),
    ("nbd-unix-url", b"nbd+unix:///x?socket=/nonexistent"),
    ("http", b"http://127.0.0.1:1/x"),
    ("ssh", b"ssh://-oProxyCommand=touch,pwned/x"),
    ("rbd", b"rbd:pool/x"),
    ("blkdebug", b"blkdebug::@"),
    ("blklogwrites", b"blklogwrites:@"),
    ("null", b"null-co://"),
    ("exec", b"exec:touch pwned"),
    ("pipe", b"|touch pwned"),
    ("fd", b"fd:0"),
    ("fdset", b"/dev/fdset/1"),
    ("absolute", b"@"),
    ("dots", b"../outside/secret.raw"),
    ("many-dots", b"./.././outside/../outside/./secret.raw"),
    ("slashes", b"..//outside////secret.raw"),
    ("self", b"image"),
    ("dot-self", b"./image"),
    ("dot", b"."),
    ("dotdot", b".."),
    ("slash", b"/"),
    ("gone", b"not-there.raw"),
    ("trailing-slash", b"decoy.raw/"),
    ("nul", b"decoy.raw\0.qcow2"),
    ("nul-first", b"\0decoy.raw"),
    ("newline", b"decoy\n.raw"),
    ("bytes", b"\xff\xfe\x80"),
    ("half-utf8", b"decoy\xc3"),
    ("format-string", b"%s%s%s%n"),
    ("comma", b"decoy.raw,driver=file"),
    ("option", b"-help"),
    ("escape", b"\x1b]0;pwned\x07"),
    ("dev-full", b"/dev/full"),
    ("dev-zero", b"/dev/zero"),
    ("dev-tty", b"/dev/tty"),
    ("dev-ptmx", b"/dev/ptmx"),
    ("dev-kmsg", b"/dev/kmsg"),
    ("dev-stdin", b"/dev/stdin"),
    ("dev-fd", b"/dev/fd/0"),
    ("dev-nowhere", b"/dev/nowhere"),
    ("proc-mem", b"/proc/self/mem"),
    ("proc-environ", b"/proc/self/environ"),
    ("proc-fd", b"/proc/self/fd/0"),
    ("proc-root", b"/proc/self/root/nonexistent"),
    ("proc-kmsg", b"/proc/kmsg"),
    ("proc-trigger", b"/proc/sysrq-trigger-not"),
    ("sys", b"/sys/kernel/notes"),
    ("link", b"link"),
    ("link-loop", b"link-loop"),
    ("fifo", b"fifo"),
    ("folder", b"folder"),
    ("long", &[b'x'; 1000]),
    ("longest", &[b'/'; 1023]),
    ("too-long", &[b'y'; 1024]),
    ("much-too-long", &[b'z'; 20_000]),
];

fn named(label: &str, role: &str, format: Option<&'static str>, name: &[u8], ground: &Ground) -> Case {
    let secret = ground.outside.join("secret.raw");
    let text = name.iter().flat_map(|&b| if b == b'@' { bytes_of(&secret) } else { vec![b] });
    let name: Vec<u8> = text.collect();
    let forge =
        if role == "data" { Forge::beside(16, name.clone()) } else { Forge::on(16, name.clone(), format) };
    let link = Kind::Link(secret.clone());
    let case = Case::qcow2(label, forge.build().bytes)
        .with_data("decoy.raw", vec![1; 65536])
        .with("link", link)
        .with("link-loop", Kind::Link("link-loop".into()))
        .with("fifo", Kind::Fifo)
        .with("folder", Kind::Folder)
        .traced();
    match plain(&name) {
        Some(path) if path.ends_with("link") => case.following(secret),
        Some(path) => case.following(path),
        None => case,
    }
}

fn bytes_of(path: &Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

/// The path that a name in an image stands for, if it is one: text up to a NUL, without anything that could be a prefix.
fn plain(name: &[u8]) -> Option<PathBuf> {
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    let text = std::str::from_utf8(&name[..end]).ok()?;
    let first = text.split('/').next().unwrap_or("");
    (!text.is_empty() && !first.contains(':')).then(|| PathBuf::from(text))
}

/// Formats of backing files that do not exist, or are no formats.
fn formats(out: &mut Vec<Named>) {
    for format in ["vmdk", "file", "host_device", "nbd", "json:{}", "blkdebug", "../x", "raw,file.x", ""] {
        let label = format!("name/format/{}", format.replace(['/', ':'], "_"));
        out.push(Named::new(label.clone(), move |_| {
            let case = Case::qcow2(&label, Forge::on(12, "decoy.raw", Some(format)).build().bytes);
            case.with_data("decoy.raw", vec![1; 65536]).following("decoy.raw")
        }));
    }
}

/// Chains of images: `links` of them, the last of which stands on `end`.
fn chain(label: &str, bits: u32, links: usize, end: &str, dotted: bool) -> Case {
    let dot = if dotted { "./" } else { "" };
    let below = |i: usize| if i == links { end.to_owned() } else { format!("{dot}c{i}") };
    let bytes = |i: usize| Forge::on(bits, below(i + 1), Some("qcow2")).build().bytes;
    let mut case = Case::qcow2(label, bytes(0));
    for i in 1..links {
        case = case.with_data(format!("c{i}"), bytes(i)).following(format!("c{i}"));
    }
    case.following("image")
}

fn chains(out: &mut Vec<Named>) {
    for links in [10usize, 100, 200, 201, 300, 1000, 3000] {
        let label = format!("chain/deep-{links}");
        out.push(Named::new(label.clone(), move |_| {
            let base = Forge::new(12).build().bytes;
            chain(&label, 12, links, "base", false).with_data("base", base).following("base")
        }));
        let label = format!("chain/gone-{links}");
        out.push(Named::new(label.clone(), move |_| chain(&label, 12, links, "gone", false)));
    }
    for links in [1usize, 2, 3, 50, 250] {
        let label = format!("chain/circle-{links}");
        out.push(Named::new(label.clone(), move |_| chain(&label, 12, links, "image", false)));
        let label = format!("chain/dotted-circle-{links}");
        out.push(Named::new(label.clone(), move |_| chain(&label, 12, links, "./image", true)));
    }
    let label = "chain/linked-circle".to_owned();
    out.push(Named::new(label.clone(), move |_| {
        // each name is new, the file is the same
        let case = Case::qcow2(&label, Forge::on(12, "sub/image", Some("qcow2")).build().bytes);
        case.with("sub", Kind::Link(".".into())).following("image").following("sub/image")
    }));
    let label = "chain/hard-circle".to_owned();
    out.push(Named::new(label.clone(), move |_| {
        let case = Case::qcow2(&label, Forge::on(12, "other", Some("qcow2")).build().bytes);
        case.with("other", Kind::Hard("image".into())).following("image").following("other")
    }));
    let label = "chain/data-is-image".to_owned();
    out.push(Named::new(label.clone(), move |_| {
        Case::qcow2(&label, Forge::beside(12, "image").build().bytes).following("image")
    }));
    let label = "chain/guessed-circle".to_owned();
    out.push(Named::new(label.clone(), move |_| {
        Case::qcow2(&label, Forge::on(12, "image", None).build().bytes).following("image")
    }));
    let label = "chain/shrinking".to_owned();
    out.push(Named::new(label.clone(), move |_| {
        // layers of sizes that end in the middle of each other's clusters
        let bytes =
            |below: &str, size: u64| Forge::on(12, below, Some("qcow2")).build().with("size", size).bytes;
        let case = Case::qcow2(&label, bytes("a", 1 << 20))
            .with_data("a", bytes("b", 513))
            .with_data("b", bytes("c", 7));
        let base = Forge::new(9).build().with("size", 0).bytes;
        case.with_data("c", base).following("a").following("b").following("c")
    }));
}

/// What is opened is no regular file.
fn odd_files(out: &mut Vec<Named>) {
    for (what, kind) in [
        ("fifo", Kind::Fifo),
        ("folder", Kind::Folder),
        ("loop", Kind::Link("image".into())),
        ("gone", Kind::Link("gone".into())),
    ] {
        for (how, format) in [("qcow2", Some("qcow2")), ("guess", None), ("raw", Some("raw"))] {
            let (label, kind) = (format!("odd/{what}-{how}"), kind.clone());
            out.push(Named::new(label.clone(), move |_| {
                let mut case = Case::of(&label, format, Vec::new());
                case.files = vec![("image".to_owned(), kind.clone())];
                case
            }));
        }
    }
}
