//! Requests as tasks: each runs one command on the export's root and queues its reply.
//!
//! Invariant: every request that was admitted replies exactly once, whatever comes of it, and gives back what
//! it was admitted with. Reads and writes allocate nothing here in steady state: the task's memory, the
//! buffer and the batch are all recycled.
//!
//! ```text
//! Command ──► Root::{read, write, write_zeroes, discard, flush, status} ──► wire ──► Flow::reply
//! ```

use std::rc::Rc;
use std::sync::Arc;

use ringblock_engine::Errno;
use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Party, Permit, Root};

use super::flow::Flow;
use super::handshake::{BASE_ID, Contexts, DEPTH_ID};
use super::status::{Descriptors, LIMIT, base_flags};
use super::transmission::Command;
use super::wire::{self, Framing, NbdError, ReplyTo};

/// What the tasks of a connection share.
pub(super) struct Client {
    pub(super) flow: Flow,
    pub(super) root: Root,
    /// In whose name it asks the limits.
    pub(super) party: Arc<Party>,
    /// Every write is durable before its reply.
    pub(super) writethrough: bool,
}

/// Bytes of one read of the cache command, and how far one command reads at most.
const CACHE_PIECE: u64 = 256 << 10;
const CACHE_LIMIT: u64 = 32 << 20;

/// What a command is admitted with, in bytes.
pub(super) fn weight(command: &Command) -> usize {
    match *command {
        Command::Read { len, .. } | Command::Write { len, .. } => len as usize,
        // the largest reply: two chunks of 16-byte descriptors
        Command::BlockStatus { .. } => 2 * 16 * LIMIT as usize,
        Command::Cache { .. } => CACHE_PIECE as usize,
        _ => 0,
    }
}

impl Client {
    /// Replies to a command that has no data to give.
    fn answer(&self, to: ReplyTo, weight: usize, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.flow.reply(weight, None, |o| wire::done(o, to)),
            Err(e) => self.fail(to, weight, NbdError::of(e), None),
        }
    }

    /// Replies with an error; `text` where there is a better one than the number's.
    pub(super) fn fail(&self, to: ReplyTo, weight: usize, error: NbdError, text: Option<&str>) {
        let text = text.unwrap_or(error.text());
        self.flow.reply(weight, None, |o| wire::error_reply(o, to, error, text));
    }
}

/// Runs a read. Its memory is taken when the limits have allowed it.
pub(super) async fn read(client: Rc<Client>, to: ReplyTo, off: u64, len: u32) {
    let (result, buf) = match len {
        0 => (Ok(()), Buf::new(0)),
        _ => match client.party.admit(false, u64::from(len)).await {
            Ok(permit) => client.root.read_admitted(permit, off, Buf::new(len as usize)).await,
            Err(e) => (Err(e), Buf::new(0)),
        },
    };
    match result {
        Ok(()) => client.flow.reply(len as usize, Some(buf), |o| wire::read_head(o, to, len)),
        Err(e) => client.fail(to, len as usize, NbdError::of(e), None),
    }
}

/// Runs a write that the limits have allowed.
pub(super) async fn write(client: Rc<Client>, to: ReplyTo, permit: Permit, off: u64, buf: Buf, fua: bool) {
    let len = buf.len();
    let flags = Flags { fua: fua || client.writethrough, ..Flags::NONE };
    let result = match len {
        0 => Ok(()),
        _ => client.root.write_admitted(permit, off, buf, flags).await.0,
    };
    client.answer(to, len, result);
}

/// Runs everything else.
pub(super) async fn other(client: Rc<Client>, to: ReplyTo, command: Command) {
    let w = weight(&command);
    let root = &client.root;
    let through = client.writethrough;
    let result = match command {
        Command::Flush => root.flush().await,
        Command::WriteZeroes { len: 0, .. } | Command::Trim { len: 0, .. } => Ok(()),
        Command::WriteZeroes { off, len, fua, no_hole, fast } => {
            let flags = Flags { fua: fua || through, may_unmap: !no_hole, no_fallback: fast, ..Flags::NONE };
            match client.party.admit(true, len).await {
                Ok(permit) => root.write_zeroes_admitted(permit, off, len, flags).await,
                Err(e) => Err(e),
            }
        }
        Command::Trim { off, len, fua } => match trim(&client, off, len).await {
            Ok(()) if fua || through => root.flush().await,
            other => other,
        },
        Command::Cache { off, len } => cache(&client, off, len).await,
        Command::BlockStatus { off, len, one, contexts } => {
            match status(root, to, off, len, one, contexts).await {
                Ok(chunks) => return client.flow.reply(w, None, |o| o.extend_from_slice(&chunks)),
                Err(e) => Err(e),
            }
        }
        // These never come here: they are not requests that run beside others.
        Command::Read { .. } | Command::Write { .. } | Command::Disconnect => Err(Errno::EINVAL),
    };
    client.answer(to, w, result);
}

async fn trim(client: &Client, off: u64, len: u64) -> Result<(), Errno> {
    let permit = client.party.admit(true, len).await?;
    client.root.discard_admitted(permit, off, len).await
}

/// Reads a range and throws it away: metadata and page cache are warm then. Advice, so it stops at a limit.
async fn cache(client: &Client, off: u64, len: u64) -> Result<(), Errno> {
    let len = len.min(CACHE_LIMIT);
    let mut buf = Buf::new(0);
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(CACHE_PIECE) as usize;
        let permit = client.party.admit(false, piece as u64).await?;
        if buf.capacity() < piece {
            buf = Buf::new(piece);
        }
        buf.set_len(piece);
        let result;
        (result, buf) = client.root.read_admitted(permit, off + done, buf).await;
        result?;
        done += piece as u64;
    }
    Ok(())
}

/// The chunks that describe a range, one for each context.
async fn status(
    root: &Root,
    to: ReplyTo,
    off: u64,
    len: u64,
    one: bool,
    contexts: Contexts,
) -> Result<Vec<u8>, Errno> {
    debug_assert!(to.framing != Framing::Simple && !contexts.is_empty());
    let mut out = Vec::new();
    for (id, last) in [(BASE_ID, !contexts.depth), (DEPTH_ID, true)] {
        if !(if id == BASE_ID { contexts.base } else { contexts.depth }) {
            continue;
        }
        let mut d = Descriptors::new(&mut out, to, id, len, one);
        loop {
            let at = off + (len - d.left());
            let above = root.status_above(None, at..off + len, true).await?;
            let s = above.status;
            let flags = match id {
                BASE_ID => base_flags(s.data, s.zero),
                _ if s.allocated => above.depth.saturating_add(1),
                // what lies past the end of a shorter layer counts as that layer's
                _ if above.past_end => above.depth.saturating_add(2),
                _ => 0,
            };
            if s.len == 0 {
                return Err(Errno::EIO);
            }
            if !d.push(s.len, flags) {
                break;
            }
        }
        d.finish(last);
    }
    Ok(out)
}
