//! `read`, `write` and their kin: requests whose result is waited for.

use super::command::{Command, MANY, Run, length, number, pattern, usage};
use super::report::{self, Done};
use super::session::Session;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::out;
use ringblock_engine::Errno;
use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use std::time::{Duration, Instant};

const READ: Command = Command {
    name: "read",
    alias: "r",
    words: (2, MANY),
    without_image: false,
    writes: false,
    args: "[-bCqrv] [-P pattern [-s off] [-l len]] off len",
    summary: "reads a number of bytes at a specified offset",
    options: &[
        opt('b', "b", "", "from the VM state"),
        opt('C', "C", "", "report for programs"),
        opt('p', "p", "", "ignored"),
        opt('q', "q", "", "report nothing"),
        opt('r', "r", "", "use a registered buffer (all are)"),
        opt('v', "v", "", "print what was read"),
        opt('P', "P", "BYTE", "the data must be this byte"),
        opt('s', "s", "OFF", "where the test begins in the data"),
        opt('l', "l", "LEN", "how many bytes are tested"),
    ],
    run: |s, p| Box::pin(read(s, p, false)),
};

const WRITE: Command = Command {
    name: "write",
    alias: "w",
    words: (2, MANY),
    without_image: false,
    writes: true,
    args: "[-bcCfnqruz] [-P pattern | -s source_file] off len",
    summary: "writes a number of bytes at a specified offset",
    options: &[
        opt('b', "b", "", "to the VM state"),
        opt('c', "c", "", "compressed"),
        opt('C', "C", "", "report for programs"),
        opt('f', "f", "", "durable on completion"),
        opt('n', "n", "", "with -z: fail rather than be slow"),
        opt('p', "p", "", "ignored"),
        opt('q', "q", "", "report nothing"),
        opt('r', "r", "", "use a registered buffer (all are)"),
        opt('u', "u", "", "with -z: may deallocate"),
        opt('z', "z", "", "zeroes, without sending them"),
        opt('P', "P", "BYTE", "fill with this byte (default: 0xcd)"),
        opt('s', "s", "FILE", "fill with this file's content, over and over"),
    ],
    run: |s, p| Box::pin(write(s, p, false)),
};

const READV: Command = Command {
    name: "readv",
    alias: "",
    args: "[-Cqrv] [-P pattern] off len [len..]",
    run: |s, p| Box::pin(read(s, p, true)),
    ..READ
};

const WRITEV: Command = Command {
    name: "writev",
    alias: "",
    args: "[-Cfqr] [-P pattern] off len [len..]",
    run: |s, p| Box::pin(write(s, p, true)),
    ..WRITE
};

pub(super) const COMMANDS: &[Command] = &[
    READ,
    READV,
    WRITE,
    WRITEV,
    Command {
        name: "discard",
        alias: "d",
        words: (2, MANY),
        without_image: false,
        writes: true,
        args: "[-Cq] off len",
        summary: "discards a number of bytes at a specified offset",
        options: &[opt('C', "C", "", "report for programs"), opt('q', "q", "", "report nothing")],
        run: DISCARD,
    },
];

const DISCARD: Run = |s, p| Box::pin(discard(s, p));

/// What the letters before the operands say.
#[derive(Default)]
pub(super) struct Letters {
    pub(super) machine: bool,
    pub(super) quiet: bool,
    pub(super) dump: bool,
    pub(super) zeroes: bool,
    pub(super) flags: Flags,
    pub(super) pattern: Option<u8>,
    vmstate: bool,
    /// `-s` and `-l`, whatever they mean to the command.
    start: Option<String>,
    len: Option<String>,
}

impl Letters {
    /// Reads the letters; complains itself.
    pub(super) fn parse(p: &Parsed) -> Option<Letters> {
        let mut l = Letters::default();
        for (letter, value) in p.options.iter() {
            match *letter {
                "b" => l.vmstate = true,
                "c" => l.flags.compressed = true,
                "C" => l.machine = true,
                "f" => l.flags.fua = true,
                "n" => l.flags.no_fallback = true,
                "q" => l.quiet = true,
                "u" => l.flags.may_unmap = true,
                "v" => l.dump = true,
                "z" => l.zeroes = true,
                "P" => l.pattern = Some(pattern(value)?),
                "s" => l.start = Some(value.clone()),
                "l" => l.len = Some(value.clone()),
                _ => {}
            }
        }
        Some(l)
    }

    /// Refuses combinations that mean nothing; complains itself.
    pub(super) fn write_ok(&self) -> bool {
        let complaint = if self.vmstate && self.zeroes {
            "-b and -z cannot be specified at the same time"
        } else if self.flags.fua && (self.vmstate || self.flags.compressed) {
            "-f and -b or -c cannot be specified at the same time"
        } else if self.flags.no_fallback && !self.zeroes {
            "-n requires -z to be specified"
        } else if self.flags.may_unmap && !self.zeroes {
            "-u requires -z to be specified"
        } else if usize::from(self.zeroes)
            + usize::from(self.pattern.is_some())
            + usize::from(self.start.is_some())
            > 1
        {
            "Only one of -z, -P, and -s can be specified at the same time"
        } else {
            return true;
        };
        out(&format!("{complaint}\n"));
        false
    }
}

/// Offset and the sum of the lengths; complains itself.
pub(super) fn place(operands: &[String], without: &str) -> Option<(u64, u64)> {
    let (first, lens) = operands.split_first()?;
    let offset = number(first)?;
    let mut sum = 0u64;
    for text in lens {
        sum = sum.checked_add(length(text, without)?)?;
    }
    if sum > super::command::REQUEST_MAX && without.is_empty() {
        out(&format!("length cannot exceed {}, given {sum}\n", super::command::REQUEST_MAX));
        return None;
    }
    Some((offset, sum))
}

/// A write behind the end is an input/output error to the tool's users.
pub(super) fn outside(root: Root, offset: u64, len: u64) -> Result<(), Errno> {
    let size = root.size()?;
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Errno::EIO),
    }
}

fn failed(what: &str, e: Errno) -> bool {
    out(&format!("{what} failed: {e}\n"));
    false
}

/// Offset and length; the vector forms take several lengths.
fn words_fit(p: &Parsed, vector: bool) -> bool {
    p.operands.len() == 2 || vector && p.operands.len() > 2
}

async fn read(session: &mut Session, p: Parsed, vector: bool) -> bool {
    let Some(letters) = Letters::parse(&p) else { return false };
    if !words_fit(&p, vector)
        || (letters.pattern.is_none() && (letters.start.is_some() || letters.len.is_some()))
    {
        out(&usage(if vector { &READV } else { &READ }));
        return false;
    }
    let (Some((offset, len)), Some(open)) = (place(&p.operands, ""), &session.open) else { return false };
    let Some(tested) = tested_part(&letters, len) else { return false };
    if letters.vmstate {
        return failed("read", Errno::ENOTSUP);
    }
    let mut buf = Buf::new(len as usize);
    buf.fill(0xab);
    let begun = Instant::now();
    let (done, buf) = open.image.root.read(offset, buf).await;
    let took = begun.elapsed();
    if let Err(e) = done {
        return failed("read", e);
    }
    let mut good = true;
    if let Some(pattern) = letters.pattern {
        let part = &buf[tested.0 as usize..(tested.0 + tested.1) as usize];
        if part.iter().any(|b| *b != pattern) {
            let (at, n) = (offset + tested.0, tested.1);
            out(&format!("Pattern verification failed at offset {at}, {n} bytes\n"));
            good = false;
        }
    }
    finish(&letters, "read", offset, len, took, &buf);
    good
}

/// Where in the data the pattern is looked for; complains itself.
fn tested_part(letters: &Letters, len: u64) -> Option<(u64, u64)> {
    let start = letters.start.as_deref().map_or(Some(0), number)?;
    let count = match &letters.len {
        Some(text) => number(text)?,
        None => len.saturating_sub(start),
    };
    if start.checked_add(count).is_none_or(|end| end > len) || start > len {
        out("pattern verification range exceeds end of read data\n");
        return None;
    }
    Some((start, count))
}

pub(super) fn finish(
    letters: &Letters,
    verb: &'static str,
    offset: u64,
    bytes: u64,
    took: Duration,
    data: &[u8],
) {
    if letters.quiet {
        return;
    }
    if letters.dump {
        out(&report::dump(data, offset));
    }
    report::request(&Done { verb, offset, bytes, took, machine: letters.machine });
}

async fn write(session: &mut Session, p: Parsed, vector: bool) -> bool {
    let Some(letters) = Letters::parse(&p) else { return false };
    if !words_fit(&p, vector) {
        out(&usage(if vector { &WRITEV } else { &WRITE }));
        return false;
    }
    if !letters.write_ok() {
        return false;
    }
    let slow_zeroes = letters.zeroes && !letters.flags.no_fallback;
    let place = match letters.zeroes && letters.flags.no_fallback {
        true => number(&p.operands[0]).zip(number(&p.operands[1])),
        false => place(&p.operands, if slow_zeroes { " without -n" } else { "" }),
    };
    let (Some((offset, len)), Some(open)) = (place, &session.open) else { return false };
    let root = open.image.root;
    let flags = Flags { fua: letters.flags.fua || open.writethrough, ..letters.flags };
    if letters.vmstate || letters.flags.compressed {
        for (what, n) in [("offset", offset), ("count", len)] {
            if !n.is_multiple_of(512) {
                out(&format!("{n} is not a sector-aligned value for '{what}'\n"));
                return false;
            }
        }
    }
    if letters.vmstate {
        return failed("write", Errno::ENOTSUP);
    }
    let data = if letters.zeroes { None } else { Some(content(session, &letters, len)) };
    let data = match data {
        Some(None) => return false,
        other => other.flatten(),
    };
    let begun = Instant::now();
    let done = one_write(root, offset, len, data, flags).await;
    let took = begun.elapsed();
    if let Err(e) = done {
        return failed("write", e);
    }
    finish(&letters, "wrote", offset, len, took, &[]);
    true
}

/// Writes data, or zeroes if there is none.
pub(super) async fn one_write(
    root: Root,
    offset: u64,
    len: u64,
    data: Option<Buf>,
    flags: Flags,
) -> Result<(), Errno> {
    outside(root, offset, len)?;
    match data {
        Some(buf) => root.write(offset, buf, flags).await.0,
        None => root.write_zeroes(offset, len, Flags { compressed: false, ..flags }).await,
    }
}

/// What is to be written; complains itself.
fn content(session: &Session, letters: &Letters, len: u64) -> Option<Buf> {
    let mut buf = Buf::new(len as usize);
    let Some(file) = &letters.start else {
        buf.fill(letters.pattern.unwrap_or(0xcd));
        return Some(buf);
    };
    let source = match std::fs::File::open(file).and_then(|f| read_up_to(f, len)) {
        Ok(bytes) => bytes,
        Err(e) => {
            out(&format!("{file}: {}\n", Errno::of(&e)));
            return None;
        }
    };
    if source.is_empty() && len > 0 {
        session.tool.error(format!("{file}: file is empty"));
        return None;
    }
    for piece in buf.chunks_mut(source.len().max(1)) {
        piece.copy_from_slice(&source[..piece.len()]);
    }
    Some(buf)
}

fn read_up_to(file: std::fs::File, len: u64) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

async fn discard(session: &mut Session, p: Parsed) -> bool {
    let Some(letters) = Letters::parse(&p) else { return false };
    if p.operands.len() != 2 {
        return false;
    }
    let (Some((offset, len)), Some(open)) = (place(&p.operands, ""), &session.open) else { return false };
    let root = open.image.root;
    let begun = Instant::now();
    let done = match outside(root, offset, len) {
        Ok(()) => root.discard(offset, len).await,
        Err(e) => Err(e),
    };
    if let Err(e) = done {
        return failed("discard", e);
    }
    finish(&letters, "discard", offset, len, begun.elapsed(), &[]);
    true
}
