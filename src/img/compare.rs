//! `compare`: whether two images have the same content. Exit status 0 same, 1 different, 2 and more errors.

use super::progress::Progress;
use super::{Command, IMAGE_OPTS, OBJECT, QUIET, SHARE};
use crate::tool::cache::Cache;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{Access, Source};
use crate::tool::{Fail, Outcome, Tool, on_engine, out};
use ringblock_jobs::{Difference, compare};

pub(super) const COMMAND: Command = Command {
    name: "compare",
    summary: "Check whether two images have the same content",
    operands: "FILENAME1 FILENAME2",
    options: &[
        IMAGE_OPTS,
        opt('f', "a-format", "FMT", "format of the first image (default: guess)"),
        opt('F', "b-format", "FMT", "format of the second image (default: guess)"),
        opt('s', "strict", "", "sizes and allocation must be equal too"),
        opt('T', "cache", "MODE", "cache mode of both (default: writeback)"),
        opt('p', "progress", "", "show how far it is"),
        SHARE,
        QUIET,
        OBJECT,
    ],
    run,
};

#[derive(Default)]
struct Wanted {
    formats: [Option<String>; 2],
    image_opts: bool,
    strict: bool,
    quiet: bool,
    progress: bool,
    access: Access,
    names: [String; 2],
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let mut w = Wanted::default();
    for (option, value) in &parsed.options {
        match *option {
            "image-opts" => w.image_opts = true,
            "a-format" => w.formats[0] = Some(value.clone()),
            "b-format" => w.formats[1] = Some(value.clone()),
            "strict" => w.strict = true,
            "cache" => {
                let bad = || Fail::from(format!("Invalid source cache option: {value}")).code(2);
                w.access.cache = Cache::parse(value).ok_or_else(bad)?;
            }
            "progress" => w.progress = true,
            "force-share" => w.access.force_share = true,
            "quiet" => w.quiet = true,
            _ => crate::tool::refuse_object(value).map_err(|f| f.code(2))?,
        }
    }
    if w.image_opts && w.formats.iter().any(Option::is_some) {
        return Err(Fail::from("--image-opts and --format are mutually exclusive").code(2));
    }
    let [a, b] = &parsed.operands[..] else { return Err(Fail::usage("Expecting two image file names")) };
    w.names = [a.clone(), b.clone()];
    let tool = tool.clone();
    on_engine(1, move || Box::pin(work(tool, w)))
}

async fn work(tool: Tool, w: Wanted) -> Outcome {
    let mut images = Vec::new();
    for (name, format) in w.names.iter().zip(&w.formats) {
        let source = Source { name: name.clone(), format: format.clone(), image_opts: w.image_opts };
        images.push(source.open(&tool, w.access).await.map_err(|e| Fail::from(e).code(2))?);
    }
    let say = |text: &str| {
        if !w.quiet {
            out(&format!("{text}\n"));
        }
    };
    let sizes = [images[0].size, images[1].size];
    let common = sizes[0].min(sizes[1]);
    if w.strict && sizes[0] != sizes[1] {
        say("Strict mode: Image size mismatch!");
        return Ok(1);
    }
    let progress = Progress::new(w.progress && !w.quiet, sizes[0].max(sizes[1]));
    let roots = [images[0].root, images[1].root];
    let result = compare(roots, common, w.strict, &|n| progress.at(n)).await;
    let verdict = match result.map_err(|f| failure(&w, f))? {
        Difference::None => None,
        Difference::Content(at) => Some(format!("Content mismatch at offset {at}!")),
        Difference::Status(at) => Some(format!("Strict mode: Offset {at} block status mismatch!")),
    };
    let longer = usize::from(sizes[1] > sizes[0]);
    let verdict = match verdict {
        None if sizes[0] != sizes[1] => {
            say("Warning: Image size mismatch!");
            let tail = first_data(roots[longer], common, sizes[longer]).await;
            let found = tail.map_err(|(at, e)| {
                Fail::from(format!("Error while reading offset {at} of {}: {e}", w.names[longer])).code(4)
            })?;
            found.map(|at| format!("Content mismatch at offset {at}!"))
        }
        other => other,
    };
    let code = i32::from(verdict.is_some());
    if verdict.is_none() {
        progress.full();
    }
    say(verdict.as_deref().unwrap_or("Images are identical."));
    progress.newline();
    Ok(code)
}

fn failure(w: &Wanted, f: ringblock_jobs::compare::Failure) -> Fail {
    let name = &w.names[f.which];
    match f.reading {
        true => Fail::from(format!("Error while reading offset {} of {name}: {}", f.offset, f.errno)).code(4),
        false => Fail::from(format!("Sector allocation test failed for {name}")).code(3),
    }
}

/// The first sector from `from` on that is not all zeroes.
async fn first_data(
    root: ringblock_engine::path::Root,
    from: u64,
    size: u64,
) -> Result<Option<u64>, (u64, ringblock_engine::Errno)> {
    let mut at = from;
    while at < size {
        let s = root.status_above(None, at..size, true).await.map_err(|e| (at, e))?.status;
        let mut end = at + s.len.max(1);
        if !s.zero && (s.data || s.allocated) {
            end = end.min(at + (1 << 20));
            let buf = ringblock_engine::mem::Buf::new((end - at) as usize);
            let (done, buf) = root.read(at, buf).await;
            done.map_err(|e| (at, e))?;
            let sector = buf.chunks(512).position(|s| !ringblock_engine::mem::is_zero(s));
            if let Some(n) = sector {
                return Ok(Some(at + n as u64 * 512));
            }
        }
        at = end;
    }
    Ok(None)
}
