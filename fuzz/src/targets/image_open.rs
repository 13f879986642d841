//! A file of any format, looked at as the tools look at it: probed, opened, told of, mapped, read, checked, and opened
//! for writing. Who only looks changes nothing, nor does an open that fails (but repairs of a dirty image); no other file is
//! made or changed.

use std::path::PathBuf;

use super::Target;
use crate::{Outcome, sim};
use ringblock::img;
use ringblock::tool::Tool;
use ringblock::tool::image::{Access, Image, Source};
use ringblock_crash::cases::cases;
use ringblock_drivers::format::qcow2::Repair;
use ringblock_engine::driver::Flags;
use ringblock_engine::error::Error;
use ringblock_engine::mem::Buf;

pub(super) const TARGET: Target = Target {
    name: "image_open",
    run,
    seeds,
    words: &[
        b"QFI\xfb\0\0\0\x02",
        b"QFI\xfb\0\0\0\x03",
        b"KDMV",
        b"vhdxfile",
        b"conectix",
        b"LUKS\xba\xbe",
        b"QED\0",
        b"\x7f\x10\xda\xbe",
        b"# Disk DescriptorFile",
        b"base",
        b"/base",
        b"/img",
        b"json:{}",
        b"\x80\0\0\0\0\0",
        b"\xc0\0\0\0\0\0",
        b"\xe2\x79\x2a\xca\0\0\0\x05qcow2\0\0\0",
        b"\x44\x41\x54\x41\0\0\0\x05/base\0\0\0",
    ],
    longest: 12 << 10,
    share: 40_000,
};

fn run(data: &[u8]) -> Outcome {
    let files =
        sim::Files::from([(PathBuf::from("/img"), data.to_vec()), ("/base".into(), vec![0xbb; 5000])]);
    let (mut out, after) = sim::run(1, &files, || Box::pin(look()));
    assert!(after == files, "looking at an image changed a file");
    let (opened, after) = sim::run(2, &files, || Box::pin(write()));
    out.result("for writing", &opened);
    // a dirty image is repaired first of all, as far as that goes, and may be refused all the same
    let is_dirty = data.get(79).is_some_and(|b| b & 1 != 0);
    let written = opened.is_ok() || is_dirty;
    for (path, bytes) in &after {
        let is_kept = written && path.as_os_str() == "/img" || files.get(path) == Some(bytes);
        assert!(is_kept, "{} was changed by {opened:?}", path.display());
    }
    out
}

fn tool() -> Tool {
    Tool { name: "fuzz".into(), command: "fuzz".into() }
}

async fn look() -> Outcome {
    let mut out = Outcome::default();
    let source = Source::file("/img", None);
    let told = img::describe(&tool(), source.clone(), true).await;
    out.result("info", &told);
    let opened = source.open(&tool(), Access::default()).await;
    out.result("open", &opened);
    if let Ok(image) = opened {
        out.text("format", image.format);
        out.size("disk", image.size);
        peruse(&image, &mut out).await;
        out.result("close", &image.close().await);
    }
    sim::tell("check", &sim::check("/img", Repair::None).await, &mut out);
    sim::close(&mut out).await;
    out
}

/// Map and data at both ends.
async fn peruse(image: &Image, out: &mut Outcome) {
    let end = image.size;
    sim::map(image.root, 0, end, out).await;
    sim::map(image.root, end - end / 3, end, out).await;
    let _ = sim::read(image.root, 96 << 10, out).await;
    let last = end.min(4096);
    let (done, _) = image.root.read(end - last, Buf::new(last as usize)).await;
    out.result("read the end", &done);
}

/// The format is named, so nothing is guessed; a little is written.
async fn write() -> Result<(), Error> {
    let access = Access { write: true, no_backing: true, ..Access::default() };
    let image = Source::file("/img", Some("qcow2")).open(&tool(), access).await?;
    if image.size >= 512 {
        // what is wrong with the image may show only now: then requests fail, and that is all
        let _ = image.root.write(0, Buf::zeroed(512), Flags::NONE).await;
        let _ = image.root.flush().await;
    }
    let _ = image.close().await;
    Ok(())
}

/// New images of all kinds but the largest, and the beginning of other formats.
fn seeds() -> Vec<Vec<u8>> {
    let images = cases().into_iter().filter(|c| c.cluster() <= 1024).map(|c| {
        let (setup, roles, _) = c.start(1, 1);
        setup.files[&roles.image].to_bytes()
    });
    let others = TARGET.words[2..9].iter().map(|magic| {
        let mut head = vec![0; 512];
        let at = if magic[0] == 0x7f { 64 } else { 0 };
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    });
    images.chain(others).chain([Vec::new(), vec![1; 700]]).collect()
}
