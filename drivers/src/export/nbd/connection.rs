//! One client: option phase, then requests in and replies out, all on one core.
//!
//! Invariants:
//! - The option phase has a deadline; when it passes the socket is shut and nothing is left behind.
//! - One buffer takes in many requests; only a write's data that is not in it already is received on its
//!   own, straight into the buffer that is written.
//! - Requests are admitted before their data is received or their memory taken.
//! - At the end every request has run, replies are out (if the client still takes them), then the socket is
//!   closed.
//!
//! ```text
//! recv ──► [req req req write+data req …] ──► judge ──► spawn tasks ──► Flow
//!                           └ data goes on: recv into the write's own buffer
//! ```

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use ringblock_engine::core::Core;
use ringblock_engine::mem::Buf;
use ringblock_engine::net::Socket;
use ringblock_engine::path::Party;
use ringblock_engine::ring::SendBatch;
use ringblock_engine::timer::Sleep;

use super::flow::Flow;
use super::handshake::{Catalogue, Handshake, INPUT_LIMIT, Negotiated, Step};
use super::pace::Pace;
use super::serve::{self, Client};
use super::transmission::{Command, STATUS_PAYLOAD_LIMIT, Session, Verdict};
use super::wire::{HeaderError, NbdError, ReplyTo, RequestHeader};

/// Bytes of the receive buffer; holds the largest option and many requests.
const RECEIVE: usize = 64 << 10;
/// Writes from this size on are expected to be followed by such writes: the next receive then takes in
/// little, so that their data need not be copied.
const LARGE: u32 = 32 << 10;
/// What such a receive takes in.
const LITTLE: usize = 4 << 10;

const _: () = assert!(RECEIVE > INPUT_LIMIT);

/// The receive buffer: `rx[pos..end]` has come and is not used up.
pub(super) struct Input {
    stream: Socket,
    rx: Option<Buf>,
    pos: usize,
    end: usize,
}

/// The stream is over: end of file, or an error which says as little to us.
pub(super) struct Over;

impl Input {
    fn new(stream: Socket) -> Input {
        Input { stream, rx: Some(Buf::new(RECEIVE)), pos: 0, end: 0 }
    }

    /// A receive buffer that begins with what another had left.
    pub(super) fn with(stream: Socket, ahead: &[u8]) -> Input {
        let mut rx = Buf::new(RECEIVE);
        let end = ahead.len().min(RECEIVE);
        debug_assert_eq!(end, ahead.len(), "it was in such a buffer");
        rx[..end].copy_from_slice(&ahead[..end]);
        Input { stream, rx: Some(rx), pos: 0, end }
    }

    /// What has come and is not used up, for another core.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes().to_vec()
    }

    fn bytes(&self) -> &[u8] {
        self.rx.as_ref().map_or(&[], |b| &b[self.pos..self.end])
    }

    fn used(&mut self, n: usize) {
        self.pos += n;
    }

    /// Receives at least one more byte, and at most `limit`.
    async fn more(&mut self, limit: usize) -> Result<(), Over> {
        let Some(mut rx) = self.rx.take() else {
            return Err(Over);
        };
        if self.pos > 0 {
            rx.copy_within(self.pos..self.end, 0);
            (self.pos, self.end) = (0, self.end - self.pos);
        }
        let room = (RECEIVE - self.end).min(limit);
        if room == 0 {
            return Err(Over);
        }
        let (got, rx) = self.stream.recv(rx, self.end, room).await;
        self.rx = Some(rx);
        match got {
            Ok(n) if n > 0 => {
                self.end += n;
                Ok(())
            }
            _ => Err(Over),
        }
    }

    /// Fills a buffer with the next bytes of the stream.
    async fn take(&mut self, len: usize) -> Result<Buf, Over> {
        let mut buf = Buf::new(len);
        let have = len.min(self.end - self.pos);
        buf[..have].copy_from_slice(&self.bytes()[..have]);
        self.used(have);
        let mut at = have;
        while at < len {
            let got;
            (got, buf) = self.stream.recv(buf, at, len - at).await;
            match got {
                Ok(n) if n > 0 => at += n,
                _ => return Err(Over),
            }
        }
        Ok(buf)
    }

    /// Throws away the next bytes of the stream.
    async fn skip(&mut self, mut len: usize) -> Result<(), Over> {
        loop {
            let have = len.min(self.end - self.pos);
            self.used(have);
            len -= have;
            if len == 0 {
                return Ok(());
            }
            self.more(RECEIVE).await?;
        }
    }
}

/// What the option phase ends with.
pub(super) struct Entered<B> {
    pub(super) negotiated: Negotiated,
    pub(super) input: Input,
    pub(super) bound: B,
}

/// Runs the option phase within `limit_ns` (0: no limit). `None` if it led nowhere.
///
/// `bind` ties the client to the export it chose, before the client hears that it may go: whoever was let in
/// is counted. It is not let in where that fails.
pub(super) async fn negotiate<B>(
    stream: &Socket,
    catalogue: &dyn Catalogue,
    limit_ns: u64,
    bind: impl Fn(&str) -> Option<B>,
) -> Option<Entered<B>> {
    let mut work = pin!(options(stream, catalogue, bind));
    let mut late = pin!(Sleep::ns(if limit_ns == 0 { u64::MAX } else { limit_ns }));
    let mut shut = false;
    std::future::poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done.ok().filter(|_| !shut));
        }
        if !shut && late.as_mut().poll(cx).is_ready() {
            // The operation under way ends with this; the work is polled until it has.
            shut = true;
            stream.shutdown();
        }
        Poll::Pending
    })
    .await
}

async fn options<B>(
    stream: &Socket,
    catalogue: &dyn Catalogue,
    bind: impl Fn(&str) -> Option<B>,
) -> Result<Entered<B>, Over> {
    let mut handshake = Handshake::new();
    let mut input = Input::new(stream.clone());
    let mut batch: Box<SendBatch> = Box::default();
    let mut out = Handshake::greeting().to_vec();
    let mut step = Step::More;
    loop {
        let bound = match &step {
            Step::Enter(negotiated) => Some(bind(&negotiated.export.name).ok_or(Over)?),
            _ => None,
        };
        let flush = step != Step::Again || out.len() > RECEIVE;
        if flush && !out.is_empty() {
            batch.clear();
            batch.push_bytes(&out);
            out.clear();
            let sent;
            (sent, batch) = stream.send(batch).await;
            sent.map_err(|_| Over)?;
        }
        match (step, bound) {
            (Step::Enter(negotiated), Some(bound)) => {
                return Ok(Entered { negotiated: *negotiated, input, bound });
            }
            (Step::Enter(_) | Step::Close, _) => return Err(Over),
            (Step::More, _) => input.more(RECEIVE).await?,
            (Step::Again, _) => {}
        }
        let used;
        (used, step) = handshake.step(input.bytes(), catalogue, &mut out);
        input.used(used);
    }
}

/// Runs the transmission phase to its end.
pub(super) async fn transmit(client: Rc<Client>, session: Session, mut input: Input) {
    let core = Core::current();
    let sender = client.clone();
    let sent = core.spawn_join(async move { sender.flow.run().await });
    let mut reader = Reader { core, client: client.clone(), session, large: false, pace: Pace::default() };
    // However it ends, what was taken on is finished.
    let _ = reader.run(&mut input).await;
    // Nobody waits for what the limits still hold back.
    client.party.leave();
    client.flow.close();
    sent.await;
}

struct Reader {
    core: Rc<Core>,
    client: Rc<Client>,
    session: Session,
    large: bool,
    pace: Pace,
}

impl Reader {
    /// Takes in requests until the client leaves or must go.
    async fn run(&mut self, input: &mut Input) -> Result<(), Over> {
        let mut taken = 0;
        loop {
            if self.client.flow.is_broken() {
                return Err(Over);
            }
            match RequestHeader::parse(input.bytes(), self.session.framing) {
                Ok(header) => {
                    taken += 1;
                    input.used(self.session.framing.request_len());
                    self.request(&header, input).await?;
                }
                Err(HeaderError::Short) => {
                    let limit = if self.large { LITTLE } else { RECEIVE };
                    let pause = self.pace.next(self.core.now_exact(), taken);
                    taken = 0;
                    if pause > 0 {
                        Sleep::ns(pause).await;
                    }
                    input.more(limit).await?;
                }
                Err(HeaderError::Magic) => return Err(Over),
            }
        }
    }

    async fn request(&mut self, header: &RequestHeader, input: &mut Input) -> Result<(), Over> {
        let to = self.session.reply_to(header);
        let mut verdict = self.session.judge(header);
        if let Verdict::StatusPayload { len } = verdict {
            let mut payload = [0u8; STATUS_PAYLOAD_LIMIT as usize];
            let payload = &mut payload[..len as usize];
            while input.bytes().len() < payload.len() {
                input.more(RECEIVE).await?;
            }
            payload.copy_from_slice(&input.bytes()[..payload.len()]);
            input.used(payload.len());
            verdict = self.session.status_payload(header, payload);
        }
        match verdict {
            Verdict::Run(command) => self.command(to, command, input).await,
            Verdict::Refuse { error, text, drain } => {
                self.refuse(to, error, text).await;
                input.skip(drain as usize).await
            }
            Verdict::Fatal { error, text } => {
                self.refuse(to, error, text).await;
                Err(Over)
            }
            Verdict::StatusPayload { .. } => Err(Over),
        }
    }

    async fn command(&mut self, to: ReplyTo, command: Command, input: &mut Input) -> Result<(), Over> {
        if command == Command::Disconnect {
            return Err(Over);
        }
        let weight = serve::weight(&command);
        self.client.flow.admit(weight).await;
        let client = self.client.clone();
        match command {
            Command::Read { off, len } => self.core.spawn(serve::read(client, to, off, len)),
            Command::Write { off, len, fua } => {
                self.large = len >= LARGE;
                return self.write(to, input, off, len, fua).await;
            }
            other => self.core.spawn(serve::other(client, to, other)),
        }
        Ok(())
    }

    /// A write that waits for limits keeps the client from being read, so that nobody holds its data. It was taken on, so it
    /// must reply whatever happens, if only to be counted.
    async fn write(&self, to: ReplyTo, input: &mut Input, off: u64, len: u32, fua: bool) -> Result<(), Over> {
        let client = self.client.clone();
        let permit = match client.party.admit(true, u64::from(len)).await {
            Ok(permit) => permit,
            Err(e) => {
                client.fail(to, len as usize, NbdError::of(e), None);
                return input.skip(len as usize).await;
            }
        };
        match input.take(len as usize).await {
            Ok(buf) => self.core.spawn(serve::write(client, to, permit, off, buf, fua)),
            Err(over) => {
                client.fail(to, len as usize, NbdError::Io, None);
                return Err(over);
            }
        }
        Ok(())
    }

    async fn refuse(&self, to: ReplyTo, error: NbdError, text: &str) {
        self.client.flow.admit(0).await;
        self.client.fail(to, 0, error, Some(text));
    }
}

/// Makes the client of a negotiated connection.
pub(super) fn client(stream: Socket, party: Arc<Party>, writethrough: bool) -> Rc<Client> {
    Rc::new(Client { flow: Flow::new(stream), root: party.root(), party, writethrough })
}
