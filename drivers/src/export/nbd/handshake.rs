//! The server's side of the NBD option phase (fixed newstyle) as a pure state machine: bytes in, bytes out.
//!
//! Invariants:
//! - Input is hostile. The caller's buffer needs [`INPUT_LIMIT`] bytes and no more: an option whose data is
//!   larger is answered and then drained without being kept, up to [`DRAIN_LIMIT`] bytes in a handshake.
//! - A handshake ends: at most [`OPTION_LIMIT`] options plus four for each export (a client that lists
//!   exports asks for each).
//! - Nothing is sent that the protocol forbids at that point: a client without the fixed flag gets no error
//!   replies, it is hung up on.
//! - The only state that outlives an option is the framing, the meta contexts and the export they are for.
//!
//! ```text
//! greeting ──► ClientFlags ──► Options ◄──► Drain
//!                                │  └─ GO, EXPORT_NAME ──► Step::Enter(Negotiated)
//!                                └─ ABORT, nonsense ─────► Step::Close
//! ```

use super::wire::{self, Framing, MAX_STRING, be16, be32, be64, flag, handshake_flag, info, opt, rep};

/// The largest option data that is looked at: a name of 4096 bytes with room for contexts.
pub const OPTION_DATA_LIMIT: usize = 8192;
/// The bytes a caller must be able to offer to [`Handshake::step`] at once.
pub const INPUT_LIMIT: usize = OPTION_HEADER + OPTION_DATA_LIMIT;
/// How much oversized option data is drained before the connection is given up, in bytes.
pub const DRAIN_LIMIT: u64 = 32 << 20;
/// Options a client may send before it must have entered transmission.
pub const OPTION_LIMIT: usize = 32;

const OPTION_HEADER: usize = 16;

/// What a client may know of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Name, at most 4096 bytes.
    pub name: String,
    /// Description, at most 4096 bytes.
    pub description: Option<String>,
    /// Size in bytes, as far as new clients may see.
    pub size: u64,
    /// Transmission flags, without those that depend on the framing.
    pub flags: u16,
    /// Minimum and preferred block size in bytes.
    pub block_min: u32,
    /// See `block_min`.
    pub block_preferred: u32,
    /// `qemu:allocation-depth` may be asked for.
    pub depth: bool,
}

/// The exports a handshake can see.
pub trait Catalogue {
    /// The export of that name.
    fn find(&self, name: &[u8]) -> Option<ExportInfo>;
    /// All exports, in a stable order.
    fn all(&self) -> Vec<ExportInfo>;
    /// How many exports there are.
    fn count(&self) -> usize;
}

/// The meta contexts of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Contexts {
    /// `base:allocation`.
    pub base: bool,
    /// `qemu:allocation-depth`.
    pub depth: bool,
}

impl Contexts {
    /// Whether none is selected.
    pub fn is_empty(self) -> bool {
        !self.base && !self.depth
    }
}

/// Number under which `base:allocation` is reported.
pub const BASE_ID: u32 = 0;
/// Number under which `qemu:allocation-depth` is reported.
pub const DEPTH_ID: u32 = 1;
const BASE_NAME: &[u8] = b"base:allocation";
const DEPTH_NAME: &[u8] = b"qemu:allocation-depth";

/// What was agreed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// The export, as it was shown to the client.
    pub export: ExportInfo,
    /// The transmission flags the client was told.
    pub flags: u16,
    /// How the transmission is framed.
    pub framing: Framing,
    /// Contexts that a block status reports.
    pub contexts: Contexts,
}

/// What to do after a call of [`Handshake::step`]; in every case `out` is to be sent first.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done before more bytes arrive.
    More,
    /// Something was done; call again with what is left of the input.
    Again,
    /// Hang up.
    Close,
    /// The rest of the input belongs to the transmission phase.
    Enter(Box<Negotiated>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    ClientFlags,
    Options,
    Drain { left: u64 },
}

/// The option phase of one connection.
#[derive(Debug)]
pub struct Handshake {
    phase: Phase,
    fixed: bool,
    no_zeroes: bool,
    framing: Framing,
    contexts: Option<(String, Contexts)>,
    options: usize,
    drained: u64,
}

impl Default for Handshake {
    fn default() -> Self {
        Handshake::new()
    }
}

/// Why an option fails: the reply's type and text.
type Refusal = (u32, String);

impl Handshake {
    /// A handshake at its start; send [`greeting`](Handshake::greeting) first.
    pub fn new() -> Handshake {
        Handshake {
            phase: Phase::ClientFlags,
            fixed: false,
            no_zeroes: false,
            framing: Framing::Simple,
            contexts: None,
            options: 0,
            drained: 0,
        }
    }

    /// What the server says on accept.
    pub fn greeting() -> [u8; 18] {
        let mut g = [0u8; 18];
        g[..8].copy_from_slice(&wire::INIT_MAGIC.to_be_bytes());
        g[8..16].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        g[16..].copy_from_slice(&flags.to_be_bytes());
        g
    }

    /// Does at most one thing with the front of `input`, appending what is to be sent to `out`.
    /// Returns how many bytes of `input` are used up.
    pub fn step(&mut self, input: &[u8], cat: &dyn Catalogue, out: &mut Vec<u8>) -> (usize, Step) {
        match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Drain { left } => {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                let left = left - n as u64;
                self.phase = if left == 0 { Phase::Options } else { Phase::Drain { left } };
                (n, if left == 0 { Step::Again } else { Step::More })
            }
            Phase::Options => self.option(input, cat, out),
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Step) {
        let Some(flags) = be32(input, 0) else {
            return (0, Step::More);
        };
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return (4, Step::Close);
        }
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.phase = Phase::Options;
        (4, Step::Again)
    }

    fn option(&mut self, input: &[u8], cat: &dyn Catalogue, out: &mut Vec<u8>) -> (usize, Step) {
        // The magic is judged as soon as it is there: a foreign client must not be waited for.
        match be64(input, 0) {
            None => return (0, Step::More),
            Some(m) if m != wire::OPTION_MAGIC => return (8, Step::Close),
            Some(_) => {}
        }
        let (Some(number), Some(len)) = (be32(input, 8), be32(input, 12)) else {
            return (0, Step::More);
        };
        let too_big = len as usize > OPTION_DATA_LIMIT;
        let Some(data) = input.get(OPTION_HEADER..).and_then(|d| d.get(..len as usize)) else {
            return if too_big { self.oversized(number, len, out) } else { (0, Step::More) };
        };
        if too_big {
            return self.oversized(number, len, out);
        }
        let used = OPTION_HEADER + data.len();
        self.options += 1;
        if self.options > cat.count().saturating_mul(4).saturating_add(OPTION_LIMIT) {
            return (used, Step::Close);
        }
        (used, self.dispatch(number, data, cat, out))
    }

    /// An option too large to be meant well: say so and skip its data.
    fn oversized(&mut self, number: u32, len: u32, out: &mut Vec<u8>) -> (usize, Step) {
        self.options += 1;
        self.drained = self.drained.saturating_add(len.into());
        // EXPORT_NAME and ABORT have no error reply.
        let silent = !self.fixed || matches!(number, opt::EXPORT_NAME | opt::ABORT);
        if silent || self.drained > DRAIN_LIMIT {
            return (OPTION_HEADER, Step::Close);
        }
        match known(number) {
            true => refuse(out, number, (rep::ERR_TOO_BIG, "option data too large".into())),
            false => refuse(out, number, unsupported(number)),
        }
        self.phase = Phase::Drain { left: len.into() };
        (OPTION_HEADER, Step::Again)
    }

    fn dispatch(&mut self, number: u32, data: &[u8], cat: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        if number == opt::EXPORT_NAME {
            return self.export_name(data, cat, out);
        }
        if !self.fixed {
            return Step::Close;
        }
        let result = match number {
            opt::ABORT => {
                wire::option_reply(out, number, rep::ACK, &[]);
                return Step::Close;
            }
            opt::LIST => no_data(data).map(|()| list(cat, out)),
            opt::STARTTLS => {
                no_data(data).and(Err((rep::ERR_POLICY, "TLS is not configured on this server".into())))
            }
            opt::INFO | opt::GO => match self.info(number, data, cat, out) {
                Ok(Some(negotiated)) => {
                    wire::option_reply(out, number, rep::ACK, &[]);
                    return Step::Enter(Box::new(negotiated));
                }
                other => other.map(|_| ()),
            },
            opt::STRUCTURED_REPLY => no_data(data).and_then(|()| self.upgrade(Framing::Structured)),
            opt::EXTENDED_HEADERS => no_data(data).and_then(|()| self.upgrade(Framing::Extended)),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta(number, data, cat, out),
            _ => Err(unsupported(number)),
        };
        match result {
            Ok(()) => wire::option_reply(out, number, rep::ACK, &[]),
            Err(why) => refuse(out, number, why),
        }
        Step::Again
    }

    fn upgrade(&mut self, to: Framing) -> Result<(), Refusal> {
        match (self.framing, to) {
            (Framing::Extended, Framing::Structured) => {
                Err((rep::ERR_EXT_HEADER_REQD, "extended headers were already negotiated".into()))
            }
            (have, want) if have == want => Err((rep::ERR_INVALID, "this was already negotiated".into())),
            _ => {
                self.framing = to;
                Ok(())
            }
        }
    }

    /// The flags a client is told, given what else was agreed.
    fn flags(&self, export: &ExportInfo, contexts: Contexts) -> u16 {
        let df = if self.framing == Framing::Simple { 0 } else { flag::SEND_DF };
        let payload = self.framing == Framing::Extended && !contexts.is_empty();
        flag::HAS_FLAGS | export.flags | df | if payload { flag::BLOCK_STATUS_PAYLOAD } else { 0 }
    }

    /// The contexts agreed for that export; those agreed for another one do not count.
    fn contexts_for(&self, export: &ExportInfo) -> Contexts {
        match &self.contexts {
            Some((name, c)) if *name == export.name => *c,
            _ => Contexts::default(),
        }
    }

    fn negotiated(&self, export: ExportInfo) -> Negotiated {
        let contexts = self.contexts_for(&export);
        let flags = self.flags(&export, contexts);
        Negotiated { export, flags, framing: self.framing, contexts }
    }

    /// The old way in: no reply but the export itself, and a hang-up if there is none.
    fn export_name(&mut self, data: &[u8], cat: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        if data.len() > MAX_STRING || self.framing == Framing::Extended {
            return Step::Close;
        }
        let Some(export) = cat.find(data) else {
            return Step::Close;
        };
        let n = self.negotiated(export);
        out.extend_from_slice(&n.export.size.to_be_bytes());
        out.extend_from_slice(&n.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0u8; 124]);
        }
        Step::Enter(Box::new(n))
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`; `Some` if the client may go.
    fn info(
        &mut self,
        number: u32,
        data: &[u8],
        cat: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<Option<Negotiated>, Refusal> {
        let (name, rest) = string(data)?;
        let count = usize::from(be16(rest, 0).ok_or_else(inconsistent)?);
        let wanted = &rest[2..];
        if wanted.len() != count * 2 {
            return Err(inconsistent());
        }
        let asks = |what: u16| wanted.as_chunks::<2>().0.iter().any(|w| u16::from_be_bytes(*w) == what);
        let n = self.negotiated(cat.find(name).ok_or_else(|| no_export(name))?);
        if asks(info::NAME) {
            let item = info::NAME.to_be_bytes();
            wire::option_reply(out, number, rep::INFO, &[&item, n.export.name.as_bytes()]);
        }
        if let Some(text) = &n.export.description {
            let item = info::DESCRIPTION.to_be_bytes();
            wire::option_reply(out, number, rep::INFO, &[&item, text.as_bytes()]);
        }
        let item = info::BLOCK_SIZE.to_be_bytes();
        let sizes = [n.export.block_min, n.export.block_preferred, wire::MAX_PAYLOAD].map(u32::to_be_bytes);
        wire::option_reply(out, number, rep::INFO, &[&item, sizes.as_flattened()]);
        let item = info::EXPORT.to_be_bytes();
        let (size, flags) = (n.export.size.to_be_bytes(), n.flags.to_be_bytes());
        wire::option_reply(out, number, rep::INFO, &[&item, &size, &flags]);
        Ok((number == opt::GO).then_some(n))
    }

    fn meta(
        &mut self,
        number: u32,
        data: &[u8],
        cat: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let set = number == opt::SET_META_CONTEXT;
        if set {
            // Whatever comes of this one, the contexts set before are gone.
            self.contexts = None;
            if self.framing == Framing::Simple {
                return Err((rep::ERR_INVALID, "structured replies must be negotiated first".into()));
            }
        }
        let (name, rest) = string(data)?;
        let count = be32(rest, 0).ok_or_else(inconsistent)?;
        let mut rest = &rest[4..];
        let export = cat.find(name).ok_or_else(|| no_export(name))?;
        let mut found = Contexts::default();
        for _ in 0..count {
            let (query, tail) = string(rest)?;
            rest = tail;
            select(query, set, export.depth, &mut found);
        }
        if !rest.is_empty() {
            return Err(inconsistent());
        }
        if count == 0 && !set {
            found = Contexts { base: true, depth: export.depth };
        }
        // A listing says 0 for every number: there is nothing to refer to yet.
        let id = |id: u32| if set { id } else { 0 }.to_be_bytes();
        if found.base {
            wire::option_reply(out, number, rep::META_CONTEXT, &[&id(BASE_ID), BASE_NAME]);
        }
        if found.depth {
            wire::option_reply(out, number, rep::META_CONTEXT, &[&id(DEPTH_ID), DEPTH_NAME]);
        }
        if set {
            self.contexts = Some((export.name, found));
        }
        Ok(())
    }
}

/// Adds what a query asks for. `base:` and `qemu:` alone are wildcards, in listings only; unknown queries
/// match nothing and are no error.
fn select(query: &[u8], set: bool, depth: bool, found: &mut Contexts) {
    match query {
        b"base:" => found.base |= !set,
        b"qemu:" => found.depth |= depth && !set,
        q if q == BASE_NAME => found.base = true,
        q if q == DEPTH_NAME => found.depth |= depth,
        _ => {}
    }
}

fn list(cat: &dyn Catalogue, out: &mut Vec<u8>) {
    for e in cat.all() {
        // Names are bounded when the export is made.
        let len = (e.name.len() as u32).to_be_bytes();
        let text = e.description.as_deref().unwrap_or_default();
        wire::option_reply(out, opt::LIST, rep::SERVER, &[&len, e.name.as_bytes(), text.as_bytes()]);
    }
}

/// Reads a string with its length in front; returns it and what follows.
fn string(b: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let len = be32(b, 0).ok_or_else(inconsistent)? as usize;
    if len > MAX_STRING {
        return Err((rep::ERR_INVALID, format!("a string of {len} bytes is longer than {MAX_STRING}")));
    }
    b[4..].split_at_checked(len).ok_or_else(inconsistent)
}

fn no_data(data: &[u8]) -> Result<(), Refusal> {
    match data {
        [] => Ok(()),
        _ => Err((rep::ERR_INVALID, "this option takes no data".into())),
    }
}

fn known(number: u32) -> bool {
    matches!(number, opt::EXPORT_NAME..=opt::LIST | opt::STARTTLS..=opt::EXTENDED_HEADERS)
}

fn inconsistent() -> Refusal {
    (rep::ERR_INVALID, "the lengths in the option do not fit".into())
}

fn unsupported(number: u32) -> Refusal {
    (rep::ERR_UNSUP, format!("option {number} is not supported"))
}

fn no_export(name: &[u8]) -> Refusal {
    // The name is the client's: cut so that the answer can never outgrow the protocol's limit.
    let shown = String::from_utf8_lossy(&name[..name.len().min(80)]);
    let more = if name.len() > 80 { "..." } else { "" };
    (rep::ERR_UNKNOWN, format!("export '{shown}{more}' not present"))
}

fn refuse(out: &mut Vec<u8>, number: u32, (ty, text): Refusal) {
    wire::option_reply(out, number, ty, &[wire::clip(&text).as_bytes()]);
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
