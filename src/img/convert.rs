//! `convert`: copies images into one of another format, on the block-copy engine.
//!
//! ```text
//! options ─► checks ─► sources opened ─► target made (unless -n) and opened ─► BlockCopy ─► flush, close
//! ```

use super::new::{self, Wanted as NewImage};
use super::progress::Progress;
use super::{Command, OBJECT, QUIET, SHARE};
use crate::tool::cache::Cache;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{Access, Image, Source};
use crate::tool::{Fail, Outcome, Tool, on_engine, parse_size, size_option};
use ringblock_drivers::options::size::BadSize;
use ringblock_engine::Error;
use ringblock_engine::throttle::{Config, DEFAULT_WEIGHT, Group, Kind, Member, Rate};
use ringblock_jobs::copy::{Doing, Failure};
use ringblock_jobs::{BlockCopy, Options, Source as CopySource, copy_on_all_cores};
use std::sync::Arc;

pub(super) const COMMAND: Command = Command {
    name: "convert",
    summary: "Copy an image into one of another format",
    operands: "SRC_FILENAME [SRC_FILENAME2...] TGT_FILENAME",
    options: &[
        opt('f', "source-format", "FMT", "format of the source (default: guess)"),
        opt('\0', "source-image-opts", "", "SRC_FILENAME is a list of options key=value,..."),
        opt('\0', "image-opts", "", "the same"),
        opt('T', "source-cache", "MODE", "cache mode of the sources (default: writeback)"),
        opt('O', "target-format", "FMT", "format of the target (default: raw)"),
        opt('\0', "target-image-opts", "", "TGT_FILENAME is a list of options; needs -n"),
        opt('o', "target-options", "OPTIONS", "options of the target's format, name=value,..."),
        opt('c', "compress", "", "write compressed clusters"),
        opt('t', "target-cache", "MODE", "cache mode of the target (default: unsafe)"),
        opt('B', "backing", "FILENAME", "the target shows this image where the source has nothing"),
        opt('F', "backing-format", "FMT", "format of the backing file"),
        opt('n', "no-create", "", "the target exists"),
        opt('\0', "target-is-zero", "", "the target reads as zeroes already; needs -n"),
        opt(
            'S',
            "sparse-size",
            "SIZE",
            "runs of zeroes of this size are left out (default: 4k; 0 writes all)",
        ),
        opt('r', "rate", "RATE", "bytes per second, at most"),
        opt('m', "parallel", "N", "requests in flight, 1 to 16 (default: 8)"),
        opt('W', "oob-writes", "", "writes need not be in order"),
        opt('l', "source-snapshot", "SNAPSHOT", "copy an internal snapshot (not supported yet)"),
        opt('\0', "bitmaps", "", "copy dirty bitmaps (not supported yet)"),
        opt('\0', "skip-broken-bitmaps", "", "leave out inconsistent bitmaps (not supported yet)"),
        opt('C', "copy-range-offloading", "", "let the host copy (not supported yet)"),
        opt('\0', "salvage", "", "go on after read errors (not supported yet)"),
        opt('p', "progress", "", "show how far it is"),
        SHARE,
        QUIET,
        OBJECT,
    ],
    run,
};

/// Bytes of a piece: as many pieces in flight as there may be still fit the buffers that a core keeps.
const CHUNK: u64 = 1 << 20;

/// The command line.
struct Wanted {
    source_format: Option<String>,
    source_opts: bool,
    source: Access,
    target: Access,
    target_opts: bool,
    new: NewImage,
    target_format: Option<String>,
    compress: bool,
    no_create: bool,
    target_is_zero: bool,
    sparse: u64,
    rate: Option<u64>,
    parallel: usize,
    out_of_order: bool,
    progress: bool,
    sources: Vec<String>,
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    if parsed.options.iter().any(|(o, v)| *o == "target-options" && new::wants_help(v)) {
        let format = parsed.options.iter().find(|(o, _)| *o == "target-format").map_or("raw", |(_, v)| v);
        crate::tool::out(&new::help(format)?);
        return Ok(0);
    }
    let wanted = read(parsed)?;
    let tool = tool.clone();
    // what need not be in order is done on all cores
    let cores = usize::from(!wanted.out_of_order);
    on_engine(cores, move || Box::pin(work(tool, wanted)))
}

/// Takes the command line apart. Refusals come in the order of qemu-img's.
fn read(parsed: Parsed) -> Result<Wanted, Fail> {
    let mut w = Wanted {
        source_format: None,
        source_opts: false,
        source: Access { no_writers: true, ..Access::default() },
        target: Access { write: true, unmap: true, cache: Cache::UNSAFE, ..Access::default() },
        target_opts: false,
        new: NewImage { format: "raw".into(), ..NewImage::default() },
        target_format: None,
        compress: false,
        no_create: false,
        target_is_zero: false,
        sparse: 4096,
        rate: None,
        parallel: 8,
        out_of_order: false,
        progress: false,
        sources: Vec::new(),
    };
    let (mut quiet, mut later, mut bitmaps, mut sparse_given) = (false, Vec::new(), [false; 2], false);
    for (option, value) in parsed.options {
        match option {
            "source-format" => w.source_format = Some(value),
            "source-image-opts" | "image-opts" => w.source_opts = true,
            "source-cache" => {
                let bad = || format!("Invalid source cache option: {value}");
                w.source.cache = Cache::parse(&value).ok_or_else(bad)?;
            }
            "target-format" => w.target_format = Some(value),
            "target-image-opts" => w.target_opts = true,
            "target-options" => w.new.options.push(value),
            "compress" => w.compress = true,
            "target-cache" => {
                w.target.cache =
                    Cache::parse(&value).ok_or_else(|| format!("Invalid cache option: {value}"))?;
            }
            "backing" => w.new.backing = Some(value),
            "backing-format" => w.new.backing_format = Some(value),
            "no-create" => w.no_create = true,
            "target-is-zero" => w.target_is_zero = true,
            "sparse-size" => (w.sparse, sparse_given) = (sparse(&value)?, true),
            "rate" => w.rate = Some(size_option("rate limit", &value, 1, i64::MAX as u64)?),
            "parallel" => w.parallel = parallel(&value)?,
            "oob-writes" => w.out_of_order = true,
            "progress" => w.progress = true,
            "force-share" => w.source.force_share = true,
            "quiet" => quiet = true,
            "bitmaps" => bitmaps[0] = true,
            "skip-broken-bitmaps" => bitmaps[1] = true,
            "object" => crate::tool::refuse_object(&value)?,
            other => later.push(other),
        }
    }
    w.progress &= !quiet;
    w.sources = parsed.operands;
    check(&w, &later, bitmaps, sparse_given)?;
    if w.sources.len() < 2 {
        return Err("Must specify image file name".into());
    }
    w.new.name = w.sources.pop().unwrap_or_default();
    w.new.format = w.target_format.clone().unwrap_or_else(|| "raw".into());
    Ok(w)
}

/// Options that exclude each other, and those that are not here yet.
fn check(w: &Wanted, later: &[&str], bitmaps: [bool; 2], sparse_given: bool) -> Result<(), Fail> {
    let offload = later.contains(&"copy-range-offloading");
    let rules: [(bool, &str); 12] = [
        (bitmaps[1] && !bitmaps[0], "Use of --skip-broken-bitmaps requires --bitmaps"),
        (w.source_opts && w.source_format.is_some(), "--image-opts and --format are mutually exclusive"),
        (w.target_opts && w.target_format.is_some(), "--image-opts and --format are mutually exclusive"),
        (w.target_opts && !w.no_create, "--target-image-opts requires use of -n flag"),
        (w.compress && offload, "Cannot enable copy offloading when -c is used"),
        (sparse_given && offload, "Cannot enable copy offloading when -S is used"),
        (w.target_is_zero && !w.no_create, "--target-is-zero requires use of -n flag"),
        (w.no_create && !w.new.options.is_empty(), "-o has no effect when skipping image creation"),
        (bitmaps[0] && w.sources.len() > 2, "Copying bitmaps only possible with single source"),
        (
            w.new.backing.is_some() && w.sources.len() > 2,
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ),
        (
            w.new.backing.is_some()
                && w.new.backing_format.is_none()
                && w.target_format.as_deref() == Some("qcow2"),
            "Use of backing file requires explicit backing format",
        ),
        (bitmaps[0], "--bitmaps is not supported yet"),
    ];
    if let Some((_, text)) = rules.iter().find(|(broken, _)| *broken) {
        return Err((*text).into());
    }
    match later.first() {
        Some(option) => Err(format!("--{option} is not supported yet").into()),
        None => Ok(()),
    }
}

fn sparse(text: &str) -> Result<u64, Fail> {
    if parse_size(text) == Err(BadSize::Syntax) {
        return Err(format!("Invalid buffer size for sparse output specified: '{text}'.").into());
    }
    let n = parse_size(text).ok().filter(|n| n % 512 == 0 && *n <= 16 << 20);
    n.ok_or_else(|| {
        Fail::from(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. \
             Select 0 to disable sparse detection (fully allocates output).",
        )
    })
}

fn parallel(text: &str) -> Result<usize, Fail> {
    match text.parse::<usize>() {
        Ok(n @ 1..=16) => Ok(n),
        Ok(_) => Err("Invalid number of coroutines specified. Must be between 1 and 16.".into()),
        Err(_) => Err(format!("Invalid number of coroutines specified: '{text}'.").into()),
    }
}

async fn work(tool: Tool, w: Wanted) -> Outcome {
    let mut sources = Vec::new();
    let mut at = 0u64;
    for name in &w.sources {
        let source =
            Source { name: name.clone(), format: w.source_format.clone(), image_opts: w.source_opts };
        let image = source.open(&tool, w.source).await?;
        sources.push(CopySource { root: image.root, from: 0, len: image.size, at });
        let sum = at.checked_add(image.size).filter(|n| *n <= i64::MAX as u64);
        at = sum.ok_or("The image size is too large")?;
    }
    let total = at;
    let (target, preallocated) = open_target(&tool, &w, total).await?;
    if w.no_create && target.size < total {
        return Err("output file is smaller than input file".into());
    }
    let cluster = cluster_size(&target).await?;
    if w.compress && (cluster == 0 || target.format == "raw") {
        return Err("Compression not supported for this file format".into());
    }
    if w.compress && preallocated {
        return Err("Compression and preallocation not supported at the same time".into());
    }
    let backed = target.child("backing").is_some();
    let base = if backed { backing_of(&sources).await } else { None };
    let options = Options {
        workers: w.parallel,
        chunk: CHUNK.max(cluster) as usize,
        sparse: w.sparse as usize,
        target_is_zero: !backed && (w.target_is_zero || !w.no_create && !on_device(&target)),
        base,
        skip_unallocated: backed,
        compress: w.compress.then_some(cluster),
        ordered: !w.out_of_order,
        rate: w.rate.map(limit),
    };
    let progress = Progress::new(w.progress, total);
    let line = progress.clone();
    let done = match w.out_of_order {
        true => copy_on_all_cores(target.root, options, sources, Arc::new(move |n| line.at(n))).await,
        false => BlockCopy::new(target.root, options, Box::new(move |n| line.at(n))).run(&sources).await,
    };
    progress.end(done.is_ok());
    done.map_err(failed)?;
    let flushed = target.root.flush().await;
    flushed.map_err(|e| Fail::from(format!("error while flushing '{}': {e}", w.new.name)))?;
    target.close().await?;
    Ok(0)
}

/// Makes the target unless it exists, and opens it; the second value says whether its space was preallocated.
async fn open_target(tool: &Tool, w: &Wanted, size: u64) -> Result<(Image, bool), Fail> {
    let name = &w.new.name;
    if w.no_create {
        let format = w.target_format.clone().or_else(|| (!w.target_opts).then(|| "raw".to_owned()));
        let source = Source { name: name.clone(), format, image_opts: w.target_opts };
        return Ok((source.open(tool, w.target).await?, false));
    }
    let preallocated =
        w.new.options.iter().any(|o| {
            o.split(',').any(|pair| pair.strip_prefix("preallocation=").is_some_and(|v| v != "off"))
        });
    if w.compress && w.new.format == "raw" {
        return Err("Compression not supported for this file format".into());
    }
    if w.compress && preallocated {
        return Err("Compression and preallocation not supported at the same time".into());
    }
    // a backing file that is not there shows when the target is opened
    let new = NewImage { size: Some(size), size_is_default: true, unsafe_backing: true, ..w.new.clone() };
    let plan = match new::plan(tool, &new).await {
        Err(e) if e.message == new::NO_BACKING_FORMAT => {
            return Err("Use of backing file requires explicit backing format".into());
        }
        plan => plan?,
    };
    let failed = |e: Error| e.context(format_args!("{name}: error while converting {}", w.new.format));
    plan.make().await.map_err(failed)?;
    let source = Source::file(name.clone(), Some(&w.new.format));
    // the data file is the one that we have just made
    let image = source.open_with(plan.data_file(), w.target).await?;
    Ok((image, preallocated))
}

/// Whether the bytes are those of a device, which holds what it held before even if the image on it is new.
fn on_device(target: &Image) -> bool {
    let device = |n: ringblock_engine::graph::NodeInfo| n.driver.name() == "host_device";
    let below = || target.format == "raw" && target.child("file").is_some_and(device);
    target.info().is_some_and(device) || below()
}

async fn cluster_size(target: &Image) -> Result<u64, Fail> {
    let limits = target.root.limits().map_err(Error::from)?;
    Ok(u64::from(limits.cluster_size))
}

/// The backing node of the only source: what lies below it is not copied into a target that has a backing file.
async fn backing_of(sources: &[CopySource]) -> Option<ringblock_engine::graph::NodeId> {
    let [only] = sources else { return None };
    let id = only.root.node().ok()?;
    let info = ringblock_engine::graph::Graph::current().info();
    let node = info.nodes.iter().find(|n| n.id == id)?;
    node.edges.iter().find(|e| e.name == "backing").map(|e| e.node)
}

fn limit(rate: u64) -> Arc<Member> {
    let mut config = Config::default();
    config.rates[Kind::BpsTotal as usize] = Rate { avg: rate as f64, ..Rate::default() };
    Member::join(&Group::new("convert", config), DEFAULT_WEIGHT)
}

fn failed(f: Failure) -> Fail {
    let Failure { doing, offset, errno } = f;
    Fail::from(match doing {
        Doing::Status => format!("error while reading block status at offset {offset}: {errno}"),
        Doing::Read => format!("error while reading at byte {offset}: {errno}"),
        Doing::Write => format!("error while writing at byte {offset}: {errno}"),
    })
}
