//! Everything that is not a read or a write: sizes, maps, opening and closing, and the tool itself.

use super::command::{self, Command, MANY, number};
use super::open::How;
use super::report::amount;
use super::session::Session;
use crate::tool::getopt::{Opt, Parsed, opt};
use crate::tool::{Fail, out};
use ringblock_engine::Errno;
use ringblock_engine::driver::Preallocation;
use ringblock_engine::graph::Graph;
use ringblock_engine::timer::Sleep;

const fn plain(
    name: &'static str,
    alias: &'static str,
    words: (usize, usize),
    args: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: command::Run,
) -> Command {
    Command { name, alias, words, without_image: false, writes: false, args, summary, options, run }
}

const OPEN: &[Opt] = &[
    opt('r', "read-only", "", "open read-only"),
    opt('s', "snapshot", "", "writes go to a temporary file"),
    opt('C', "copy-on-read", "", "copy what is read from the backing file"),
    opt('n', "nocache", "", "the same as -t none"),
    opt('k', "native-aio", "", "the same as -i native"),
    opt('i', "aio", "MODE", "threads, native or io_uring"),
    opt('U', "force-share", "", "read even while another process writes"),
    opt('t', "cache", "MODE", "use of the page cache"),
    opt('d', "discard", "MODE", "what to do with discards"),
    opt('o', "options", "OPTIONS", "key=value,..."),
];

const REOPEN: &[Opt] = &[
    opt('r', "r", "", "read-only"),
    opt('w', "w", "", "writable"),
    opt('c', "c", "MODE", "use of the page cache"),
    opt('o', "o", "OPTIONS", "key=value,..."),
];

pub(super) const COMMANDS: &[Command] = &[
    plain("length", "l", (0, 0), "", "gets the length of the current file", &[], |s, _| Box::pin(len(s))),
    plain("map", "", (0, 0), "", "prints the allocated areas of a file", &[], |s, _| Box::pin(map(s))),
    plain("info", "i", (0, 0), "", "prints information about the current file", &[], |s, _| {
        Box::pin(info(s))
    }),
    plain("flush", "f", (0, 0), "", "flush all in-core file state to disk", &[], |s, _| Box::pin(flush(s))),
    plain("alloc", "", (1, 2), "offset [count]", "checks if offset is allocated in the file", &[], |s, p| {
        Box::pin(alloc(s, p))
    }),
    Command {
        writes: true,
        ..plain(
            "truncate",
            "t",
            (1, 3),
            "[-m prealloc_mode] off",
            "truncates the current file at the given offset",
            &[opt('m', "m", "MODE", "preallocation")],
            |s, p| Box::pin(truncate(s, p)),
        )
    },
    plain(
        "reopen",
        "",
        (0, MANY),
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
        REOPEN,
        |s, p| Box::pin(reopen(s, p)),
    ),
    plain("close", "c", (0, 0), "", "close the current open file", &[], |s, _| Box::pin(close(s))),
    Command {
        without_image: true,
        ..plain(
            "open",
            "o",
            (1, MANY),
            "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open the file specified by path",
            OPEN,
            |s, p| Box::pin(open(s, p)),
        )
    },
    Command {
        without_image: true,
        ..plain("sleep", "", (1, 1), "", "waits for the given value in milliseconds", &[], |s, p| {
            Box::pin(sleep(s, p))
        })
    },
    Command {
        without_image: true,
        ..plain("help", "?", (0, 1), "[command]", "help for one or all commands", &[], |_, p| {
            Box::pin(async move { command::help(p.operands.first().map(String::as_str)) })
        })
    },
    Command {
        without_image: true,
        ..plain("quit", "q", (0, 0), "", "exit the program", &[], |s, _| {
            Box::pin(async move {
                s.quit = true;
                true
            })
        })
    },
];

/// Reports an error of the control path; always false.
fn complain(session: &Session, e: impl std::fmt::Display) -> bool {
    session.tool.error(e);
    false
}

async fn len(session: &mut Session) -> bool {
    let Some(open) = &session.open else { return false };
    match open.image.root.size() {
        Ok(n) => out(&format!("{}\n", amount(n as f64))),
        Err(e) => {
            out(&format!("getlength: {e}\n"));
            return false;
        }
    }
    true
}

/// Whether the node itself decides the content from `at`, and for how many bytes.
async fn allocated(session: &Session, at: u64, end: u64) -> Result<(bool, u64), Errno> {
    let open = session.open.as_ref().ok_or(Errno::ENOMEDIUM)?;
    let mut from = at;
    let mut first = None;
    while from < end {
        let s = open.image.root.status(from..end, false).await?;
        if *first.get_or_insert(s.allocated) != s.allocated {
            break;
        }
        from += s.len.min(end - from);
    }
    Ok((first.unwrap_or(false), from - at))
}

async fn map(session: &mut Session) -> bool {
    let Some(size) = session.open.as_ref().and_then(|o| o.image.root.size().ok()) else { return false };
    let mut at = 0;
    while at < size {
        let (is, n) = match allocated(session, at, size).await {
            Ok(found) => found,
            Err(e) => {
                return complain(session, format!("Failed to get allocation status: {e}"));
            }
        };
        let word = if is { "    allocated" } else { "not allocated" };
        out(&format!(
            "{} ({n:#x}) bytes {word} at offset {} ({at:#x})\n",
            amount(n as f64),
            amount(at as f64)
        ));
        at += n;
    }
    true
}

async fn alloc(session: &mut Session, p: Parsed) -> bool {
    let Some(start) = p.operands.first().and_then(|t| number(t)) else { return false };
    let Some(count) = p.operands.get(1).map_or(Some(512), |t| number(t)) else { return false };
    let Some(size) = session.open.as_ref().and_then(|o| o.image.root.size().ok()) else { return false };
    let end = start.saturating_add(count).min(size);
    let (mut at, mut sum) = (start, 0);
    while at < end {
        match allocated(session, at, end).await {
            Ok((is, n)) => {
                sum += if is { n } else { 0 };
                at += n;
            }
            Err(e) => {
                out(&format!("is_allocated failed: {e}\n"));
                return false;
            }
        }
    }
    let total = end.saturating_sub(start);
    out(&format!("{sum}/{total} bytes allocated at offset {}\n", amount(start as f64)));
    true
}

async fn info(session: &mut Session) -> bool {
    let Some(open) = &session.open else { return false };
    let Some(node) = open.image.info() else { return false };
    let driver = node.driver;
    let own = driver.limits();
    out(&format!("format name: {}\ncluster size: {}\n", driver.name(), amount(f64::from(own.cluster_size))));
    let qcow2 = driver.as_any().downcast_ref::<ringblock_drivers::format::qcow2::Qcow2>();
    // the VM state begins where the last L2 table of the disk ends
    let state = qcow2.and_then(|q| {
        let g = q.header().geometry().ok()?;
        open.image.root.size().ok()?.checked_next_multiple_of(g.l2_span())
    });
    out(&format!("vm state offset: {}\n", amount(state.unwrap_or(0) as f64)));
    if let Some(q) = qcow2 {
        match crate::img::qcow2_specific(&q.header()) {
            text if text.is_empty() => {}
            text => out(&format!("Format specific information:\n{text}")),
        }
    }
    true
}

async fn flush(session: &mut Session) -> bool {
    let Some(open) = &session.open else { return false };
    match open.image.root.flush().await {
        Ok(()) => true,
        Err(e) => complain(session, format!("flush: {e}")),
    }
}

async fn truncate(session: &mut Session, p: Parsed) -> bool {
    let mut mode = Preallocation::Off;
    for (_, value) in &p.options {
        mode = match value.as_str() {
            "off" => Preallocation::Off,
            "metadata" => Preallocation::Metadata,
            "falloc" => Preallocation::Falloc,
            "full" => Preallocation::Full,
            other => return complain(session, format!("Invalid preallocation mode '{other}'")),
        };
    }
    let Some(size) = p.operands.first().and_then(|t| number(t)) else { return false };
    let Some(node) = session.open.as_ref().map(|o| o.image.node.clone()) else { return false };
    session.wait_all().await;
    match Graph::current().resize(&node, size, mode).await {
        Ok(()) => true,
        Err(e) => complain(session, e),
    }
}

async fn close(session: &mut Session) -> bool {
    match session.close().await {
        Ok(()) => true,
        Err(e) => complain(session, e),
    }
}

async fn open(session: &mut Session, p: Parsed) -> bool {
    if session.open.is_some() {
        return complain(session, "file open already, try 'help close'");
    }
    let mut how = How::default();
    for (option, value) in &p.options {
        if let Err(Fail { message, .. }) = how.take(option, value) {
            return complain(session, message);
        }
    }
    how.name = p.operands.first().cloned();
    let name = how.name.clone().unwrap_or_default();
    match session.open(how).await {
        Ok(()) => true,
        Err(e) => complain(session, super::can_not_open(&name, &e.message)),
    }
}

async fn reopen(session: &mut Session, p: Parsed) -> bool {
    let (mut read_only, mut cache, mut extra) = (None, None, Vec::new());
    if !p.operands.is_empty() {
        out("reopen takes only options, try 'help reopen'\n");
        return false;
    }
    for (letter, value) in &p.options {
        match *letter {
            "r" | "w" if read_only.is_some() => {
                return complain(session, "Only one -r/-w option may be given");
            }
            "r" => read_only = Some(true),
            "w" => read_only = Some(false),
            "c" => match super::open::cache(value) {
                Ok(mode) => cache = Some(mode),
                Err(fail) => return complain(session, fail.message),
            },
            _ => extra.push(value.clone()),
        }
    }
    match session.reopen(read_only, cache, &extra).await {
        Ok(()) => true,
        Err(e) => complain(session, e),
    }
}

async fn sleep(_: &mut Session, p: Parsed) -> bool {
    let text = p.operands.first().map_or("", String::as_str);
    let Some(ms) = text.parse::<u64>().ok().and_then(|ms| ms.checked_mul(1_000_000)) else {
        out(&format!("{text} is not a valid number\n"));
        return false;
    };
    Sleep::ns(ms).await;
    true
}
