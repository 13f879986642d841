//! `aio_read`, `aio_write`: requests that are started and reported when they are done.

use super::command::{Command, MANY, usage};
use super::rw::{Letters, finish, one_write, place};
use super::session::Session;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::out;
use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use std::time::Instant;

const READ: Command = Command {
    name: "aio_read",
    alias: "",
    words: (2, MANY),
    without_image: false,
    writes: false,
    args: "[-Ciqrv] [-P pattern] off len [len..]",
    summary: "asynchronously reads a number of bytes",
    options: &[
        opt('C', "C", "", "report for programs"),
        opt('i', "i", "", "ignored"),
        opt('q', "q", "", "report nothing"),
        opt('r', "r", "", "use a registered buffer (all are)"),
        opt('v', "v", "", "print what was read"),
        opt('P', "P", "BYTE", "the data must be this byte"),
    ],
    run: |s, p| Box::pin(async move { read(s, &p) }),
};

const WRITE: Command = Command {
    name: "aio_write",
    alias: "",
    words: (2, MANY),
    without_image: false,
    writes: true,
    args: "[-Cfiqruz] [-P pattern] off len [len..]",
    summary: "asynchronously writes a number of bytes",
    options: &[
        opt('C', "C", "", "report for programs"),
        opt('f', "f", "", "durable on completion"),
        opt('i', "i", "", "ignored"),
        opt('q', "q", "", "report nothing"),
        opt('r', "r", "", "use a registered buffer (all are)"),
        opt('u', "u", "", "with -z: may deallocate"),
        opt('z', "z", "", "zeroes, without sending them"),
        opt('P', "P", "BYTE", "fill with this byte (default: 0xcd)"),
    ],
    run: |s, p| Box::pin(async move { write(s, &p) }),
};

pub(super) const COMMANDS: &[Command] = &[
    READ,
    WRITE,
    Command {
        name: "aio_flush",
        alias: "",
        words: (0, 0),
        without_image: false,
        writes: false,
        args: "",
        summary: "completes all outstanding aio requests",
        options: &[],
        run: |s, _| {
            Box::pin(async move {
                s.wait_all().await;
                true
            })
        },
    },
];

fn read(session: &mut Session, p: &Parsed) -> bool {
    let Some(letters) = Letters::parse(p) else { return false };
    if p.operands.len() < 2 {
        out(&usage(&READ));
        return false;
    }
    let (Some((offset, len)), Some(open)) = (place(&p.operands, ""), &session.open) else { return false };
    let (root, pending) = (open.image.root, session.pending.clone());
    pending.start();
    Core::current().spawn(async move {
        let begun = Instant::now();
        let (done, buf) = root.read(offset, Buf::new(len as usize)).await;
        let took = begun.elapsed();
        match done {
            Err(e) => out(&format!("readv failed: {e}\n")),
            Ok(()) => {
                if letters.pattern.is_some_and(|pattern| buf.iter().any(|b| *b != pattern)) {
                    out(&format!("Pattern verification failed at offset {offset}, {len} bytes\n"));
                }
                finish(&letters, "read", offset, len, took, &buf);
            }
        }
        pending.done();
    });
    true
}

fn write(session: &mut Session, p: &Parsed) -> bool {
    let Some(letters) = Letters::parse(p) else { return false };
    if p.operands.len() < 2 {
        out(&usage(&WRITE));
        return false;
    }
    let complaint = if letters.zeroes && p.operands.len() != 2 {
        "-z supports only a single length parameter"
    } else if letters.flags.may_unmap && !letters.zeroes {
        "-u requires -z to be specified"
    } else if letters.zeroes && letters.pattern.is_some() {
        "-z and -P cannot be specified at the same time"
    } else {
        ""
    };
    if !complaint.is_empty() {
        out(&format!("{complaint}\n"));
        return false;
    }
    let (Some((offset, len)), Some(open)) = (place(&p.operands, ""), &session.open) else { return false };
    let (root, pending) = (open.image.root, session.pending.clone());
    let flags = Flags { fua: letters.flags.fua || open.writethrough, ..letters.flags };
    pending.start();
    Core::current().spawn(async move {
        let data = (!letters.zeroes).then(|| {
            let mut buf = Buf::new(len as usize);
            buf.fill(letters.pattern.unwrap_or(0xcd));
            buf
        });
        let begun = Instant::now();
        match one_write(root, offset, len, data, flags).await {
            Err(e) => out(&format!("aio_write failed: {e}\n")),
            Ok(()) => finish(&letters, "wrote", offset, len, begun.elapsed(), &[]),
        }
        pending.done();
    });
    true
}
