//! `break`, `remove_break`, `wait_break`, `resume`: holding requests up at events that a `blkdebug` node hears.
//!
//! ```text
//! break l2_load A ─► aio_read … ─► wait_break A (the request hangs there) ─► … ─► resume A
//! ```

use super::command::{self, Command};
use super::session::Session;
use crate::tool::getopt::Parsed;
use crate::tool::out;
use ringblock_drivers::filter::blkdebug::{Blkdebug, Note};
use ringblock_engine::Errno;
use ringblock_engine::driver::Driver;
use ringblock_engine::graph::Graph;
use std::sync::Arc;

const fn plain(
    name: &'static str,
    words: (usize, usize),
    args: &'static str,
    summary: &'static str,
    run: command::Run,
) -> Command {
    let (alias, options) = ("", &[] as &[_]);
    Command { name, alias, words, without_image: false, writes: false, args, summary, options, run }
}

pub(super) const COMMANDS: &[Command] = &[
    plain(
        "break",
        (2, 2),
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
        |s, p| Box::pin(async move { set(s, &p) }),
    ),
    plain("remove_break", (1, 1), "tag", "remove a breakpoint by tag", |s, p| {
        Box::pin(async move { remove(s, &p) })
    }),
    plain("wait_break", (1, 1), "tag", "waits for the suspension of a request", |s, p| Box::pin(wait(s, p))),
    plain("resume", (1, 1), "tag", "resumes the request tagged as tag", |s, p| {
        Box::pin(async move { resume(s, &p) })
    }),
];

/// The first node on the way down that hears events. `ENOTSUP` if there is none.
fn listener(session: &Session) -> Result<Arc<dyn Driver>, Errno> {
    let open = session.open.as_ref().ok_or(Errno::ENOMEDIUM)?;
    let graph = Graph::current().info();
    let mut id = open.image.id;
    loop {
        let node = graph.nodes.iter().find(|n| n.id == id).ok_or(Errno::ENOTSUP)?;
        if node.driver.listens() {
            return Ok(node.driver.clone());
        }
        id = node.edges.first().ok_or(Errno::ENOTSUP)?.node;
    }
}

fn with(session: &Session, f: impl FnOnce(&Blkdebug) -> Result<(), Errno>) -> Result<(), Errno> {
    let driver = listener(session)?;
    f(driver.as_any().downcast_ref::<Blkdebug>().ok_or(Errno::ENOTSUP)?)
}

fn word(p: &Parsed, at: usize) -> &str {
    p.operands.get(at).map_or("", String::as_str)
}

/// Says what failed; whether all is well.
fn done(result: Result<(), Errno>, what: &str) -> bool {
    if let Err(e) = result {
        out(&format!("{what}: {e}\n"));
    }
    result.is_ok()
}

fn set(session: &Session, p: &Parsed) -> bool {
    let result = with(session, |node| {
        node.set_listener(|note| match note {
            Note::Suspended(tag) => out(&format!("blkdebug: Suspended request '{tag}'\n")),
            Note::Resuming(tag) => out(&format!("blkdebug: Resuming request '{tag}'\n")),
        });
        node.add_break(word(p, 0), word(p, 1))
    });
    done(result, "Could not set breakpoint")
}

fn remove(session: &Session, p: &Parsed) -> bool {
    let tag = word(p, 0);
    done(with(session, |node| node.remove_break(tag)), &format!("Could not remove breakpoint {tag}"))
}

fn resume(session: &Session, p: &Parsed) -> bool {
    done(with(session, |node| node.resume(word(p, 0))), "Could not resume request")
}

/// At the end of the run nobody is left to resume what is held up.
pub(super) fn let_go(session: &Session) {
    // nothing to do where nothing listens
    let _ = with(session, |node| {
        node.remove_all_breaks();
        Ok(())
    });
}

async fn wait(session: &mut Session, p: Parsed) -> bool {
    let driver = match listener(session) {
        Ok(driver) => driver,
        Err(e) => return done(Err(e), "Could not wait for a breakpoint"),
    };
    if let Some(node) = driver.as_any().downcast_ref::<Blkdebug>() {
        node.wait_break(word(&p, 0)).await;
    }
    true
}
